"""Elements that share a logit: runs of `unit` neighbours of a flattened tensor. A tensor holds a whole number of units."""

from __future__ import annotations

import torch


def units(unit: int, start: int, stop: int) -> tuple[int, int]:
    """The first unit that elements [start, stop) touch, and one past the last."""
    return start // unit, -(-stop // unit)


def spread(values: torch.Tensor, unit: int, start: int, stop: int) -> torch.Tensor:
    """A value for each element of [start, stop), from one for each unit that they touch. Not to be written into."""
    if unit == 1:
        return values
    if values.numel() == 1:
        return values.expand(stop - start)
    offset = start % unit
    return values.repeat_interleave(unit)[offset : offset + stop - start]


def gathered(values: torch.Tensor, unit: int, start: int) -> torch.Tensor:
    """The sum over each unit of values of elements `start` and on: the transpose of `spread`."""
    if unit == 1:
        return values
    stop = start + values.numel()
    first, last = units(unit, start, stop)
    if last - first == 1:
        return values.sum().view(1)
    return torch.nn.functional.pad(values, (start - first * unit, last * unit - stop)).view(-1, unit).sum(dim=1)
