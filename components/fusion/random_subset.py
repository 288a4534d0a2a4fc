"""A random subset of exactly k of n positions, stateless and seekable.

Each position has a 32-bit word of the counted noise; the subset is the k smallest words (equal words by position). The k-th
smallest lies within a few standard deviations of k/n of the range, so that one pass which counts what is below that
window and keeps what is inside finds it; after that any slice is one comparison.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from components.masks.concrete import hash_words

_LOW, _SPAN = -(1 << 31), 1 << 32
_DEVIATIONS = 8.0


class RandomSubset:
    """k of n positions, chosen by (seed, name). Bits of any slice are the same whoever asks, on every machine."""

    def __init__(self, *, seed: int, name: str, numel: int, count: int) -> None:
        assert 0 <= count <= numel, (count, numel)
        self._seed, self._name, self._numel = seed, f"random_mask/{name}", numel
        self._word = _LOW  # members have a smaller word …
        self._equal = np.zeros(0, dtype=np.int64)  # … or this word and one of these positions
        if count:
            self._find_threshold(count)

    def bits(self, start: int, stop: int) -> torch.Tensor:
        """Membership of positions [start, stop), 1-D bool."""
        out = np.empty(stop - start, dtype=np.bool_)
        at = 0
        for words in self._words(start, stop):
            np.less(words, self._word, out=out[at : at + words.size])
            at += words.size
        low, high = np.searchsorted(self._equal, [start, stop])
        out[self._equal[low:high] - start] = True
        return torch.from_numpy(out)

    def _find_threshold(self, count: int) -> None:
        """Set the last member's word, and which positions with that same word are members."""
        share = count / self._numel
        reach = _DEVIATIONS * math.sqrt(share * (1 - share) / self._numel) + 2 / self._numel
        while True:
            # In Python integers: the upper end may lie just outside 32 bits.
            low = _LOW + int(max(share - reach, 0.0) * _SPAN)
            high = _LOW + min(int((share + reach) * _SPAN) + 1, _SPAN)
            below, words, positions = self._window(low, high)
            if below < count <= below + words.size:
                break
            reach *= 16  # bad luck, or words that are not uniform: look wider
        order = np.lexsort((positions, words))
        self._word = int(words[order[count - below - 1]])
        members = order[: count - below]
        self._equal = np.sort(positions[members][words[members] == self._word])

    def _window(self, low: int, high: int) -> tuple[int, npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """How many words are below `low`, and the words in [low, high) with their positions."""
        below, at = 0, 0
        words_in: list[npt.NDArray[np.int32]] = []
        positions_in: list[npt.NDArray[np.int64]] = []
        for words in self._words(0, self._numel):
            small = words < low
            below += int(np.count_nonzero(small))
            inside = np.flatnonzero((words < high) & ~small)
            words_in.append(words[inside])
            positions_in.append(inside.astype(np.int64) + at)
            at += words.size
        return below, np.concatenate(words_in), np.concatenate(positions_in)

    def _words(self, start: int, stop: int) -> Iterator[npt.NDArray[np.int32]]:
        for words in hash_words(seed=self._seed, name=self._name, step=0, start=start, stop=stop):
            yield words.numpy()
