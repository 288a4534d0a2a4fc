"""The mask on disk: both forms, slices in any order, statistics, errors."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from components.errors import CheckpointError, StorageError
from components.masks.artifact import MaskArtifact, write_artifact
from components.masks.settings import MaskSettings
from components.storage import storage_errors

SHAPES = {"b.weight": (37, 11), "a.bias": (5,), "c.scalar": ()}


def masks() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(torch.Size(s).numel(), generator=generator) * 3 for n, s in SHAPES.items()}


def write(path: Path, storage: Any, cuts: tuple[int, ...] = (), **options: Any) -> MaskArtifact:
    shards = []
    for name, logits in masks().items():
        borders = [0, *[c for c in cuts if c < logits.numel()], logits.numel()]
        shards += [(name, a, b, logits[a:b]) for a, b in pairwise(borders)]
    settings = MaskSettings(storage=storage)
    write_artifact(path, shapes=SHAPES, shards=shards[::-1], settings=settings, **options)
    return MaskArtifact.open(path)


@pytest.mark.parametrize("storage", ["logits", "bits"])
def test_what_is_written_is_read_by_any_slice(tmp_path: Path, storage: str) -> None:
    mask = write(tmp_path, storage, unmasked={"frozen": 6})
    assert mask.names() == ["a.bias", "b.weight", "c.scalar", "frozen"]
    for name, logits in masks().items():
        stored = logits.bfloat16().float()
        for start, stop in ((0, None), (0, 1), (1, 4), (3, logits.numel()), (0, logits.numel())):
            if start >= logits.numel() or (stop or 0) > logits.numel():
                continue
            expected = stored[start:stop]
            assert torch.equal(mask.binary(name, start, stop), expected > 0)
            if storage == "logits":
                assert torch.equal(mask.logits(name, start, stop), expected)
                assert torch.equal(mask.soft(name, start, stop), torch.sigmoid(expected))
        assert mask.density(name) == (stored > 0).double().mean().item()
        assert mask.soft_mean(name) == pytest.approx(torch.sigmoid(stored).mean().item(), rel=1e-6)
        assert mask.numel(name) == logits.numel()
    assert mask.soft("frozen", 2, 5).tolist() == [1.0] * 3
    assert mask.binary("frozen").tolist() == [True] * 6
    assert (mask.density("frozen"), mask.soft_mean("frozen")) == (1.0, 1.0)
    assert not mask.is_masked("frozen")
    assert mask.is_masked("a.bias")


@pytest.mark.parametrize("granularity", ["element", "row", "tensor"])
def test_other_thresholds_and_temperatures_are_counted_over_the_whole_tensor(tmp_path: Path, granularity: Any) -> None:
    settings = MaskSettings(granularity=granularity)
    logits = {n: masks()[n][: torch.Size(shape).numel() // settings.unit(shape)] for n, shape in SHAPES.items()}
    shards = [(name, 0, values.numel(), values) for name, values in logits.items()]
    write_artifact(tmp_path, shapes=SHAPES, shards=shards, settings=settings, unmasked={"frozen": 6})
    mask = MaskArtifact.open(tmp_path)
    for name, shape in SHAPES.items():
        every = logits[name].bfloat16().double().repeat_interleave(settings.unit(shape))
        for threshold in (-1.0, 0.0, 0.7):
            assert torch.equal(mask.binary(name, threshold=threshold), every > threshold)
            assert mask.density(name, threshold=threshold) == pytest.approx((every > threshold).double().mean().item())
        for temperature in (0.3, 1.0, 5.0):
            want = 1 / (1 + torch.exp(-every / temperature))
            assert mask.soft(name, temperature=temperature).double().tolist() == pytest.approx(want.tolist(), abs=1e-6)
            assert mask.soft_mean(name, temperature=temperature) == pytest.approx(want.mean().item(), abs=1e-6)
    assert mask.soft("frozen", 2, 5, temperature=9.0).tolist() == [1.0] * 3
    assert mask.binary("frozen", threshold=9.0).tolist() == [True] * 6
    assert (mask.density("frozen", threshold=9.0), mask.soft_mean("frozen", temperature=9.0)) == (1.0, 1.0)


def test_what_is_counted_later_is_what_is_counted_while_writing(tmp_path: Path) -> None:
    mask = write(tmp_path, "logits")
    for name in SHAPES:
        assert mask._counted(name) == (mask.density(name), mask.soft_mean(name))


def test_bits_know_one_threshold(tmp_path: Path) -> None:
    mask = write(tmp_path, "bits")
    for ask in (mask.binary, mask.density):
        with pytest.raises(CheckpointError, match="keeps bits only"):
            ask("a.bias", threshold=0.5)


@pytest.mark.parametrize("storage", ["logits", "bits"])
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_shared_logits_are_read_by_element(tmp_path: Path, storage: Any, granularity: Any) -> None:
    settings = MaskSettings(storage=storage, granularity=granularity)
    logits = {n: masks()[n][: torch.Size(shape).numel() // settings.unit(shape)] for n, shape in SHAPES.items()}
    shards = [(name, 0, values.numel(), values) for name, values in logits.items()]
    write_artifact(tmp_path, shapes=SHAPES, shards=shards, settings=settings)
    mask = MaskArtifact.open(tmp_path)
    kept = 0
    for name, shape in SHAPES.items():
        every = logits[name].bfloat16().float().repeat_interleave(settings.unit(shape))
        assert mask.numel(name) == every.numel() == torch.Size(shape).numel()
        for start, stop in ((0, every.numel()), (0, 1), (3, 40), (11, 22), (300, 407)):
            if stop <= every.numel():
                assert torch.equal(mask.binary(name, start, stop), every[start:stop] > 0)
                if storage == "logits":
                    assert torch.equal(mask.soft(name, start, stop), torch.sigmoid(every[start:stop]))
        assert mask.density(name) == pytest.approx((every > 0).double().mean().item())
        assert mask.soft_mean(name) == pytest.approx(torch.sigmoid(every).mean().item(), rel=1e-6)
        kept += int((every > 0).sum())
    assert mask.metadata["density"] == pytest.approx(kept / mask.metadata["elements"])
    assert mask.metadata["elements"] == 413


@pytest.mark.parametrize("storage", ["logits", "bits"])
def test_the_bytes_do_not_depend_on_how_the_mask_was_sharded(tmp_path: Path, storage: str) -> None:
    write(tmp_path / "whole", storage)
    write(tmp_path / "cut", storage, cuts=(1, 3, 100, 101, 250))
    for file in ("mask.safetensors", "mask.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()


def test_the_file_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    mask = write(tmp_path, "logits", statistics={"a.bias": {"delta_zero_share": 0.25}}, extra={"note": 1})
    tensors = load_file(tmp_path / "mask.safetensors")
    assert {n: tuple(t.shape) for n, t in tensors.items()} == SHAPES
    assert torch.equal(tensors["b.weight"].reshape(-1), masks()["b.weight"].bfloat16())
    about = json.loads((tmp_path / "mask.json").read_text())
    assert about["settings_fingerprint"] == mask.settings.fingerprint()
    assert about["tensors"]["a.bias"]["delta_zero_share"] == 0.25
    assert about["note"] == 1
    every = torch.cat(list(masks().values())).bfloat16().float()
    assert about["density"] == (every > 0).double().mean().item()
    assert about["soft_mean"] == pytest.approx(torch.sigmoid(every).mean().item(), rel=1e-6)


def test_bits_are_small_and_have_no_soft_form(tmp_path: Path) -> None:
    mask = write(tmp_path, "bits")
    tensors = load_file(tmp_path / "mask.safetensors")
    assert {n: t.numel() for n, t in tensors.items()} == {"a.bias": 1, "b.weight": 51, "c.scalar": 1}
    with pytest.raises(CheckpointError, match="keeps bits only"):
        mask.soft("a.bias")
    with pytest.raises(CheckpointError, match=r"no tensor 'x'; it has a\.bias"):
        mask.binary("x")


@pytest.mark.parametrize("granularity", ["element", "row", "tensor"])
def test_a_tensor_without_elements_has_no_density(tmp_path: Path, granularity: Any) -> None:
    settings = MaskSettings(granularity=granularity)
    shards = [("b", 0, 1, torch.ones(1)), ("a", 0, 0, torch.ones(0))]
    write_artifact(tmp_path, shapes={"a": (0, 4), "b": (1, 1)}, shards=shards, settings=settings)
    mask = MaskArtifact.open(tmp_path)
    assert (mask.density("a"), mask.density("b"), mask.metadata["density"]) == (0.0, 1.0, 1.0)
    assert mask.soft("a", 0, 0).numel() == 0


def test_shards_that_do_not_cover_are_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"do not cover a\.bias"):
        write_artifact(
            tmp_path, shapes={"a.bias": (5,)}, shards=[("a.bias", 0, 4, torch.ones(4))], settings=MaskSettings()
        )


def test_broken_artifacts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a mask artifact"):
        MaskArtifact.open(tmp_path)
    write(tmp_path, "logits")
    good = (tmp_path / "mask.safetensors").read_bytes()
    (tmp_path / "mask.safetensors").write_bytes(good[:-1])
    with pytest.raises(CheckpointError, match=r"mask\.safetensors: truncated"):
        MaskArtifact.open(tmp_path)
    (tmp_path / "mask.safetensors").write_bytes(good)
    about = json.loads((tmp_path / "mask.json").read_text())
    for change, message in (
        ({"settings_fingerprint": "0"}, "of different masks"),
        ({"format": "other"}, "not a mask of format"),
    ):
        (tmp_path / "mask.json").write_text(json.dumps(about | change))
        with pytest.raises(CheckpointError, match=message):
            MaskArtifact.open(tmp_path)


NEEDS_RESERVATION = pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve space")
BIG = {"a.weight": (1 << 20,)}


@NEEDS_RESERVATION
def test_the_whole_file_has_its_space_before_the_first_slice(tmp_path: Path) -> None:
    with (tmp_path / "reserved").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 2 << 20)
    needed = (tmp_path / "reserved").stat().st_blocks
    assert needed > 0

    def shards() -> Iterator[tuple[str, int, int, torch.Tensor]]:
        assert (tmp_path / "mask.safetensors").stat().st_blocks >= needed
        yield "a.weight", 0, 1 << 20, torch.ones(1 << 20)

    write_artifact(tmp_path, shapes=BIG, shards=shards(), settings=MaskSettings())


@NEEDS_RESERVATION
def test_a_full_disk_is_an_error_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="No space left on device; free some space"), storage_errors(tmp_path):
        write(tmp_path, "logits")


WRITE = """
import sys, torch
from pathlib import Path
from components.masks.artifact import write_artifact
from components.masks.settings import MaskSettings
try:
    write_artifact(Path(sys.argv[1]), shapes={"a.weight": (1 << 20,)}, settings=MaskSettings(),
                   shards=[("a.weight", 0, 1 << 20, torch.ones(1 << 20))])
except OSError as error:
    print(error.strerror)
"""


@NEEDS_RESERVATION
def test_a_really_full_disk_does_not_kill_the_process(tmp_path: Path) -> None:
    mounted = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    script = 'mount -t tmpfs -o size=1m none "$0" && exec "$@"'
    try:
        subprocess.run([*mounted, script, str(tmp_path), "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system does not let its users mount a small disk of their own")
    command = [*mounted, script, str(tmp_path), sys.executable, "-c", WRITE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "No space left on device\n"), done.stderr
