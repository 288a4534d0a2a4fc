"""fp32 to bf16 by a coin that is loaded so that nothing is lost on average.

Rounding to nearest takes every weight to the same neighbour each time: a task vector that is smaller than half a step of bf16
vanishes wherever it is added. Stochastic rounding (https://arxiv.org/abs/1502.02551) keeps it in the mean over many weights.
"""

from __future__ import annotations

import torch

from components.masks.concrete import hash_words

_LARGEST = (2 - 2.0**-7) * 2.0**127
"""Of bf16. What is larger is infinite, no number, or might be rounded up to infinity."""


def to_bf16_stochastic(values: torch.Tensor, *, seed: int, name: str, start: int) -> torch.Tensor:
    """Each value as one of the two bf16 beside it, the upper with a probability of its place between them: in the mean over
    seeds the value itself. What bf16 can hold stays as it is, infinities, NaN and signed zeros included; a finite value never
    becomes infinite (beyond ±3.39e38 it becomes that, the one place where the mean is off).

    The coin of an element is a function of (seed, name, position) alone: any slice has the bits of the whole.

    Args:
        values: 1-D fp32, elements `start` and on of the flattened tensor `name`.

    Returns 1-D bf16.
    """
    assert values.dtype == torch.float32, values.dtype
    assert values.dim() == 1, values.shape
    out = torch.empty(values.numel(), dtype=torch.bfloat16)
    stop = start + values.numel()
    position = start - start % 2  # two elements share a hash word, 16 bits each
    for words in hash_words(seed=seed, name=f"round/{name}", step=0, start=start // 2, stop=(stop + 1) // 2):
        coins = words.view(torch.int16)
        low, high = max(start, position), min(stop, position + coins.numel())
        _round(
            values[low - start : high - start], coins[low - position : high - position], out[low - start : high - start]
        )
        position += coins.numel()
    return out


def _round(values: torch.Tensor, coins: torch.Tensor, out: torch.Tensor) -> None:
    """The 16 bits that bf16 cuts off are the place between its two neighbours: with 16 random bits added they carry into what
    stays with just that probability, whatever the sign and the exponent, subnormals included."""
    bits = values.contiguous().view(torch.int32)
    carried = coins.to(torch.int32).bitwise_and_(0xFFFF).add_(bits).bitwise_right_shift_(16)
    out.view(torch.int16).copy_(carried)
    smallest, largest = torch.aminmax(values) if values.numel() else (values.sum(), values.sum())
    if not bool((smallest >= -_LARGEST) & (largest <= _LARGEST)):  # also where there is a NaN
        beyond = torch.isfinite(values) & (values.abs() > _LARGEST)
        exact = torch.where(beyond, values.clamp(-_LARGEST, _LARGEST), values).bfloat16()
        out.copy_(torch.where(beyond | ~torch.isfinite(values), exact, out))
