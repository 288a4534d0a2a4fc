"""Counted Gaussian noise: a random direction is a seed, and any slice of it has the same bits on every device.

16 hash bits of a position (`masks.concrete.mask_halves`: two positions share a word) choose one of 65,536 equally likely
levels, the Gaussian's quantiles at the middles of as many equal shares. Levels are integers, in units of 2⁻²⁰, so that nothing
rounds on the way, and Σ g² of a whole tensor is exact in whatever order it is summed. The largest |g| is 4.32.
"""

from __future__ import annotations

import functools

import torch
from scipy.special import ndtri

from components.masks.concrete import mask_halves

UNIT = 1 << 20
"""A level of this size is 1."""
LEVELS = 1 << 16
BLOCK = 1 << 17
"""Elements that are worked on at once on a CPU: what the hash makes under one key, and small enough for a core's cache. The sum
of as many squared levels fits into 63 bits, whatever they are."""


def stream_name(stream: int, name: str) -> str:
    """Of the hash: `stream` tells directions apart that have one seed, `name` the tensors."""
    return f"landscape/{stream}/{name}"


@functools.cache
def levels(device: str = "cpu") -> torch.Tensor:
    """The Gaussian's levels in units of 1/UNIT, [LEVELS] int32, in the order of a position's 16 bits read as an unsigned
    number. Symmetric about 0."""
    # In fp64 on the CPU wherever they are used: a device's own quantile function may round another way.
    upper = torch.from_numpy(ndtri((torch.arange(LEVELS // 2) + (0.5 + LEVELS // 2)).double().numpy() / LEVELS))
    upper = (upper * UNIT).round().int()
    # The bits are a signed number's: the upper half of the distribution comes first.
    return torch.cat([upper, -upper.flip(0)]).to(device)


@functools.cache
def levels_fp64(device: str = "cpu") -> torch.Tensor:
    """The same as fp64, which holds them exactly."""
    return levels(device).double()


def gaussian_into(
    out: torch.Tensor, indices: torch.Tensor, *, seed: int, stream: int, name: str, start: int
) -> torch.Tensor:
    """Positions start … start + len(out) − 1 of a tensor's noise in units of 1/UNIT, into `out`: 1-D, int32 or fp64.

    Args:
        indices: room for as many int32 on the same device.
        stream: tells directions apart that have one seed.
        name: the tensor's.
    """
    device = str(out.device)
    segments = [(stream_name(stream, name), start, start + out.numel())]
    indices.copy_(mask_halves(seed=seed, step=0, segments=segments, device=device)).bitwise_and_(LEVELS - 1)
    table = levels(device) if out.dtype == torch.int32 else levels_fp64(device)
    return torch.index_select(table, 0, indices, out=out)


def gaussian(*, seed: int, stream: int, name: str, start: int, stop: int, device: str = "cpu") -> torch.Tensor:
    """Positions start … stop − 1 of a tensor's noise in units of 1/UNIT, 1-D int32."""
    out = torch.empty(stop - start, dtype=torch.int32, device=device)
    return gaussian_into(out, torch.empty_like(out), seed=seed, stream=stream, name=name, start=start)
