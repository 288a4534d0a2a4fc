from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from scipy import stats

from components.landscape.directions import LEVELS, UNIT, gaussian, gaussian_into, levels
from tests.components.landscape.support import noise, quantiles


def test_levels_are_the_quantiles_of_an_independent_gaussian() -> None:
    found = levels().numpy()
    # 16 bits that are a negative number's stand behind the others.
    assert np.array_equal(np.roll(found, LEVELS // 2), quantiles())
    assert hashlib.sha256(found.astype("<i4").tobytes()).hexdigest()[:16] == "7f94cca8d8fcea88"
    assert found.sum() == 0
    assert found.max() == 4_535_006
    assert (found.astype(np.float64) / UNIT).var() == pytest.approx(1, abs=1e-4)


def test_golden_values() -> None:
    found = gaussian(seed=0, stream=0, name="w", start=0, stop=131_076)
    assert found[:8].tolist() == [798907, -422942, 857533, -335236, 726583, -2034996, 770832, -675675]
    assert found[-6:].tolist() == [3950, -830089, 1245751, -1121472, 1151270, -90813]


def test_equals_a_slow_reading_of_the_hash() -> None:
    assert np.array_equal(
        gaussian(seed=7, stream=1, name="a.b", start=0, stop=300_001).numpy(), noise(7, 1, "a.b", 300_001)
    )


def test_any_slice_is_the_whole() -> None:
    whole = gaussian(seed=3, stream=1, name="layer.weight", start=0, stop=400_000)
    for start, stop in (
        (0, 1),
        (1, 2),
        (5, 5),
        (7, 131_075),
        (131_071, 131_073),
        (131_072, 262_144),
        (99_999, 400_000),
    ):
        assert torch.equal(gaussian(seed=3, stream=1, name="layer.weight", start=start, stop=stop), whole[start:stop])


@pytest.mark.gpu
def test_a_gpu_makes_the_same_bits() -> None:
    here, there = (gaussian(seed=3, stream=0, name="w", start=77, stop=400_001, device=d) for d in ("cpu", "cuda"))
    assert torch.equal(here, there.cpu())


def test_fp64_holds_the_same_integers() -> None:
    out, room = torch.empty(9_999, dtype=torch.float64), torch.empty(9_999, dtype=torch.int32)
    found = gaussian_into(out, room, seed=1, stream=0, name="w", start=123)
    assert found is out
    assert torch.equal(found.int(), gaussian(seed=1, stream=0, name="w", start=123, stop=123 + 9_999))


def test_is_gaussian() -> None:
    """2²² of one tensor: each statistic within four of its standard errors, Kolmogorov and Smirnov's at the 1e-4 level."""
    count = 1 << 22
    g = gaussian(seed=5, stream=0, name="model.layers.0.mlp.up_proj.weight", start=0, stop=count).numpy() / UNIT
    assert abs(g.mean()) < 4 / np.sqrt(count)
    assert abs(g.var() - 1) < 4 * np.sqrt(2 / count)
    assert abs(stats.skew(g)) < 4 * np.sqrt(6 / count)
    assert abs(stats.kurtosis(g)) < 4 * np.sqrt(24 / count)
    assert stats.kstest(g, stats.norm.cdf).pvalue > 1e-4
    for lag in (1, 2, 65_536, 131_072):  # neighbours in a word, in the hash, and across its keys
        assert abs(np.mean(g[lag:] * g[:-lag])) < 4 / np.sqrt(count - lag)


@pytest.mark.parametrize("other", [{"seed": 6}, {"stream": 1}, {"name": "model.layers.1.mlp.up_proj.weight"}])
def test_another_seed_stream_or_tensor_is_independent(other: dict[str, object]) -> None:
    count = 1 << 20
    key = {"seed": 5, "stream": 0, "name": "model.layers.0.mlp.up_proj.weight"}
    one, two = (gaussian(**k, start=0, stop=count).numpy() / UNIT for k in (key, {**key, **other}))  # type: ignore[arg-type]
    for a, b in ((one, two), (one**2 - 1, two**2 - 1)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(count)
    assert np.mean(one == two) < 1e-4
