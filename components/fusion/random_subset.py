"""A random subset of exactly k of n positions, stateless and seekable.

Each position has a 32-bit word of the counted noise; the subset is the k smallest words (equal words by position). Finding
the k-th smallest takes two passes that store a histogram and one bucket; after that any slice is one comparison.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from components.masks.concrete import hash_words

_BUCKETS = 1 << 16


class RandomSubset:
    """k of n positions, chosen by (seed, name). Bits of any slice are the same whoever asks, on every machine."""

    def __init__(self, *, seed: int, name: str, numel: int, count: int) -> None:
        assert 0 <= count <= numel, (count, numel)
        self._seed, self._name, self._numel = seed, f"random_mask/{name}", numel
        self._word, self._position = self._threshold(count) if 0 < count else (-(1 << 31) - 1, -1)

    def bits(self, start: int, stop: int) -> torch.Tensor:
        """Membership of positions [start, stop), 1-D bool."""
        out = torch.empty(stop - start, dtype=torch.bool)
        at = 0
        for words in self._words(start, stop):
            piece = out[at : at + words.numel()]
            torch.lt(words, self._word, out=piece)
            first = start + at
            if first <= self._position:
                within = torch.arange(first, first + words.numel()) <= self._position
                piece |= (words == self._word) & within
            at += words.numel()
        return out

    def _threshold(self, count: int) -> tuple[int, int]:
        """(word, position) of the last member in the order of (word, position)."""
        histogram = torch.zeros(_BUCKETS, dtype=torch.int64)
        for words in self._words(0, self._numel):
            histogram += torch.bincount(_bucket(words), minlength=_BUCKETS)
        reached = torch.cumsum(histogram, 0)
        bucket = int(torch.searchsorted(reached, count))
        rank = count - (int(reached[bucket - 1]) if bucket else 0)
        found: list[tuple[int, int]] = []
        at = 0
        for words in self._words(0, self._numel):
            inside = (_bucket(words) == bucket).nonzero().reshape(-1)
            found += zip(words[inside].tolist(), (inside + at).tolist(), strict=True)
            at += words.numel()
        return sorted(found)[rank - 1]

    def _words(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        return hash_words(seed=self._seed, name=self._name, step=0, start=start, stop=stop)


def _bucket(words: torch.Tensor) -> torch.Tensor:
    """Upper 16 bits of int32 words, in order, from 0."""
    return (words.bitwise_right_shift(16) + (_BUCKETS // 2)).long()
