"""The k-th largest magnitude of a tensor (or of many) that nobody holds whole: exact, in one pass over its blocks or in three.

A sample tells between which two values it must lie; one pass then counts what is above and collects what is between. Where the
sample misled, or too much lies between, it is counted bit by bit: a non-negative fp32 number and its bits, read as an integer,
are ordered alike, so the upper 16 bits of the wanted magnitude are found by counting, and its lower 16 bits by counting again
among those that share them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

Blocks = Callable[[], "Iterator[torch.Tensor]"]
"""Gives the values again at each call, in pieces of any size: 1-D fp32, none of them NaN. They may be overwritten."""
Bands = Callable[[np.float32, np.float32], Iterator[tuple[int, npt.NDArray[np.float32]]]]
"""(low, high) -> block by block, how many magnitudes are above `high`, and those that are in [low, high]."""

_BINS = 1 << 16
_DEVIATIONS = 6
"""Half the width of the sampled range, in standard deviations of an independent sample's rank: neighbours are alike, hence more
than the 3 that would do."""
_COLLECT = 1 << 21
"""Distinct values between that are kept at most."""
_WAITING = 1 << 18
"""Values between that are sorted at once."""


def kth_largest_magnitude(
    values: Blocks, k: int, *, numel: int = 0, sample: torch.Tensor | None = None, bands: Bands | None = None
) -> float:
    """The k-th largest |x| (k = 1 is the largest) of what `values` gives. Everything that is at least as large is kept by
    TIES; equal magnitudes may make that a few more than k. `sample`, some of the `numel` values, saves passes and changes
    nothing else; so do `bands` of the same values that somebody finds faster."""
    assert k >= 1
    found = None if sample is None else _between(bands or _bands_of(values), k, numel, sample)
    if found is not None:
        return found
    high = _from_above(_counts(values, None), k)
    low = _from_above(_counts(values, high[0]), high[1])
    bits = np.array([(high[0] << 16) | low[0]], dtype=np.int32)
    return float(bits.view(np.float32)[0])


def _bands_of(values: Blocks) -> Bands:
    def bands(low: np.float32, high: np.float32) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        for block in values():
            magnitudes = block.abs_().numpy()  # numpy compares and counts ten times as fast as torch (measured)
            over = magnitudes > high
            yield int(np.count_nonzero(over)), magnitudes[np.flatnonzero((magnitudes >= low) ^ over)]

    return bands


def _between(bands: Bands, k: int, numel: int, sample: torch.Tensor) -> float | None:
    """The k-th of `numel` by way of a sample; None where that does not find it."""
    low, high = (np.float32(bound) for bound in _range(k / numel, sample))
    above, found, waiting = 0, _Counted(), 0
    pieces: list[npt.NDArray[np.float32]] = []
    for over, inside in bands(low, high):
        above += over
        pieces.append(inside)
        waiting += inside.size
        if waiting >= _WAITING:
            found, pieces, waiting = found.plus(np.concatenate(pieces)), [], 0
            if found.values.size > _COLLECT:
                return None
    found = found.plus(np.concatenate([np.empty(0, dtype=np.float32), *pieces]))
    if above >= k or not found.values.size:
        return None
    down = above + np.cumsum(found.counts[::-1])
    place = int(np.searchsorted(down, k))
    return float(found.values[::-1][place]) if place < down.size else None


@dataclass(frozen=True)
class _Counted:
    """Distinct values in rising order, and how often each is there."""

    values: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty(0, dtype=np.float32))
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def plus(self, more: npt.NDArray[np.float32]) -> _Counted:
        """With other values, too."""
        values, counts = np.unique(more, return_counts=True)
        if not self.values.size:
            return _Counted(values, counts)
        every, place = np.unique(np.concatenate([self.values, values]), return_inverse=True)
        total = np.zeros(every.size, dtype=np.int64)
        np.add.at(total, place, np.concatenate([self.counts, counts]))
        return _Counted(every, total)


def _range(share: float, sample: torch.Tensor) -> tuple[float, float]:
    """Two magnitudes between which that of rank `share` × all lies, as far as a sample can tell."""
    size = sample.numel()
    margin = _DEVIATIONS * math.sqrt(size * share * (1 - share)) + 1
    # Ranks from below.
    high, low = size - 1 - math.floor(share * size - margin), size - 1 - math.ceil(share * size + margin)
    ranks = [rank for rank in (low, high) if 0 <= rank < size]
    ordered = (
        np.partition(sample.abs().numpy(), ranks) if ranks else np.empty(0)
    )  # a whole sort takes several times as long
    return (float(ordered[low]) if low >= 0 else 0.0), (float(ordered[high]) if high < size else math.inf)


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
