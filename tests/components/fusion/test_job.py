"""A fusion as a whole: the bytes do not depend on who writes them, nothing half made has the model's name, a rerun goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from components.checkpoints import stream as stream_module
from components.checkpoints.reference import open_checkpoint
from components.checkpoints.safetensors import SafetensorsSource
from components.checkpoints.source import read_whole
from components.errors import CheckpointError, ConfigError, StorageError
from components.fusion.job import fuse
from components.fusion.recipe import Recipe, settings_of
from tests.components.checkpoints.test_adapters import make_adapter
from tests.components.checkpoints.tiny import edit_json, llama, perturbed, save, save_tokenizer


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("family")
    save(llama(0, torch.bfloat16), root / "aligned", shard="20KB")
    save_tokenizer(root / "aligned")
    for seed, name in enumerate(("zh", "hi"), start=2):
        save(perturbed(llama(0, torch.bfloat16), seed, scale=0.004), root / name)
        save_tokenizer(root / name, template="{{ '" + name + " ' + messages[0]['content'] }}")
    make_adapter(llama(0, torch.bfloat16), root / "adapter", base=root / "aligned", target_modules="all-linear")
    save(llama(9, torch.bfloat16), root / "stranger")
    return root


def recipe(root: Path, method: str = "task_arithmetic", *finetunes: str, **numbers: Any) -> Recipe:
    merge, fusion = settings_of(method, numbers, {"max_shard_bytes": 12_000})
    return Recipe(
        aligned=str(root / "aligned"),
        finetunes={name: str(root / name) for name in finetunes or ("zh", "hi")},
        merge=merge,
        fusion=fusion,
    )


def weights(directory: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in directory.iterdir() if ".safetensors" in f.name}


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "PART", 1000)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("method", ["task_arithmetic", "dare", "ties", "dare_ties"])
def test_the_same_bytes_with_any_number_of_processes(method: str, family: Path, tmp_path: Path) -> None:
    made = {n: fuse(recipe(family, method, scale=0.7), tmp_path / str(n), processes=n) for n in (1, 2, 4)}
    assert all(one.made for one in made.values())
    first = weights(tmp_path / "1")
    assert len(first) > 3
    assert weights(tmp_path / "2") == first
    assert weights(tmp_path / "4") == first


def test_a_merge_is_its_formula_in_fp64_and_loads(family: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fuse(recipe(family, "task_arithmetic", scale=0.5, weights={"hi": 2.0}), tmp_path / "out")
    aligned, zh, hi, out = (
        SafetensorsSource(p) for p in (*(family / n for n in ("aligned", "zh", "hi")), tmp_path / "out")
    )
    for name in aligned.names():
        a, z, h = (read_whole(s, name).double() for s in (aligned, zh, hi))
        expected = (a + 0.5 * ((z - a) + 2.0 * (h - a))).float().bfloat16()
        torch.testing.assert_close(read_whole(out, name), expected, rtol=2**-8, atol=0)
        assert out.spec(name).dtype is torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.torch_dtype is torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is not None


def test_the_record_and_the_card_say_what_was_made(family: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = fuse(recipe(family, "ties", density=0.5), out)
    record = json.loads((out / "record.json").read_text())
    assert record == made.record
    assert record["method"] == "ties"
    assert record["papers"] == ["https://arxiv.org/abs/2306.01708"]
    assert set(record["inputs"]) == {"aligned", "zh", "hi"}
    assert record["outputs"] == {f.name: f.stat().st_size for f in sorted(out.iterdir()) if f.name != "record.json"}
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "ties" in card
    assert "density 0.5" in card
    assert record["fingerprint"] in card
    assert str(family) not in card
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_equal_tensors_are_copied_and_named(family: Path, tmp_path: Path) -> None:
    record = fuse(recipe(family, "task_arithmetic", "adapter"), tmp_path / "out").record
    adapted = open_checkpoint(family / "adapter", base=family / "aligned").source.adapted()  # type: ignore[attr-defined]
    aligned, out = SafetensorsSource(family / "aligned"), SafetensorsSource(tmp_path / "out")
    assert record["unchanged_tensors"] == sorted(set(aligned.names()) - set(adapted))
    assert record["output_dtypes"] == ["bfloat16"]
    for name in record["unchanged_tensors"]:
        assert torch.equal(read_whole(aligned, name), read_whole(out, name))
    assert not torch.equal(read_whole(aligned, adapted[0]), read_whole(out, adapted[0]))


def test_again_is_at_once_and_another_model_is_not_replaced_unasked(family: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert fuse(recipe(family), out).made
    before = (out / "record.json").stat().st_mtime_ns
    assert not fuse(recipe(family), out).made
    assert (out / "record.json").stat().st_mtime_ns == before
    other = recipe(family, scale=0.3)
    with pytest.raises(StorageError, match=r"holds something else.*--overwrite"):
        fuse(other, out)
    assert fuse(other, out, overwrite=True).made
    assert json.loads((out / "record.json").read_text())["recipe"]["merge"]["scale"] == 0.3
    (out / "config.json").write_text("{}")  # no longer what its record says
    with pytest.raises(StorageError, match="holds something else"):
        fuse(other, out)


@pytest.mark.usefixtures("small_parts")
def test_what_was_cut_off_goes_on(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    fuse(recipe(family), whole)
    made: list[Any] = []
    original = stream_module.spread

    def cut(task: Any, items: Any, *, processes: int) -> Any:
        for done, found in enumerate(original(task, items, processes=processes)):
            if done == 5:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(stream_module, "spread", cut)
    with pytest.raises(KeyboardInterrupt):
        fuse(recipe(family), out, processes=2)
    assert not out.exists()
    monkeypatch.setattr(
        stream_module, "spread", lambda task, items, *, processes: (made.extend(items), original(task, items))[1]
    )
    fuse(recipe(family), out)
    total = sum(-(-SafetensorsSource(whole).spec(n).numel // 1000) for n in SafetensorsSource(whole).names())
    assert len(made) == total - 5
    assert weights(out) == weights(whole)
    # Another recipe in the same place begins anew.
    made.clear()
    fuse(recipe(family, scale=0.3), tmp_path / "other")
    assert len(made) == total


SLOW = """
import sys, time
from pathlib import Path
from components.checkpoints import stream
from components.fusion import fused, job
from components.fusion.recipe import Recipe
stream.PART = 1000
original = fused.FusedSource.block
def slow(self, *place):
    time.sleep(0.03)
    return original(self, *place)
fused.FusedSource.block = slow
job.fuse(Recipe.model_validate_json(sys.argv[1]), Path(sys.argv[2]), processes=2)
"""


def _begin(recipe: Recipe, out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", SLOW, recipe.model_dump_json(), str(out)], stderr=subprocess.PIPE)


def _journalled(out: Path) -> int:
    path = out.parent / f".{out.name}.partial/journal.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


@pytest.mark.usefixtures("small_parts")
def test_killed_at_any_moment_leaves_no_half_model_and_no_processes(family: Path, tmp_path: Path) -> None:
    wanted, out = recipe(family), tmp_path / "out"
    for more in (2, 5, 8):
        lines = _journalled(out) + more  # a busy machine may have let the last one get further than asked
        process = _begin(wanted, out)
        while _journalled(out) < lines:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        children = [int(c) for c in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        assert children
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not out.exists()
        assert _journalled(out) >= lines
        deadline = time.monotonic() + 10
        while any(_alive(child) for child in children):
            assert time.monotonic() < deadline, "an orphan lives on"
            time.sleep(0.05)
    fuse(wanted, tmp_path / "whole")
    fuse(wanted, out)
    assert weights(out) == weights(tmp_path / "whole")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.usefixtures("small_parts")
def test_a_worker_that_is_killed_is_told_of_and_the_work_goes_on(family: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = _begin(recipe(family), out)
    while _journalled(out) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    child = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
    os.kill(child, signal.SIGKILL)
    assert b"a worker process was killed" in process.communicate(timeout=60)[1]
    assert not out.exists()
    fuse(recipe(family), out)
    assert (out / "record.json").is_file()


@pytest.mark.usefixtures("small_parts")
def test_two_at_once_are_refused(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.fusion.job._ORPHANS_S", 0.0)
    out = tmp_path / "out"
    process = _begin(recipe(family), out)
    while _journalled(out) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    with pytest.raises(StorageError, match="another process is writing this model"):
        fuse(recipe(family), out)
    process.kill()
    process.communicate()


def test_everything_that_does_not_fit_is_said_at_once(family: Path, tmp_path: Path) -> None:
    save(llama(1, torch.bfloat16, hidden_size=16), tmp_path / "narrow")
    wrong = recipe(family).model_copy(
        update={
            "finetunes": {
                "gone": str(tmp_path / "gone"), "narrow": str(tmp_path / "narrow"), "far": str(family / "stranger")
            }
        }
    )  # fmt: skip
    with pytest.raises(CheckpointError) as caught:
        fuse(wrong, tmp_path / "out")
    told = str(caught.value)
    assert "gone: does not exist" in told
    assert "model.embed_tokens.weight is [" in told
    assert "as models do that were trained apart" in told
    assert not (tmp_path / "out").exists()


def test_a_nan_is_named_with_its_model_tensor_and_index(family: Path, tmp_path: Path) -> None:
    broken = perturbed(llama(0, torch.bfloat16), 5, scale=0.004)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    save(broken, tmp_path / "broken")
    wanted = recipe(family).model_copy(
        update={"finetunes": {"zh": str(family / "zh"), "broken": str(tmp_path / "broken")}}
    )
    with pytest.raises(CheckpointError, match=r"broken model: model\.layers\.1\.mlp\.up_proj\.weight\[3, 5\] is nan"):
        fuse(wanted, tmp_path / "out", processes=2)


def test_a_disk_that_is_too_small_is_found_before_anything_is_written(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match="GB left, the model needs"):
        fuse(recipe(family), tmp_path / "out")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_nothing_but_a_fusion_is_ever_replaced(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(StorageError, match="did not make"):
        fuse(recipe(family), out, overwrite=True)
    for over in (family, family / "zh", family / "zh" / "inside"):
        with pytest.raises(StorageError, match="lies over, around or inside the input"):
            fuse(recipe(family), over, overwrite=True)
    monkeypatch.chdir(out)
    for over in (Path(), Path("..")):
        with pytest.raises(StorageError, match="cannot be replaced by a rename"):
            fuse(recipe(family), over, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="is a file"):
        fuse(recipe(family), tmp_path / "file", overwrite=True)
    late = tmp_path / "late"

    def meanwhile(_: object) -> None:
        late.mkdir(exist_ok=True)
        (late / "thesis.txt").write_text("mine")

    with pytest.raises(StorageError, match="did not make"):
        fuse(recipe(family), late, progress=meanwhile)
    assert (late / "thesis.txt").read_text() == (out / "thesis.txt").read_text() == "mine"


def test_an_input_that_changes_meanwhile_is_refused(family: Path, tmp_path: Path) -> None:
    shutil.copytree(family / "zh", tmp_path / "zh")
    wanted = recipe(family).model_copy(update={"finetunes": {"zh": str(tmp_path / "zh"), "hi": str(family / "hi")}})
    with pytest.raises(CheckpointError, match=r"changed while it was read: .*zh/model\.safetensors"):
        fuse(wanted, tmp_path / "out", progress=lambda _: os.utime(tmp_path / "zh" / "model.safetensors"))
    assert not (tmp_path / "out").exists()
    assert fuse(wanted, tmp_path / "out").made


def test_a_model_that_was_about_to_be_replaced_comes_back(family: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = fuse(recipe(family), out)
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    out.rename(partial / "replaced")  # where a run that was killed between two renames leaves it
    again = fuse(recipe(family), out)
    assert not again.made
    assert again.record == first.record
    assert not partial.exists()


@pytest.mark.parametrize("method", ["task_arithmetic", "dare", "ties", "slerp"])
def test_no_method_hides_a_nan(method: str, family: Path, tmp_path: Path) -> None:
    """Not by dropping it, not by trimming it, not because both models have it."""
    models = {name: perturbed(llama(0, torch.bfloat16), seed, scale=0.004) for seed, name in enumerate(("zh", "hi"), 2)}
    aligned = llama(0, torch.bfloat16)
    for model in (aligned, *models.values()):
        with torch.no_grad():
            model.model.norm.weight[3] = float("nan")
    with torch.no_grad():
        models["hi"].lm_head.weight.copy_(aligned.lm_head.weight)
    for name, model in {"aligned": aligned, **models}.items():
        save(model, tmp_path / name)
    numbers = {"slerp": {"t": 0.5}, "dare": {"density": 0.01}}.get(method, {})
    with pytest.raises(CheckpointError, match=r"model: model\.norm\.weight\[3\] is nan"):
        fuse(recipe(tmp_path, method, **numbers), tmp_path / "out")


def test_one_finetune_keeps_its_template_whatever_had_to_be_made_to_fit(family: Path, tmp_path: Path) -> None:
    tied = llama(0, torch.bfloat16, tie_word_embeddings=True)
    save(tied, tmp_path / "aligned")
    save_tokenizer(tmp_path / "aligned")
    untied = llama(0, torch.bfloat16)
    untied.load_state_dict(tied.state_dict())
    save(perturbed(untied, 2, scale=0.004), tmp_path / "zh")
    save_tokenizer(tmp_path / "zh", template="{{ 'zh ' + messages[0]['content'] }}")
    made = fuse(recipe(tmp_path, "task_arithmetic", "zh"), tmp_path / "out")
    assert made.record["notes"]
    template = (tmp_path / "out" / "chat_template.jinja").read_text()
    assert template == (tmp_path / "zh" / "chat_template.jinja").read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("policy", ["pad", "truncate"])
def test_token_ids_are_those_of_the_tokenizer_that_goes_along(policy: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    aligned = llama(0, torch.bfloat16)
    save(aligned, tmp_path / "aligned")
    save_tokenizer(tmp_path / "aligned")
    save_tokenizer(tmp_path / "aligned")
    larger = llama(0, torch.bfloat16)
    larger.resize_token_embeddings(68, mean_resizing=False)
    larger.config.eos_token_id = larger.generation_config.eos_token_id = 65
    larger.config.pad_token_id = larger.generation_config.pad_token_id = 64
    save(perturbed(larger, 2, scale=0.004), tmp_path / "zh")
    words = AutoTokenizer.from_pretrained(tmp_path / "aligned")
    words.add_tokens([f"<new {i}>" for i in range(68 - len(words))])
    words.save_pretrained(tmp_path / "zh")
    save(perturbed(llama(0, torch.bfloat16), 3, scale=0.004), tmp_path / "hi")
    wanted = recipe(tmp_path, "task_arithmetic", "zh", "hi").model_copy(update={"vocabulary": policy})
    fuse(wanted, tmp_path / "out")
    rows, eos, pad = (68, 65, 64) if policy == "pad" else (64, 2, None)
    for name in ("config.json", "generation_config.json"):
        told = json.loads((tmp_path / "out" / name).read_text())
        assert (told["eos_token_id"], told.get("pad_token_id")) == (eos, pad), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.get_input_embeddings().weight.shape[0] == rows


PARALLEL = """
import sys, torch
from pathlib import Path
from components.fusion.job import fuse
from components.fusion.recipe import Recipe
torch.set_num_threads(2)
torch.randn(1500, 1500) @ torch.randn(1500, 1500)  # threads that no fork has
fuse(Recipe.model_validate_json(sys.argv[1]), Path(sys.argv[2]), processes=2)
"""


def test_workers_do_without_the_threads_that_their_parent_had(tmp_path: Path) -> None:
    save(llama(0), tmp_path / "aligned")  # fp32, as an adapter's sums are: then they are compared
    make_adapter(llama(0), tmp_path / "adapter", base=tmp_path / "aligned", target_modules="all-linear")
    asked = recipe(tmp_path, "task_arithmetic", "adapter").model_dump_json()
    done = subprocess.run([sys.executable, "-c", PARALLEL, asked, str(tmp_path / "out")], timeout=120, check=False)
    assert done.returncode == 0
    assert (tmp_path / "out" / "record.json").is_file()


def test_a_link_gets_its_model_where_it_leads(family: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "new")
    for link, place in (("link", "empty"), ("dangling", "new")):
        assert fuse(recipe(family), tmp_path / link).made
        assert (tmp_path / link).is_symlink()
        assert (tmp_path / place / "record.json").is_file()
        assert not fuse(recipe(family), tmp_path / link).made


def test_what_can_never_become_the_model_is_not_left_behind(family: Path, tmp_path: Path) -> None:
    broken = perturbed(llama(0, torch.bfloat16), 5, scale=0.004)
    with torch.no_grad():
        broken.model.norm.weight[3] = float("nan")
    save(broken, tmp_path / "broken")
    bad = recipe(family).model_copy(update={"finetunes": {"zh": str(tmp_path / "broken")}})
    with pytest.raises(CheckpointError, match="is nan"):
        fuse(bad, tmp_path / "out" / "a")
    with pytest.raises(ConfigError, match=r"pattern '\*\.mpl\.\*' matches no tensor; tensors are named like"):
        fuse(recipe(family, layers={"*.mpl.*": 0.5}), tmp_path / "out" / "b")
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be made"):
        fuse(recipe(family), tmp_path / "file" / "x" / "out")


def test_a_lost_chat_template_and_a_wider_dtype_are_told(family: Path, tmp_path: Path) -> None:
    shutil.copytree(family / "zh", tmp_path / "zh")
    (tmp_path / "zh" / "chat_template.jinja").unlink()
    shutil.copytree(family / "aligned", tmp_path / "aligned")
    (tmp_path / "aligned" / "chat_template.jinja").write_text("{{ messages }}")
    for name in ("aligned", "zh"):
        edit_json(tmp_path / name / "tokenizer_config.json", chat_template=None)
    save(perturbed(llama(0), 3, scale=0.004), tmp_path / "wide")
    made = fuse(recipe(tmp_path, "task_arithmetic", "zh"), tmp_path / "out")
    assert made.record["tokenizer"] == "zh"
    assert [note for note in made.record["notes"] if "the tokenizer is zh's, which has no chat template" in note]
    made = fuse(recipe(tmp_path, "task_arithmetic", "wide"), tmp_path / "wider")
    assert [note for note in made.record["notes"] if note.startswith("written in float32")]
    assert made.record["output_dtypes"] == ["float32"]
