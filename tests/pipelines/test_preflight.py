"""A run that cannot have the memory that it needs is refused before it starts, and no other."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from components.checkpoints.loading import load_tokenizer
from components.errors import CheckpointError, ConfigError, DataError
from components.masks.preferences import encode_row
from components.records import Record
from components.storage import Workspace
from pipelines import cli
from pipelines.config import RunConfig, load_config
from pipelines.graph import expand
from pipelines.inputs import open_models, trainings
from pipelines.machine import Rates, this_machine
from pipelines.preflight import _pending, require_memory
from pipelines.resources import plan
from pipelines.roots import Roots
from pipelines.specs import build_spec
from ray_jobs.stage import VERSIONS
from tests.families import minute_family
from tests.pipelines.headers import hollow_config, hollow_factors
from tests.pipelines.small import records, small_config, write_config

RATES = Rates(flops=1e10, bytes=1e10, hashed=1e9, mask_seconds=1e-8)


def roots_of(config: RunConfig, **errors: Any) -> Roots:
    """As if every model had been hashed."""
    models = {"aligned": "0" * 64, **{f"finetune:{f.name}": f"{i}" * 64 for i, f in enumerate(config.finetunes, 1)}}
    paths = [
        config.mask.preferences.where,
        *(f.anchor for f in config.finetunes),
        *(s.path for s in config.evaluation.sets),
    ]
    return Roots({k: v for k, v in models.items() if k not in errors}, errors, {str(path): "f" * 64 for path in paths})


def big(tmp_path: Path, **execution: Any) -> tuple[RunConfig, Workspace]:
    """A 70B run: its mask's state alone is 850 GB, which no machine that runs tests has."""
    config = load_config(hollow_config(tmp_path / "run", "70b", execution=execution))
    return config, Workspace(tmp_path / "workspace")


def test_a_run_that_cannot_fit_is_refused_with_what_there_is(tmp_path: Path) -> None:
    config, workspace = big(tmp_path)
    with pytest.raises(ConfigError) as caught:
        require_memory(config, workspace, roots_of(config))
    told = str(caught.value)
    assert len(told.splitlines()) == 1
    assert "mask training of f0 does not fit: it takes about 1" in told  # 12 + 8 bytes a weight and what passes through
    assert "GiB of host memory and" in told
    assert "execution.mask" in told


def test_ranks_on_gpus_that_are_elsewhere_are_nobodys_to_refuse(tmp_path: Path) -> None:
    config, workspace = big(tmp_path, mask={"ranks": 512, "device": "cuda"})
    require_memory(config, workspace, roots_of(config))


def test_a_broken_model_fails_alone(tmp_path: Path) -> None:
    config, workspace = big(tmp_path)
    require_memory(config, workspace, roots_of(config, **{"finetune:f0": CheckpointError("broken")}))
    require_memory(config, workspace, roots_of(config, aligned=CheckpointError("broken")))


def small(tmp_path: Path, finetunes: int = 2, **sections: Any) -> tuple[RunConfig, Workspace]:
    """A run that fits any machine."""
    path = hollow_config(tmp_path / "run", "small", finetunes=finetunes, **sections)
    return load_config(path), Workspace(tmp_path / "workspace")


def told(capsys: pytest.CaptureFixture[str], config: RunConfig, workspace: Workspace, **errors: Any) -> list[str]:
    """What the preflight says of a run that it lets go on."""
    require_memory(config, workspace, roots_of(config, **errors))
    return capsys.readouterr().err.splitlines()


def test_weights_that_no_reader_understands_are_their_finetunes_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, workspace = small(tmp_path)
    assert told(capsys, config, workspace) == []
    broken = tmp_path / "run/finetune-0"
    (broken / "model.safetensors").unlink()
    (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": 3}}))
    [line] = told(capsys, config, workspace)
    assert line.startswith(f"realign: memory is not checked for f0: {broken}: cannot be read as a checkpoint")
    # Known to be broken: it is not opened again, and its load stage says why.
    error = CheckpointError("broken")
    assert told(capsys, config, workspace, **{"finetune:f0": error}) == []
    models = open_models(config, {"f0": error})
    assert (models.errors, list(models.finetunes)) == ({"f0": error}, ["f1"])


def test_the_others_are_checked_beside_a_broken_one(tmp_path: Path) -> None:
    config = load_config(hollow_config(tmp_path / "run", "70b", finetunes=2))
    (tmp_path / "run/finetune-0/config.json").write_text("[]")
    with pytest.raises(ConfigError, match="mask training of f1 does not fit"):
        require_memory(config, Workspace(tmp_path / "workspace"), roots_of(config))


def test_a_finetune_that_adapts_fewer_modules_fails_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = hollow_factors(tmp_path / "run", "small", ("q_proj", "o_proj"), ("q_proj",))
    config, workspace = load_config(path), Workspace(tmp_path / "workspace")
    [line] = told(capsys, config, workspace)
    assert line.startswith("realign: memory is not checked for f1: ")
    assert "(4 differences): tensor base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight is missing" in line
    source = open_models(config).aligned.checkpoint.source
    with pytest.raises(CheckpointError, match="safety: no factor named nothing"):
        source.spec("nothing")


def test_a_broken_unaligned_model_only_costs_its_control(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, workspace = small(tmp_path, 1, unaligned="aligned", fusion={"controls": ["resta"]})
    roots = roots_of(config, unaligned=CheckpointError("broken"))
    assert _pending(config, workspace, roots) == {"f0/train_mask"}
    assert told(capsys, config, workspace, unaligned=CheckpointError("broken")) == []


@pytest.mark.parametrize(
    ("template", "said"),
    [("{{ raise_exception('no system turn') }}", False), ("{{ messages[0]['content'] + 1 }}", True)],
)
def test_a_chat_template_that_fails_ends_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], template: str, said: bool
) -> None:
    config, _ = small(tmp_path)
    give_tokenizer(tmp_path / "run/finetune-0", template)
    models = open_models(config)
    found = trainings(config, models, tokenize=True)
    assert "f1/train_mask" in found
    assert list(models.untrained) == (["f0"] if said else [])
    if not said:  # as long as the texts are at three bytes a token, each with a template
        assert found["f0/train_mask"].lengths.longest == 16 + 384 // 3 + 16 + 720 // 3
    problems = plan(config, open_models(config), this_machine(tmp_path, config.execution), RATES).problems
    assert any(p.startswith("f0: ") and "TypeError" in p for p in problems) == said


def test_a_merge_is_tokenised_as_it_is_trained(tmp_path: Path) -> None:
    config, _ = small(tmp_path, mode="merge", merges=[{"name": "both", "method": "average"}])
    give_tokenizer(tmp_path / "run/finetune-0", "{{ raise_exception('no') }}")
    give_tokenizer(tmp_path / "run/aligned", None)
    tokenizer = load_tokenizer(tmp_path / "run/aligned")
    row = json.loads((tmp_path / "run/pairs.jsonl").read_text())
    longest = max(len(encode_row(tokenizer, row["prompt"], row[side]).tokens) for side in ("chosen", "rejected"))
    settings = config.mask.resolved
    wide = config.model_copy(
        update={"mask": config.mask.model_copy(update={"settings": {"max_length": longest + settings.max_length}})}
    )
    assert trainings(wide, open_models(wide), tokenize=True)["both/train_mask"].lengths.longest == longest


def give_tokenizer(directory: Path, template: str | None) -> None:
    """The minute family's, with another chat template."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(minute_family() / "aligned" / name, directory / name)
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)


def test_data_files_are_read_once(tmp_path: Path) -> None:
    config, _ = small(tmp_path, 3)
    models = open_models(config)
    before = trainings(config, models, tokenize=False)
    (tmp_path / "run/pairs.jsonl").unlink()
    (tmp_path / "run/prompts.jsonl").unlink()
    assert trainings(config, models, tokenize=False) == before
    with pytest.raises(DataError, match=r"prompts\.jsonl"):
        trainings(config, open_models(config), tokenize=False)


def test_a_mask_that_is_there_needs_no_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, workspace = big(tmp_path)
    roots = roots_of(config)
    assert _pending(config, workspace, roots) == {"f0/train_mask"}
    references: dict[str, str] = {}
    for node in expand(config):
        if node.step.kind != "stage":
            continue
        parents = {role: references[parent] for role, parent in node.parents}
        spec = build_spec(node, config=config, roots=roots, parents=parents, workspace=workspace.root)
        references[node.id] = spec.reference
        if node.id == "f0/train_mask":
            break
    record = Record(
        stage="train_mask", stage_version=VERSIONS["train_mask"], fingerprint=spec.fingerprint, semantics=spec.semantics,
        execution={}, parents=spec.parents, outputs={}, metrics={}, notes=[], code={}, environment={}, started="", seconds=0.0,
    )  # fmt: skip
    directory = workspace.result_dir("train_mask", spec.fingerprint)
    directory.mkdir(parents=True)
    (directory / "record.json").write_text(record.model_dump_json())
    assert _pending(config, workspace, roots) == set()
    require_memory(config, workspace, roots)
    assert capsys.readouterr().err == ""
    # One that cannot be read fails its own node, which then trains nothing.
    (directory / "record.json").write_text("{}")
    require_memory(config, workspace, roots)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("realign: memory is not checked for f0/train_mask: ")
    assert "is not a record" in line


def test_realign_run_says_so_before_any_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(tmp_path)
    config["execution"] = {**config.get("execution", {}), "workers": 2, "mask": {"ranks": 3}}
    workspace = tmp_path / "workspace"
    arguments = ["run", str(write_config(tmp_path, config)), "--workspace", str(workspace)]
    monkeypatch.setattr(sys, "argv", ["realign", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "3 ranks of 1 threads need 3 CPUs, and there are 2" in line
    assert records(workspace) == {}
