"""The main job on real small models: what a run leaves, what it does when a finetune is broken, what a second run does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.checkpoints.reference import open_checkpoint
from components.checkpoints.source import read_whole
from components.masks.artifact import MaskArtifact
from components.reporting.schema import read_summary
from components.tracking import default_uri
from tests.pipelines.small import records, run, small_config, write_config

pytestmark = [pytest.mark.multiproc, pytest.mark.xdist_group("run")]


@dataclass(frozen=True)
class Finished:
    config: dict[str, Any]
    config_path: Path
    workspace: Path
    process: subprocess.CompletedProcess[str]

    @property
    def summary(self) -> Any:
        return read_summary(self.workspace / "summary.json")

    def finetune(self, name: str) -> Any:
        return next(f for f in self.summary["finetunes"] if f["name"] == name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two good finetunes and one with a NaN in it."""
    directory = tmp_path_factory.mktemp("run")
    config = small_config(directory)
    zh = config["finetunes"][0]
    broken = directory / "broken"
    shutil.copytree(zh["path"], broken)
    shard = sorted(broken.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    config["finetunes"].append({**zh, "name": "broken", "path": str(broken)})
    path = write_config(directory, config)
    return Finished(config, path, directory / "workspace", run(path, directory / "workspace"))


def test_a_broken_finetune_is_reported_and_the_others_finish(finished: Finished) -> None:
    assert finished.process.returncode == 2, finished.process.stderr
    assert "Traceback" not in finished.process.stderr
    said = [line for line in finished.process.stderr.splitlines() if line.startswith("realign: broken failed at load")]
    assert len(said) == 1
    assert "is nan" in said[0]
    assert {f["name"]: f["status"] for f in finished.summary["finetunes"]} == {
        "zh": "done", "hi": "done", "broken": "failed",
    }  # fmt: skip
    assert "broken" in finished.process.stdout
    assert (finished.workspace / "report.html").read_text().count("is nan") >= 1


def test_nothing_is_left_half_made(finished: Finished) -> None:
    stages = ("load", "extract_delta", "train_mask", "search_scale", "fuse", "evaluate", "compare_deltas")
    for stage in (*stages, "export_adapter"):
        for path in (finished.workspace / stage).iterdir():
            if path.name.startswith("."):
                assert path.name.startswith(".state-")
                assert [p.name for p in path.iterdir()] == ["failure.json"]
            else:
                assert (path / "record.json").is_file()


def test_a_fused_model_loads_in_plain_transformers_and_answers_as_recorded(finished: Finished) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for form in ("soft", "binary"):
        directory = finished.finetune("zh")["fused"][form]
        tokenizer = AutoTokenizer.from_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        evaluated = next(
            path
            for path in finished.workspace.glob("evaluate/*/record.json")
            if any(f"fuse/{Path(directory).parent.name}" == p for p in json.loads(path.read_text())["parents"].values())
        )
        for name in ("zh", "harmful", "benign"):
            lines = (evaluated.parent / "test" / "answers" / f"{name}.jsonl").read_text().splitlines()
            for line in map(json.loads, lines[:4]):
                inputs = tokenizer.apply_chat_template(
                    [{"role": "user", "content": line["prompt"]}],
                    add_generation_prompt=True, return_tensors="pt", return_dict=True,
                )  # fmt: skip
                out = model.generate(**inputs, max_new_tokens=40, do_sample=False)
                answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                # A harmful prompt's answer is cut once its verdict is known.
                assert answer.strip().startswith(line["answer"].strip())
                assert line["end"] == "decided" or answer.strip() == line["answer"].strip()


def test_the_published_binary_model_is_a_select_between_its_inputs_bit_for_bit(finished: Finished) -> None:
    for name in ("zh", "hi"):
        place = next(f for f in finished.config["finetunes"] if f["name"] == name)
        aligned = open_checkpoint(Path(finished.config["aligned"])).source
        finetune = open_checkpoint(Path(place["path"]), base=Path(finished.config["aligned"])).source
        fused_dir = Path(finished.finetune(name)["fused"]["binary"])
        fused = open_checkpoint(fused_dir).source
        record = json.loads((fused_dir.parent / "record.json").read_text())
        mask = MaskArtifact.open(finished.workspace / record["parents"]["train_mask"] / "mask")
        from_aligned = from_finetune = 0
        for tensor in fused.names():
            got, a, f = (read_whole(s, tensor) for s in (fused, aligned, finetune))
            bits = mask.binary(tensor, 0, a.numel()).reshape(a.shape)
            assert torch.equal(got, torch.where(bits, f.to(got.dtype), a.to(got.dtype))), tensor
            from_finetune += int(bits.sum())
            from_aligned += int((~bits).sum())
        assert from_aligned > 0
        assert from_finetune > 0


def test_an_adapter_leaves_as_an_adapter_and_is_measured_by_itself(finished: Finished) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    hi, zh = finished.finetune("hi"), finished.finetune("zh")
    assert "adapter" not in zh
    assert any("no adapter" in note for note in zh["notes"])
    directory = Path(hi["adapter"]["path"])
    assert hi["adapter"]["form"] == hi["selected"]
    base = AutoModelForCausalLM.from_pretrained(finished.config["aligned"], dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, directory).merge_and_unload().state_dict()
    fused = open_checkpoint(Path(hi["fused"][hi["selected"]])).source
    lost = norm = 0.0
    for name in fused.names():
        delta, written = read_whole(fused, name).double() - before[name], merged[name].double() - before[name]
        lost, norm = lost + float((delta - written).square().sum()), norm + float(delta.square().sum())
        assert delta.dim() != 2 or torch.linalg.matrix_rank(written, atol=1e-4) <= 3, name
    assert hi["adapter"]["error"] == pytest.approx((lost / norm) ** 0.5, rel=1e-3)
    assert 0 < hi["adapter"]["error"] < 1
    assert any(f"rank 3 holds the {hi['selected']} model's delta" in note for note in hi["notes"])
    assert hi["after_adapter"]["asr"]["n"] == hi["after_soft"]["asr"]["n"]
    assert f"{hi['selected']}_vs_adapter" in hi["comparisons"]
    assert "adapter" in [line.split()[0] for line in finished.process.stdout.splitlines() if line.split()]


def test_a_second_run_makes_nothing_anew_and_registers_nothing_twice(finished: Finished) -> None:
    before = records(finished.workspace)
    versions = {f["name"]: f["registry"] for f in finished.summary["finetunes"]}
    assert versions["zh"] == {"name": "small-zh", "version": "1"}
    assert versions["broken"] is None
    before_us = sum(os.times()[2:4])
    again = run(finished.config_path, finished.workspace)
    # 8 s of work on a quiet machine. Not the clock: tests share their machine, and a busy one is several times slower.
    assert sum(os.times()[2:4]) - before_us < 30
    assert again.returncode == 2
    assert records(finished.workspace) == before
    assert {f["name"]: f["registry"] for f in finished.summary["finetunes"]} == versions


def test_tracking_shows_one_run_with_a_nested_run_per_finetune(finished: Finished) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=default_uri(finished.workspace))
    experiment = client.get_experiment_by_name("small")
    runs = client.search_runs([experiment.experiment_id])
    top = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    nested = {r.info.run_name: r for r in runs if "mlflow.parentRunId" in r.data.tags}
    assert len(top) == 1
    assert {n: r.info.status for n, r in nested.items()} == {"zh": "FINISHED", "hi": "FINISHED", "broken": "FAILED"}
    rates = finished.finetune("zh")["after_soft"]
    assert nested["zh"].data.metrics["soft/asr"] == rates["asr"]["value"]
    series = client.get_metric_history(nested["zh"].info.run_id, "train_mask/loss")
    assert [m.step for m in series] == list(range(25))
    assert 0 < nested["zh"].data.metrics["density/layer_001"] <= 1
    assert nested["zh"].data.metrics["train_mask/tokens_per_second"] > 10
    assert nested["zh"].data.metrics["train_mask/peak_memory_bytes"] > 2**27
    pictures = [a.path for a in client.list_artifacts(nested["zh"].info.run_id)]
    assert pictures == ["density-zh.svg"]


def test_status_reads_the_files(finished: Finished) -> None:
    from pipelines.status import run_status

    lines = run_status(finished.workspace)
    assert lines[0].startswith("run small, started")
    assert any(line.startswith("zh: ") and "done" in line for line in lines)
    assert any(line.startswith("broken/load failed: ") for line in lines)


def test_every_fingerprint_follows_from_the_record_itself(finished: Finished) -> None:
    from components.records import fingerprint, parent_fingerprint

    for reference, record in records(finished.workspace).items():
        parents = {role: parent_fingerprint(r) for role, r in record["parents"].items()}
        again = fingerprint(
            stage=record["stage"], version=record["stage_version"], semantics=record["semantics"], parents=parents
        )
        assert reference == f"{record['stage']}/{again}"
        assert str(finished.workspace) not in json.dumps(record["semantics"])


def test_the_report_is_logged_and_names_the_registered_version(finished: Finished) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=default_uri(finished.workspace))
    experiment = client.get_experiment_by_name("small")
    [top] = [r for r in client.search_runs([experiment.experiment_id]) if "mlflow.parentRunId" not in r.data.tags]
    assert {"report.html", "summary.json"} <= {a.path for a in client.list_artifacts(top.info.run_id)}
    logged = Path(client.download_artifacts(top.info.run_id, "report.html", str(finished.config_path.parent)))
    assert "registered: small-zh version 1" in logged.read_text()
    assert "is nan" in logged.read_text()


def test_the_summary_says_what_was_asked_where_it_comes_from_and_what_it_took(finished: Finished) -> None:
    summary, zh = finished.summary, finished.finetune("zh")
    assert summary["asked"]["mask"]["steps"] == 25
    assert summary["asked"]["finetunes"] == {"zh": "full model", "hi": "LoRA adapter", "broken": "full model"}
    published = records(finished.workspace)
    for step, told in zh["records"].items():
        assert told["parents"] == published[told["reference"]]["parents"], step
    evaluated = zh["records"]["evaluate_soft"]["reference"]
    lines = [
        json.loads(line)
        for path in (finished.workspace / evaluated).glob("*/answers/*.jsonl")
        for line in path.read_text().splitlines()
    ]
    cost = zh["cost"]["evaluate_soft"]
    assert (cost["prompts"], cost["tokens"]) == (len(lines), sum(line["tokens"] for line in lines))
    assert cost["prompts"] > zh["after_soft"]["asr"]["n"]
    files = published[evaluated]["outputs"].values()
    assert cost["bytes_written"] == sum(file["bytes"] for file in files)


def test_a_card_with_the_summarys_numbers_lies_beside_the_selected_weights(finished: Finished) -> None:
    from huggingface_hub import ModelCard

    from components.storage import Workspace

    for name in ("zh", "hi"):
        one = finished.finetune(name)
        directory = Path(one["fused"][one["selected"]])
        card = ModelCard.load(directory / "README.md")
        told = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results or ()}
        rates = one[f"after_{one['selected']}"]
        assert told["all test sets that count", "asr"] == rates["asr"]["value"]
        assert told[name, "task"] == rates["sets"][name]["task"]["value"]
        assert f"Registered as small-{name} version 1." in card.text
        assert str(finished.workspace) not in card.content
        fused = one["records"][f"fuse_{one['selected']}"]["reference"]
        record = Workspace(finished.workspace).record(*fused.split("/"))
        assert record is not None, "the record's check of its files takes the card"
        assert "model/README.md" not in record.outputs
    adapter = finished.finetune("hi")["adapter"]
    card = ModelCard.load(Path(adapter["path"]) / "README.md")
    assert card.data.library_name == "peft"
    assert f"It lacks {100 * adapter['error']:.3g} % of what that form changes" in card.text
    assert "| evaluate_adapter | " in card.text
    assert str(finished.workspace) not in card.content


def test_a_run_is_compared_with_another(finished: Finished, tmp_path: Path) -> None:
    shutil.copytree(finished.workspace, tmp_path / "other")
    found = json.loads((tmp_path / "other" / "summary.json").read_text())
    zh = next(one for one in found["finetunes"] if one["name"] == "zh")
    form = zh["selected"]
    other = "soft" if form == "binary" else "binary"
    zh["selected"] = other
    (tmp_path / "other" / "summary.json").write_text(json.dumps(found))
    command = [sys.executable, "-m", "pipelines.cli", "compare", str(finished.workspace), str(tmp_path / "other")]
    page = tmp_path / "compared.html"
    told = subprocess.run([*command, "--json", "--html", str(page)], capture_output=True, text=True, check=True)
    pairs = {(p["model"], *p["variants"]): p for p in json.loads(told.stdout)["pairs"]}
    assert pairs["zh", "before", "before"]["same"]
    apart = next(x for x in pairs["zh", form, other]["lines"] if (x["metric"], x["set"]) == ("asr", None))
    known = zh["comparisons"][f"{other}_vs_{form}"]["asr"]
    assert apart["difference"] == known
    assert f"zh, {form} and {other}" in page.read_text()
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "hi, before: one and the same evaluation in both" in text
    assert "settings: the same" in text
