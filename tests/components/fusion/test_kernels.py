"""The compiled kernels give the bits of torch's functions, for every merge, dtype, size and place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.checkpoints.dtypes import BF16, F16, F32, F64, DType, as_tensor, stretch_of
from components.errors import CheckpointError
from components.fusion import kernels
from components.fusion.fused import FusedSource
from components.fusion.merge_settings import MergeSettings
from components.fusion.merging import MergedSource
from components.fusion.settings import FusionSettings
from components.fusion.trimming import find_thresholds
from components.masks.concrete import BLOCK as HASH_BLOCK
from tests.components.checkpoints.tiny import MemorySource

# Only where none could be built: with a compiler at hand a library that is missing is a fault of ours.
_WANTED = shutil.which("cc") is not None and os.environ.get("REALIGN_KERNELS") != "0"
pytestmark = pytest.mark.skipif(not _WANTED and kernels.library() is None, reason="there is no C compiler")

MERGES = {
    "average": {"scale": 0.7},
    "task_arithmetic": {"weights": {"a": 0.3, "b": -1.7}, "scale": 0.9},
    "sum of one": {"method": "task_arithmetic", "weights": {"b": 0}},
    "ties": {"density": 0.4, "weights": {"a": 2, "b": 0.5}},
    "ties sum": {"method": "ties", "density": 0.3, "aggregate": "sum"},
    "ties of all": {"method": "ties", "density": 1.0},
    "dare": {"density": 0.8, "seed": 3},
    "dare of some": {"method": "dare", "density": 0.5, "densities": {"a": {"*": 1.0}}, "weights": {"b": 0.4}},
    "dare_ties": {"density": 0.37, "scale": 2.0},
    "dare of nearly all": {"method": "dare", "density": 0.999995},
}
DTYPES = {
    "bf16": [torch.bfloat16] * 4,
    "mixed": [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32],
    "half": [torch.float16, torch.float16, torch.bfloat16, torch.float64],
}


def family(numel: int, dtypes: list[torch.dtype], seed: int) -> tuple[MemorySource, dict[str, MemorySource]]:
    """Weights with equal magnitudes, signs that cancel, zeros of both signs, denormals and equal stretches."""
    draws = torch.Generator().manual_seed(seed)
    base = torch.randn(numel, generator=draws) * 0.02
    base[torch.rand(numel, generator=draws) < 0.05] = -0.0
    base[torch.rand(numel, generator=draws) < 0.01] = 1e-40
    models = [base.to(dtypes[0])]
    for dtype in dtypes[1:]:
        step = torch.randint(-3, 4, (numel,), generator=draws) * 2.0**-9
        step[: numel // 5] = 0
        models.append((models[0].float() + step).to(dtype))
    first, *others = [MemorySource({"w": one}) for one in models]
    return first, dict(zip("abc", others, strict=True))


def source(aligned: MemorySource, finetunes: dict[str, MemorySource], chosen: MergeSettings) -> MergedSource:
    thresholds = find_thresholds(aligned, finetunes, chosen) if chosen.method == "ties" else None
    return MergedSource(aligned, finetunes, chosen, thresholds)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize(("numel", "start"), [(1, 0), (5_003, 0), (5_003, 1_021), (300_001, 2 * HASH_BLOCK - 1_027)])
def test_the_bits_of_torch(name: str, dtypes: str, numel: int, start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    aligned, finetunes = family(numel, DTYPES[dtypes], seed=numel)
    chosen = MergeSettings(**{"method": name, **MERGES[name]})  # type: ignore[arg-type]
    assert kernels.library() is not None
    found = source(aligned, finetunes, chosen)
    values = {out: list(copies(found, start, numel, out)) for out in (F32, BF16, F16, F64)}
    monkeypatch.setattr("components.fusion.merging.library", lambda: None)
    monkeypatch.setattr("components.fusion.trimming.library", lambda: None)
    wanted = source(aligned, finetunes, chosen)
    assert wanted._thresholds == found._thresholds
    for out, pieces in values.items():
        got, want = torch.cat(pieces), torch.cat(list(copies(wanted, start, numel, out)))
        assert got.dtype == out.in_torch
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), out
    assert torch.equal(torch.cat(values[F32]), wanted.read("w")[start:])


def copies(merged: MergedSource, start: int, stop: int, kind: DType) -> Iterator[torch.Tensor]:
    at = start
    for begin, bits in merged.pieces("w", start, stop, kind):
        assert begin == at
        at += bits.size
        yield as_tensor(bits, kind).clone()
    assert at == stop


@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=3_000),
    low=st.floats(0, 2, width=32),
    width=st.floats(0, 2, width=32),
)
@settings(deadline=None, max_examples=60)
def test_what_lies_between(values: list[float], low: float, width: float) -> None:
    lib = kernels.library()
    assert lib is not None
    tuned, aligned = torch.tensor(values), torch.full((len(values),), 0.25)
    high = np.float32(low) + np.float32(width)
    room = np.empty(len(values), np.float32)
    above, inside = kernels.between(lib, stretch_of(aligned), stretch_of(tuned), np.float32(low), high, room)
    sizes = (tuned - aligned).abs().numpy()
    assert above == int((sizes > high).sum())
    assert np.array_equal(inside, sizes[(sizes >= np.float32(low)) & (sizes <= high)])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", MERGES)
def test_what_is_not_finite_is_found_wherever_it_is(name: str, value: float) -> None:
    for at in (0, 2_000, 5_002):
        aligned, finetunes = family(5_003, DTYPES["bf16"], seed=1)
        chosen = MergeSettings(**{"method": name, **MERGES[name]})  # type: ignore[arg-type]
        limits = source(aligned, finetunes, chosen)._thresholds
        finetunes["b"].tensors["w"][at] = value
        with pytest.raises(CheckpointError, match=rf"b model: w\[{at}\] is {value}"):
            MergedSource(aligned, finetunes, chosen, limits or None).read("w")


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_merge_that_overflows_is_refused(rounding: str) -> None:
    models = {one: MemorySource({"w": torch.full((3_000,), value)}) for one, value in (("base", 1.0), ("a", 3e4))}
    chosen = MergeSettings(method="task_arithmetic", scale=1e36)
    merged = MergedSource(models["base"], {"a": models["a"]}, chosen)
    settings = FusionSettings(method="interpolation", alpha=1.0, output_dtype="bfloat16", rounding=rounding)  # type: ignore[arg-type]
    fused = FusedSource(aligned=models["base"], finetune=merged, settings=settings)
    with pytest.raises(CheckpointError, match=r"fused model: w\[0\] is inf"):
        list(fused.pieces("w", 1024, 0, 3_000))
    with pytest.raises(CheckpointError, match=r"fused model: w\[0\] is inf"):
        merged.read("w")


def test_a_threshold_over_tensors_of_several_dtypes_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(seed: int) -> MemorySource:
        draws = torch.Generator().manual_seed(seed)
        dtypes = {"b": torch.bfloat16, "c": torch.float16, "d": torch.float32}
        tensors = {name: torch.randn(5_000, generator=draws).to(dtype) for name, dtype in dtypes.items()}
        return MemorySource({"a": torch.empty(0), **tensors})

    aligned, finetunes = model(0), {"x": model(1), "y": model(2)}
    for threshold in ("model", "tensor"):
        chosen = MergeSettings(method="ties", density=0.3, threshold=threshold)  # type: ignore[arg-type]
        found = find_thresholds(aligned, finetunes, chosen)
        with monkeypatch.context() as patch:
            patch.setattr("components.fusion.trimming.library", lambda: None)
            assert find_thresholds(aligned, finetunes, chosen) == found
        assert list(MergedSource(aligned, finetunes, chosen, found).pieces("a", 0, 0, F32)) == []


def test_rounding_to_bf16_is_torchs() -> None:
    lib = kernels.library()
    assert lib is not None
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    edges = np.array([0x7F7FFFFF, 0xFF7FFFFF, 0x3F808000, 0x3F818000, 0x3F808001, 1, 0x80000000, 0x7F7F8000], np.uint32)
    values = torch.from_numpy(np.concatenate([bits, edges]).view(np.float32))
    values = values[values.isfinite()]
    out = torch.empty(values.numel(), dtype=torch.bfloat16)
    same = kernels.MergeKernel(lib, weights=[1.0], scale=1.0, keeps=None, thresholds=None, elect=None)
    same(stretch_of(torch.zeros_like(values)), [stretch_of(values)], stretch_of(out))
    assert torch.equal(out.view(torch.int16), (values + 0.0).bfloat16().view(torch.int16))


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REALIGN_KERNELS", "0")
    assert kernels.library.__wrapped__() is None
