"""Concrete (relaxed Bernoulli) masks as plain tensor functions, and the counted noise they are drawn with.

Noise is a stateless integer hash of (seed, tensor name, step, position): any slice [start, stop) of a tensor has the
same bits whoever computes it, and nothing need be stored between forward and backward. The uniforms are equal to the bit; what
follows a logarithm or a sigmoid is equal to its last bit or two, whose rounding may depend on the place in a vector.

The weights under a mask are, per tensor, with a = aligned, f = finetuned, δ = f − a, N elements (arXiv 2405.09055):

    s = σ((ℓ + log u − log(1−u)) / T)         relaxed sample
    h = s, or 1[s > ½] for straight-through   what multiplies δ
    c = λ h / M,  M = mean(h) or 1            rescaled
    w = a + c δ                               (a select between a and f where c is 0 or 1)

and with G = (∂L/∂w) δ the gradient that reaches the logits is

    ∂L/∂ℓ = λ (G / M − [Σ G h] / (N M²)) · s (1 − s) / T     (the bracket only for rescale = mean)

so nothing but sums of M and of G·h ever has to cross from one slice of a tensor to another.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence

import torch

BLOCK = 65_536
"""Hash words under one key; also the span that is worked on at once, small enough for a core's cache."""

Segment = tuple[str, int, int]
"""(tensor name, start, stop): positions of a tensor."""

_MULTIPLY_1, _MULTIPLY_2 = 0x7FEB352D, 0x846CA68B - (1 << 32)


@functools.lru_cache(maxsize=4096)
def _scalar(value: float, dtype: torch.dtype, device: str) -> torch.Tensor:
    """A constant as a 0-d tensor: a Python number in an in-place operation costs 5 µs more (measured), which is much for the
    small tensors of a small model."""
    return torch.tensor(value, dtype=dtype, device=device)


def _scalar_like(value: float, tensor: torch.Tensor) -> torch.Tensor:
    return _scalar(value, tensor.dtype, str(tensor.device))


def _xorshift_(x: torch.Tensor, bits: int, scratch: torch.Tensor) -> torch.Tensor:
    """x ^= x >>> bits, in place; `>>` of a signed tensor keeps the sign, so it is masked off."""
    shifted = torch.bitwise_right_shift(x, _scalar_like(bits, x), out=scratch[: x.numel()])
    return x.bitwise_xor_(shifted.bitwise_and_(_scalar_like((1 << (32 - bits)) - 1, x)))


def _scramble_(x: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """The last three steps of lowbias32 (https://nullprogram.com/blog/2018/07/31/) in place on int32."""
    x = _xorshift_(x, 15, scratch).mul_(_scalar_like(_MULTIPLY_2, x))
    return _xorshift_(x, 16, scratch)


@functools.cache
def _counters(device: str) -> torch.Tensor:
    """lowbias32 of the positions within a block, [BLOCK] int32: the half of the hash that no key enters is done once."""
    x = torch.arange(BLOCK, dtype=torch.int32, device=device)
    scratch = torch.empty_like(x)
    return _scramble_(_xorshift_(x, 16, scratch).mul_(_scalar_like(_MULTIPLY_1, x)), scratch)


def hash_keys(seed: int, name: str, step: int, block: int) -> tuple[int, int]:
    """The two int32 that make one block of a stream's words out of its positions (`kernels.c` has the same hash)."""
    digest = hashlib.blake2b(f"{seed}\0{name}\0{step}\0{block}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little", signed=True), int.from_bytes(digest[4:], "little", signed=True)


def _hashed(seed: int, step: int, ranges: Sequence[Segment], device: str) -> torch.Tensor:
    """Words start … stop−1 of each stream (seed, name, step), one after the other: 1-D int32. One pass for all ranges, because
    small tensors cost more in calls than in elements."""
    counters, pieces = _counters(device), []
    for name, start, stop in ranges:
        while start < stop:
            block, low = divmod(start, BLOCK)
            high = min(stop - block * BLOCK, BLOCK)
            pieces.append((low, high, hash_keys(seed, name, step, block)))
            start = block * BLOCK + high
    words = torch.empty(sum(high - low for low, high, _ in pieces), dtype=torch.int32, device=device)
    if not pieces:
        return words
    keys = torch.tensor([key for _, _, key in pieces], dtype=torch.int32, device=device)
    parts = words.split([high - low for low, high, _ in pieces])  # type: ignore[no-untyped-call]
    for (low, high, _), part, key in zip(pieces, parts, keys[:, 0].unbind(), strict=True):
        torch.bitwise_xor(counters[low:high], key, out=part)
    words.mul_(_scalar_like(_MULTIPLY_1, words))
    for part, key in zip(parts, keys[:, 1].unbind(), strict=True):
        part.add_(key)
    return _scramble_(words, torch.empty_like(words))


def hash_words(
    *, seed: int, name: str, step: int, start: int, stop: int, device: str = "cpu"
) -> Iterator[torch.Tensor]:
    """Uniform int32 words start … stop−1 of the stream (seed, name, step), in pieces that end at block borders."""
    while start < stop:
        high = min(stop, (start // BLOCK + 1) * BLOCK)
        yield _hashed(seed, step, [(name, start, high)], device)
        start = high


def mask_halves(*, seed: int, step: int, segments: Sequence[Segment], device: str = "cpu") -> torch.Tensor:
    """Uniform 16-bit integers at the positions of `segments`, one after the other: 1-D int16.

    Two positions share a hash word: half the cost of a word each. Meant for some 2 × BLOCK elements at once.
    """
    ranges = [(name, start // 2, (stop + 1) // 2) for name, start, stop in segments]
    halves = _hashed(seed, step, ranges, device).view(torch.int16)
    count = sum(stop - start for _, start, stop in segments)
    if count == halves.numel():
        return halves
    out = torch.empty(count, dtype=torch.int16, device=device)
    at = position = 0
    for (_, start, stop), (_, first, last) in zip(segments, ranges, strict=True):
        begin = position + start - 2 * first
        out[at : at + stop - start].copy_(halves[begin : begin + stop - start])
        at, position = at + stop - start, position + 2 * (last - first)
    return out


def mask_uniforms(*, seed: int, step: int, segments: Sequence[Segment], device: str = "cpu") -> torch.Tensor:
    """The u of a mask sample: `mask_halves` on the open (0, 1), odd multiples of 2⁻¹⁷, 1-D fp32; |log u − log(1−u)| ≤ 11.8."""
    out = mask_halves(seed=seed, step=step, segments=segments, device=device).float()
    # (h + ½)/2¹⁶ + ½ for h in [−2¹⁵, 2¹⁵), exact in fp32, in one operation.
    return torch.add(_scalar_like(0.5 + 2.0**-17, out), out, alpha=2.0**-16, out=out)


def logistic_noise(*, seed: int, step: int, segments: Sequence[Segment], device: str = "cpu") -> torch.Tensor:
    """log u − log(1−u) of `mask_uniforms`, 1-D fp32."""
    return mask_uniforms(seed=seed, step=step, segments=segments, device=device).logit_()


def concrete_sample(logits: torch.Tensor, noise: torch.Tensor | None, temperature: float) -> torch.Tensor:
    """s = σ((ℓ + noise) / T), in the logits' dtype; without noise σ(ℓ / T)."""
    if noise is None:
        return torch.sigmoid(logits / temperature)
    sample = torch.add(logits, noise)
    return sample.mul_(_scalar_like(1.0 / temperature, sample)).sigmoid_()


def soft_mask(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """σ(ℓ / temperature). With 1 it is the probability that an element is kept, whatever the samples' temperature."""
    return torch.sigmoid(logits if temperature == 1 else logits / temperature)


def binary_mask(logits: torch.Tensor, threshold: float = 0.0) -> torch.Tensor:
    """ℓ > threshold, bool."""
    return logits > threshold


def coefficient(mask: torch.Tensor, *, scale: float, mean: float) -> torch.Tensor:
    """c = λ h / M. A tensor whose mask is all zero (M = 0) stays aligned: c = 0."""
    if scale == 1.0 and mean == 1.0:
        return mask
    return mask * _scalar_like(scale / mean if mean > 0 else 0.0, mask)


def interpolate_into(out: torch.Tensor, aligned: torch.Tensor, finetuned: torch.Tensor, c: torch.Tensor) -> None:
    """out = a + c (f − a), exactly a where c = 0 and exactly f where c = 1 (torch.lerp works from the nearer end)."""
    if (out.dtype, out.device) == (aligned.dtype, aligned.device):
        torch.lerp(aligned, finetuned, c, out=out)
    else:
        out.copy_(torch.lerp(aligned, finetuned, c))


def sample_slope(sample: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """s (1 − s), written as s − s² so that one pass does it; into `out` if given."""
    return torch.addcmul(sample, sample, sample, value=-1.0, out=out)


def logit_gradient(
    pull: torch.Tensor, slope: torch.Tensor, *, temperature: float, scale: float, mean: float, mean_pull: float
) -> torch.Tensor:
    """∂L/∂ℓ from G = (∂L/∂w)·δ (`pull`) and the relaxed sample's s (1 − s) (`slope`); `mean` is M, `mean_pull` is
    [Σ G h]/(N M²) (0 unless the rescaling's gradient is wanted). Overwrites `pull` and gives it back."""
    if mean <= 0:
        return pull.zero_()
    factor = scale / temperature
    if mean_pull:
        torch.add(_scalar_like(-factor * mean_pull, pull), pull, alpha=factor / mean, out=pull)
    else:
        pull.mul_(_scalar_like(factor / mean, pull))
    return pull.mul_(slope)
