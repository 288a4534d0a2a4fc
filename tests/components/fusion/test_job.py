"""A fusion as a whole: the bytes do not depend on who writes them, nothing half made has the model's name, a rerun goes on."""

from __future__ import annotations

import json
import os
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
from components.errors import CheckpointError, StorageError
from components.fusion.job import fuse
from components.fusion.recipe import Recipe, settings_of
from tests.components.checkpoints.test_adapters import make_adapter
from tests.components.checkpoints.tiny import llama, perturbed, save, save_tokenizer


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
    time.sleep(0.01)
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
    for lines in (2, 10, 25):
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
def test_two_at_once_are_refused(family: Path, tmp_path: Path) -> None:
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
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match="GB left, the model needs"):
        fuse(recipe(family), tmp_path / "out")
    assert not list(tmp_path.rglob("*.safetensors"))
