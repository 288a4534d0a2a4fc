"""The k-th largest magnitude of a tensor (or of many) that nobody holds whole: exact, in two passes over its blocks.

A non-negative fp32 number and its bits, read as an integer, are ordered alike. So the upper 16 bits of the wanted magnitude
are found by counting, and its lower 16 bits by counting again among those that share them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch

Blocks = Callable[[], Iterator[torch.Tensor]]
"""Gives the values again at each call, in pieces of any size: 1-D fp32, none of them NaN."""

_BINS = 1 << 16


def kth_largest_magnitude(values: Blocks, k: int) -> float:
    """The k-th largest |x| (k = 1 is the largest) of what `values` gives. Everything that is at least as large is kept by
    TIES; equal magnitudes may make that a few more than k."""
    assert k >= 1
    high = _from_above(_counts(values, None), k)
    low = _from_above(_counts(values, high[0]), high[1])
    bits = np.array([(high[0] << 16) | low[0]], dtype=np.int32)
    return float(bits.view(np.float32)[0])


def _counts(values: Blocks, upper: int | None) -> npt.NDArray[np.int64]:
    """How many magnitudes have each upper half, or each lower half among those whose upper half is `upper`."""
    total = np.zeros(_BINS, dtype=np.int64)
    for block in values():
        bits = block.abs().numpy().view(np.int32)
        halves = bits >> 16 if upper is None else (bits[(bits >> 16) == upper] & 0xFFFF)
        total += np.bincount(halves, minlength=_BINS)
    return total


def _from_above(counts: npt.NDArray[np.int64], k: int) -> tuple[int, int]:
    """The bin that holds the k-th from above, and its rank among that bin's."""
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, k))
    assert place < _BINS, "fewer values than k"
    before = int(above[place - 1]) if place else 0
    return _BINS - 1 - place, k - before
