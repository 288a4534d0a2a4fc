"""The k-th largest magnitude of a tensor (or of many) that nobody holds whole: exact, in one pass over its blocks or in three.

A sample tells between which two values it must lie; one pass then counts what is above and collects what is between. Where the
sample misled, or too much lies between, it is counted bit by bit: a non-negative fp32 number and its bits, read as an integer,
are ordered alike, so the upper 16 bits of the wanted magnitude are found by counting, and its lower 16 bits by counting again
among those that share them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch

Blocks = Callable[[], Iterator[torch.Tensor]]
"""Gives the values again at each call, in pieces of any size: 1-D fp32, none of them NaN. They may be overwritten."""

_BINS = 1 << 16
_DEVIATIONS = 6
"""Half the width of the sampled range, in standard deviations of an independent sample's rank: neighbours are alike, hence more
than the 3 that would do."""
_COLLECT = 1 << 21
"""Distinct values between that are kept at most (of each block)."""


def kth_largest_magnitude(values: Blocks, k: int, *, numel: int = 0, sample: torch.Tensor | None = None) -> float:
    """The k-th largest |x| (k = 1 is the largest) of what `values` gives. Everything that is at least as large is kept by
    TIES; equal magnitudes may make that a few more than k. `sample`, some of the `numel` values, saves passes and changes
    nothing else."""
    assert k >= 1
    found = None if sample is None else _between(values, k, numel, sample)
    if found is not None:
        return found
    high = _from_above(_counts(values, None), k)
    low = _from_above(_counts(values, high[0]), high[1])
    bits = np.array([(high[0] << 16) | low[0]], dtype=np.int32)
    return float(bits.view(np.float32)[0])


def _between(values: Blocks, k: int, numel: int, sample: torch.Tensor) -> float | None:
    """The k-th of `numel` by way of a sample; None where that does not find it."""
    low, high = _range(k / numel, sample)
    above = kept = 0
    found: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]] = []
    for block in values():
        magnitudes = block.abs_()
        above += int(torch.count_nonzero(magnitudes > high))
        inside = magnitudes.numpy()[((magnitudes >= low) & (magnitudes <= high)).numpy()]
        if inside.size:
            distinct, counts = np.unique(inside, return_counts=True)
            found.append((distinct, counts))
            kept += distinct.size
            if kept > _COLLECT:
                return None
    if above >= k or not found:
        return None
    every = np.concatenate([distinct for distinct, _ in found])
    order = np.argsort(every)[::-1]
    down = above + np.cumsum(np.concatenate([counts for _, counts in found])[order])
    place = int(np.searchsorted(down, k))
    return float(every[order[place]]) if place < down.size else None


def _range(share: float, sample: torch.Tensor) -> tuple[float, float]:
    """Two magnitudes between which that of rank `share` × all lies, as far as a sample can tell."""
    sorted_, size = sample.abs().sort(descending=True).values, sample.numel()
    margin = _DEVIATIONS * math.sqrt(size * share * (1 - share)) + 1
    first, last = math.floor(share * size - margin), math.ceil(share * size + margin)
    return (float(sorted_[last]) if last < size else 0.0), (float(sorted_[first]) if first >= 0 else math.inf)


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
