"""Delta statistics against numpy in fp64, independent of the block size."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.deltas import delta_cosines, delta_statistics, ulp_distance
from components.errors import CheckpointError
from tests.components.checkpoints.tiny import MemorySource


def _pair(dtype: torch.dtype, other: torch.dtype, seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    a = {n: torch.randn(shape, generator=generator).to(dtype) for n, shape in (("x", (5, 9)), ("y", (31,)))}
    f = {n: (t.float() + 0.02 * torch.randn(t.shape, generator=generator)).to(other) for n, t in a.items()}
    f["x"][0] = a["x"][0].to(other)
    return a, f


def _numpy(t: torch.Tensor) -> np.ndarray:
    return t.float().numpy().astype(np.float64).reshape(-1)


@pytest.mark.parametrize("block", [1, 7, 1000])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)])
def test_against_numpy(block: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    a, f = _pair(*dtypes, seed=0)
    report = delta_statistics(MemorySource(a), MemorySource(f), block=block)
    arrays = {n: (_numpy(a[n]), (f[n].float() - a[n].float()).numpy().astype(np.float64).reshape(-1)) for n in a}
    arrays["overall"] = tuple(np.concatenate([arrays[n][i] for n in ("x", "y")]) for i in (0, 1))  # type: ignore[assignment]
    for name, (base, delta) in arrays.items():
        got = report.overall if name == "overall" else report.tensors[name]
        assert got.numel == delta.size
        assert got.norm == pytest.approx(np.linalg.norm(delta), rel=1e-12)
        assert got.relative_norm == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(base), rel=1e-12)
        assert got.zeros == np.mean(delta == 0)
        assert got.max_abs == np.abs(delta).max()
        assert got.one_ulp is None
    assert report.tensors["x"].zeros == 9 / 45


def test_zero_delta_and_zero_base() -> None:
    a = {"same": torch.ones(4), "from_zero": torch.zeros(4), "nothing": torch.zeros(4)}
    f = {"same": torch.ones(4), "from_zero": torch.ones(4), "nothing": torch.zeros(4)}
    report = delta_statistics(MemorySource(a), MemorySource(f))
    assert report.tensors["same"].relative_norm == 0 == report.tensors["nothing"].relative_norm
    assert report.tensors["from_zero"].relative_norm == math.inf
    assert report.tensors["same"].zeros == 1
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["tensors"]["from_zero"]["relative_norm"] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_ulp_share(dtype: torch.dtype) -> None:
    a = torch.tensor([1.0, 1.0, -1.0, 2.0, 0.0, 0.5, 3.0], dtype=dtype)
    f = a.clone()
    up = torch.finfo(dtype).eps
    f[0] = 1 + up  # one
    f[1] = 1 + 2 * up  # two
    f[2] = -1 - up  # one, away from zero
    f[3] = 2 - up  # one, across the exponent
    f[4] = -0.0  # no change in value
    f[5] = 0.25  # far
    report = delta_statistics(MemorySource({"w": a}), MemorySource({"w": f}))
    assert report.tensors["w"].one_ulp == report.overall.one_ulp == 3 / 5
    assert report.tensors["w"].zeros == 2 / 7
    assert ulp_distance(a, f).tolist()[:5] == [1, 2, 1, 1, 0]


@settings(max_examples=100, deadline=None)
@given(st.integers(-0x7F80, 0x7F80), st.integers(-0x7F80, 0x7F80))
def test_ulp_distance_counts_the_numbers_between(i: int, j: int) -> None:
    def number(k: int) -> torch.Tensor:
        """The k-th bf16 number from zero (finite ones and infinity)."""
        bits = torch.tensor([abs(k)], dtype=torch.int16).view(torch.bfloat16)
        return -bits if k < 0 else bits

    assert ulp_distance(number(i), number(j)).item() == abs(i - j)


@pytest.mark.parametrize("block", [3, 10_000])
def test_cosines_against_numpy(block: int) -> None:
    a, f = _pair(torch.bfloat16, torch.bfloat16, seed=0)
    _, g = _pair(torch.bfloat16, torch.float32, seed=1)
    opposite = {n: (2 * a[n].float() - f[n].float()) for n in a}
    sources = {"f": f, "g": g, "minus": opposite, "none": a}
    found = delta_cosines(MemorySource(a), {n: MemorySource(t) for n, t in sources.items()}, block=block)

    def cosine(first: str, second: str, names: list[str]) -> float:
        one, two = (
            np.concatenate(
                [(sources[s][n].float() - a[n].float()).numpy().astype(np.float64).reshape(-1) for n in names]
            )
            for s in (first, second)
        )
        return float(one @ two / np.linalg.norm(one) / np.linalg.norm(two))

    for first in ("f", "g", "minus"):
        for second in ("f", "g", "minus"):
            assert found.overall[first][second] == pytest.approx(cosine(first, second, ["x", "y"]), abs=1e-12)
            for name in ("x", "y"):
                assert found.tensors[name][first][second] == pytest.approx(cosine(first, second, [name]), abs=1e-12)
    assert found.overall["f"]["minus"] == pytest.approx(-1, abs=1e-6)
    assert math.isnan(found.overall["f"]["none"])
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["overall"]["f"]["none"] is None


def test_misfits_of_all_finetunes_are_listed() -> None:
    a = MemorySource({"x": torch.zeros(3), "y": torch.zeros(2)})
    one = MemorySource({"x": torch.zeros(4), "y": torch.zeros(2)})
    two = MemorySource({"x": torch.zeros(3)})
    with pytest.raises(CheckpointError) as caught:
        delta_cosines(a, {"one": one, "two": two})
    assert "one: x is [4], not [3]" in str(caught.value)
    assert "two: tensor y is missing" in str(caught.value)


def test_progress_names_every_tensor() -> None:
    a, f = _pair(torch.float32, torch.float32, seed=0)
    seen: list[dict[str, object]] = []
    delta_statistics(MemorySource(a), MemorySource(f), progress=seen.append)
    assert seen == [{"tensor": "x", "done": 1, "total": 2}, {"tensor": "y", "done": 2, "total": 2}]
