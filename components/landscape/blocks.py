"""A tensor a block at a time: ranges that keep to its rows, and room that every block uses again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from components.checkpoints.source import blocks
from components.landscape.directions import BLOCK


@dataclass(frozen=True)
class Stretch:
    """Elements [start, stop) of a flattened tensor: `rows` whole rows from row `first` on, or a part of that one."""

    start: int
    stop: int
    first: int
    rows: int

    def share(self, by_row: torch.Tensor) -> torch.Tensor:
        """Of one number for each row, [rows, 1]; of one for the whole tensor, that."""
        return by_row if by_row.numel() == 1 else by_row[self.first : self.first + self.rows, None]

    def as_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Its values, [rows, elements]."""
        return values.view(self.rows, -1)


def stretches(numel: int, rows: int, size: int = BLOCK) -> Iterator[Stretch]:
    """All of a tensor of `rows` rows in stretches of at most `size` elements; `rows` is 1 where its rows are of no interest."""
    if not numel:
        return
    width = numel // rows
    if width > size:
        for row in range(rows):
            for start, stop in blocks(width, size):
                yield Stretch(row * width + start, row * width + stop, row, 1)
        return
    for first, last in blocks(rows, max(1, size // width)):
        yield Stretch(first * width, last * width, first, last - first)


class Room:
    """Buffers of one device for a block of elements."""

    def __init__(self, device: torch.device) -> None:
        # A GPU takes as long to begin an operation as to do a small block; a CPU's caches want one.
        self.size = BLOCK if device.type == "cpu" else 32 * BLOCK
        self.device = device
        self._fp64 = torch.empty(2, self.size, dtype=torch.float64, device=device)
        self._int32 = torch.empty(self.size, dtype=torch.int32, device=device)

    def sum(self, count: int) -> torch.Tensor:
        """What is added to, [count] fp64."""
        return self._fp64[0, :count]

    def term(self, count: int) -> torch.Tensor:
        """What is added, [count] fp64."""
        return self._fp64[1, :count]

    def indices(self, count: int) -> torch.Tensor:
        """[count] int32."""
        return self._int32[:count]
