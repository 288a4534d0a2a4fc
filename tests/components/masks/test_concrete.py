"""Noise: its bits, slices and statistics. Mask functions: closed forms."""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from scipy import stats

from components.masks.concrete import (
    BLOCK,
    binary_mask,
    coefficient,
    concrete_sample,
    interpolate_into,
    logistic_noise,
    logit_gradient,
    mask_uniforms,
    sample_slope,
    soft_mask,
)

MASK32 = (1 << 32) - 1


def slow_word(seed: int, name: str, step: int, position: int) -> int:
    """lowbias32 of the position, then of its result with one key xored in before the first multiplication (and no first
    shift) and one added after it; in Python integers."""
    block, at = divmod(position, BLOCK)
    digest = hashlib.blake2b(f"{seed}\0{name}\0{step}\0{block}".encode(), digest_size=8).digest()
    first, second = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    x = at ^ (at >> 16)
    for key, add in ((0, 0), (first, second)):
        x = ((x ^ key) * 0x7FEB352D + add) & MASK32
        x ^= x >> 15
        x = (x * 0x846CA68B) & MASK32
        x ^= x >> 16
    return x


@pytest.mark.parametrize("position", [0, 1, 2, 77, BLOCK - 1, BLOCK, 3 * BLOCK + 12345])
def test_uniforms_are_the_hash_of_their_position(position: int) -> None:
    word = slow_word(5, "layer.weight", 9, position)
    halves = [(word & 0xFFFF), (word >> 16)]
    expected_pair = [((h - 65536 if h >> 15 else h) + 0.5) / 2**16 + 0.5 for h in halves]
    pair = mask_uniforms(seed=5, step=9, segments=[("layer.weight", 2 * position, 2 * position + 2)])
    assert pair.tolist() == expected_pair


def one_tensor(draw: Any) -> Any:
    """A drawing over segments, of one tensor's slice."""
    return lambda *, seed, name, step, start, stop: draw(seed=seed, step=step, segments=[(name, start, stop)])


DRAWS = {"mask": one_tensor(mask_uniforms), "logistic": one_tensor(logistic_noise)}


@pytest.mark.parametrize("kind", DRAWS)
def test_any_slice_has_the_bits_of_the_whole(kind: str) -> None:
    draw, n = DRAWS[kind], 3 * BLOCK + 101
    whole = draw(seed=1, name="w", step=4, start=0, stop=n)
    assert whole.shape == (n,)
    assert whole.dtype == torch.float32
    cuts = [0, 1, 2, 17, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 3, 2 * BLOCK + 5, 3 * BLOCK + 100, n]
    for start, stop in pairwise(cuts):
        part = draw(seed=1, name="w", step=4, start=start, stop=stop)
        if (
            kind == "logistic"
        ):  # the bits under the logarithm are equal, its rounding may depend on the place in a vector
            torch.testing.assert_close(part, whole[start:stop], rtol=3e-7, atol=1e-7)
        else:
            assert torch.equal(part, whole[start:stop])
    assert draw(seed=1, name="w", step=4, start=7, stop=7).numel() == 0


def test_segments_drawn_together_have_the_bits_of_each_alone() -> None:
    segments = [("a", 0, 10), ("b", 3, 8), ("c", 5, 6), ("a", 7, 7), ("d", 2 * BLOCK - 4, 2 * BLOCK + 5), ("a", 1, 2)]
    together = mask_uniforms(seed=2, step=1, segments=segments)
    alone = [mask_uniforms(seed=2, step=1, segments=[segment]) for segment in segments]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(alone[5], alone[0][1:2])


def test_uniforms_are_uniform_open_and_symmetric() -> None:
    n = 1_500_000
    u = mask_uniforms(seed=3, step=0, segments=[("model.embed", 0, n)])
    assert 0 < u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    counts = torch.histc(u, bins=1024, min=0, max=1)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert u.mean(dtype=torch.float64).item() == pytest.approx(0.5, abs=4 / math.sqrt(12 * n))
    # Serial correlation at several lags, 1 (positions in one word) among them: |r| < 4.5/√n.
    centred = u.double() - 0.5
    for lag in (1, 2, 3, 64, 1000, BLOCK, 2 * BLOCK):
        r = (centred[:-lag] * centred[lag:]).mean() * 12
        assert abs(r) < 4.5 / math.sqrt(n - lag), lag
    # Pairs fill the square: a 32 × 32 table of neighbours.
    cells = (u[0::2] * 32).long() * 32 + (u[1::2] * 32).long()
    assert stats.chisquare(torch.bincount(cells, minlength=1024).numpy()).pvalue > 1e-3


def test_streams_of_other_seeds_names_and_steps_are_independent() -> None:
    n = 400_000
    streams = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1), (0, "a", 2)]
    drawn = [mask_uniforms(seed=s, step=t, segments=[(name, 0, n)]).double() - 0.5 for s, name, t in streams]
    for i, one in enumerate(drawn):
        for other in drawn[i + 1 :]:
            assert abs((one * other).mean().item() * 12) < 4.5 / math.sqrt(n)
            # Not shifted copies of each other either.
            assert abs((one[1:] * other[:-1]).mean().item() * 12) < 4.5 / math.sqrt(n)


def test_uniforms_of_one_position_over_steps_are_uniform() -> None:
    u = torch.cat([mask_uniforms(seed=0, step=t, segments=[("w", 5, 6)]) for t in range(2000)])
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3


def test_logistic_noise_is_the_logit_of_its_uniforms() -> None:
    u = mask_uniforms(seed=2, step=0, segments=[("w", 0, 200_000)]).double()
    noise = logistic_noise(seed=2, step=0, segments=[("w", 0, 200_000)])
    torch.testing.assert_close(noise.double(), torch.log(u) - torch.log1p(-u), rtol=1e-5, atol=1e-6)
    assert stats.kstest(noise[:20_000].numpy(), "logistic").pvalue > 1e-3
    assert noise.abs().max() < 11.79


def test_concrete_sample_is_its_formula() -> None:
    logits, u = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    got = concrete_sample(logits, torch.logit(u), 0.5)
    expected = [
        1 / (1 + math.exp(-(ell + math.log(v) - math.log(1 - v)) / 0.5)) for ell, v in zip((-1, 0, 2), u, strict=True)
    ]
    assert got.tolist() == pytest.approx(expected, rel=1e-12)
    assert concrete_sample(logits, None, 2.0).tolist() == torch.sigmoid(logits / 2).tolist()
    assert logits.tolist() == [-1.0, 0.0, 2.0]  # not written to


def test_a_sample_exceeds_half_as_often_as_the_soft_mask_says() -> None:
    logits = torch.full((400_000,), 0.7)
    noise = logistic_noise(seed=0, step=0, segments=[("w", 0, 400_000)])
    for temperature in (1.0, 0.05):
        share = (concrete_sample(logits, noise, temperature) > 0.5).float().mean().item()
        assert share == pytest.approx(soft_mask(logits)[0].item(), abs=0.003)


def test_binary_mask_is_strict() -> None:
    assert binary_mask(torch.tensor([-1.0, 0.0, 1e-30, 3.0])).tolist() == [False, False, True, True]


def test_a_mask_of_zero_mean_leaves_the_aligned_weights() -> None:
    c = coefficient(torch.zeros(4), scale=2.0, mean=0.0)
    assert c.tolist() == [0.0] * 4
    gradient = logit_gradient(torch.ones(4), torch.zeros(4), temperature=0.5, scale=2.0, mean=0.0, mean_pull=0.0)
    assert gradient.tolist() == [0.0] * 4
    assert coefficient(torch.tensor([0.5, 1.0]), scale=3.0, mean=0.75).tolist() == [2.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_interpolation_is_exact_at_both_ends(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    aligned, finetuned = torch.randn(100_000).to(dtype), torch.randn(100_000).mul(1e3).to(dtype)
    out = torch.empty_like(aligned)
    interpolate_into(out, aligned, finetuned, torch.zeros_like(aligned))
    assert torch.equal(out, aligned)
    interpolate_into(out, aligned, finetuned, torch.ones_like(aligned))
    assert torch.equal(out, finetuned)
    narrow = torch.empty(100_000, dtype=torch.bfloat16)
    interpolate_into(narrow, aligned, finetuned, torch.ones_like(aligned))
    assert torch.equal(narrow, finetuned.bfloat16())


@pytest.mark.parametrize("rescale", [True, False])
def test_logit_gradient_equals_autograd(rescale: bool) -> None:
    torch.manual_seed(0)
    aligned, finetuned, outer = (torch.randn(50, dtype=torch.float64) for _ in range(3))
    logits, noise = torch.randn(50, dtype=torch.float64, requires_grad=True), torch.randn(50, dtype=torch.float64)
    scale, temperature = 1.7, 0.6
    mask = torch.sigmoid((logits + noise) / temperature)
    mean = mask.mean() if rescale else torch.ones((), dtype=torch.float64)
    ((aligned + scale * mask / mean * (finetuned - aligned)) * outer).sum().backward()
    sample, delta = concrete_sample(logits.detach(), noise, temperature), finetuned - aligned
    mean_pull = ((outer * delta * sample).sum() / (50 * mean**2)).item() if rescale else 0.0
    got = logit_gradient(
        outer * delta, sample_slope(sample), temperature=temperature, scale=scale, mean=mean.item(), mean_pull=mean_pull
    )
    torch.testing.assert_close(got, logits.grad, rtol=1e-10, atol=1e-12)
