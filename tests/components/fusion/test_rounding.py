"""Stochastic rounding: the mean, the two neighbours, what stays exact, and that no slice sees other coins."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.fusion.rounding import to_bf16_stochastic
from tests.components.checkpoints.tiny import same_bits

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
LARGEST = torch.finfo(torch.bfloat16).max


def neighbours(value: float) -> tuple[float, float]:
    """The bf16 at or next to `value` towards zero, and the next one away from zero, by integer arithmetic on its bits."""
    bits = int(np.array(value, np.float32).view(np.uint32))
    below = bits & 0xFFFF0000
    above = below if bits == below else min(below + 0x10000, (below & 0x80000000) | 0x7F7F0000)
    low, high = (float(np.array(b, np.uint32).view(np.float32)) for b in (below, above))
    return low, high


@given(st.lists(FINITE, min_size=1, max_size=200), st.integers(0, 2**31), st.integers(0, 200_000))
@settings(max_examples=150, deadline=None)
def test_every_value_becomes_one_of_its_two_neighbours(values: list[float], seed: int, start: int) -> None:
    rounded = to_bf16_stochastic(torch.tensor(values), seed=seed, name="w", start=start)
    assert rounded.dtype == torch.bfloat16
    for value, found in zip(values, rounded.float().tolist(), strict=True):
        assert found in neighbours(value)
        assert math.copysign(1, found) == math.copysign(1, value)


@pytest.mark.parametrize("value", [1.001, -3.3333333, 1e-40, 7e-41, -1.2345e30, 0.99999994, 65504.123])
def test_the_mean_over_seeds_and_positions_is_the_value(value: float) -> None:
    """Within five standard deviations of what many tosses of the loaded coin give, over places and over seeds."""
    exact = float(np.float32(value))
    low, high = neighbours(exact)
    chance = float((Fraction(exact) - Fraction(low)) / (Fraction(high) - Fraction(low)))
    count = 200_000
    allowed = 5 * math.sqrt(chance * (1 - chance) / count) + 1e-9
    places = to_bf16_stochastic(torch.full((count,), exact), seed=7, name="w", start=1).float()
    assert float((places == high).double().mean()) == pytest.approx(chance, abs=allowed)
    few = torch.full((100,), exact)
    tossed = torch.cat([to_bf16_stochastic(few, seed=s, name="w", start=70_001) for s in range(300)])
    allowed = 5 * math.sqrt(chance * (1 - chance) / tossed.numel()) + 1e-9
    assert float((tossed.float() == high).double().mean()) == pytest.approx(chance, abs=allowed)


def test_what_bf16_holds_stays_bit_for_bit() -> None:
    """Every one of its 65,536 patterns; a NaN stays a NaN."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for seed in (0, 1):
        rounded = to_bf16_stochastic(every.float(), seed=seed, name="w", start=3)
        number = ~torch.isnan(every)
        assert same_bits(rounded[number], every[number])
        assert bool(torch.isnan(rounded[~number]).all())


def test_no_finite_value_becomes_infinite_and_no_nan_a_number() -> None:
    huge = torch.finfo(torch.float32).max
    odd_nan = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    values = torch.cat([torch.tensor([huge, -huge, math.inf, -math.inf, 3.39e38]), torch.from_numpy(odd_nan)])
    for seed in range(50):
        found = to_bf16_stochastic(values, seed=seed, name="w", start=0).float().tolist()
        assert found[:4] == [LARGEST, -LARGEST, math.inf, -math.inf]
        assert found[4] in neighbours(3.39e38)
        assert all(math.isnan(v) for v in found[5:])


@given(st.integers(0, 300_000), st.lists(st.integers(1, 90_000), min_size=1, max_size=4))
@settings(max_examples=25, deadline=None)
def test_a_slice_has_the_bits_of_the_whole(start: int, sizes: list[int]) -> None:
    values = torch.linspace(-1, 1, sum(sizes))
    whole = to_bf16_stochastic(values, seed=5, name="w", start=start)
    parts, at = [], 0
    for size in sizes:
        parts.append(to_bf16_stochastic(values[at : at + size], seed=5, name="w", start=start + at))
        at += size
    assert same_bits(torch.cat(parts), whole)


def test_seed_name_and_place_each_toss_other_coins() -> None:
    values = torch.full((100_000,), 1 + 2.0**-8)  # half way
    base = to_bf16_stochastic(values, seed=0, name="a", start=0)
    for other in ({"seed": 1}, {"name": "b"}, {"start": 1}, {"start": 131_072}):
        again = to_bf16_stochastic(values, **{"seed": 0, "name": "a", "start": 0, **other})  # type: ignore[arg-type]
        assert float((again == base).double().mean()) == pytest.approx(0.5, abs=0.01)
    # neighbours that share a word are as independent as any
    pairs = Counter(map(tuple, base.float().view(-1, 2).tolist()))
    assert all(count == pytest.approx(12_500, abs=600) for count in pairs.values())
    assert len(pairs) == 4


def test_nothing_in_is_nothing_out() -> None:
    assert to_bf16_stochastic(torch.empty(0), seed=0, name="w", start=5).shape == (0,)
