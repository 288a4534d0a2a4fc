"""Where a surface must be measured to know VISAGE, and what it is in between.

The places are those of a lattice. Measured first are a few far apart; what lies between is taken from a smooth curve or
surface through them (PCHIP, which never overshoots; Clough and Tocher's in a plane) and from a straight one. How far apart the
two are, and how wide the stretches are in which the basin's edge may lie, says how far VISAGE may be off and which cells to
divide next.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
import numpy.typing as npt
from scipy.interpolate import CloughTocher2DInterpolator, LinearNDInterpolator, PchipInterpolator

from components.landscape.visage import S_MAX, visage

Index = tuple[int, ...]
Array = npt.NDArray[np.float64]
Cell = tuple[tuple[int, int], ...]
"""First and last index of each axis."""

_FIRST = {1: 9, 2: 6}
"""Places of each axis that are measured first."""
_INSIDE = S_MAX - 1e-9
_DEVIATIONS = 2.0
"""How many standard deviations of the edges' part count as error."""
_LEFT = 0.9
"""Share of the bound that the cells which are not divided may take."""


@dataclass(frozen=True)
class Filled:
    """A surface over the whole lattice."""

    values: Array
    """S at every place: as measured, or in between."""
    error: float
    """By how much VISAGE may be off."""
    cells: dict[Cell, tuple[float, float]]
    """What each undivided cell contributes to that: by the bend of the surface, and by the basin's edge."""


def _together(cells: Iterable[tuple[float, float]]) -> float:
    """Cells err to either side of an edge by themselves, and what bends mostly bends one way."""
    parts = list(cells)
    return _DEVIATIONS * math.sqrt(sum(bend**2 for bend, _ in parts) + sum(edge**2 for _, edge in parts))


def first_places(shape: Sequence[int]) -> list[Index]:
    """Those that are measured first, corners among them."""
    axes = [np.linspace(0, size - 1, min(size, _FIRST[len(shape)])).round().astype(int) for size in shape]
    return list(product(*(map(int, axis) for axis in axes)))


def next_places(shape: Sequence[int], known: Mapping[Index, float], bound: float) -> list[Index]:
    """What to measure after that; nothing where the error is within the bound or every place is known.

    Divided are the worst cells, so many that the others stay well within the bound.
    """
    filled = fill(shape, known)
    if filled.error <= bound:
        return []
    wanted: dict[Index, None] = {}
    cells = sorted(filled.cells.items(), key=lambda one: (-sum(one[1]), one[0]))
    while cells and (not wanted or _together(share for _, share in cells) > _LEFT * bound):
        (cell, _), *cells = cells
        wanted.update(dict.fromkeys(place for place in _division(cell) if place not in known))
    return sorted(wanted)


def fill(shape: Sequence[int], known: Mapping[Index, float]) -> Filled:
    """The surface from the places that are known, which must hold the first ones."""
    places = np.array(sorted(known))
    measured = np.array([known[tuple(place)] for place in places.tolist()])
    outside = S_MAX * (measured >= _INSIDE)
    smooth, straight = interpolated(shape, places, np.stack([measured, outside], -1))
    # Between a place outside the basin and one inside, the nearer one says which a place belongs to.
    values = np.where(straight[..., 1] >= S_MAX / 2, S_MAX, smooth[..., 0])
    unsure = (straight[..., 1] > 0) & (straight[..., 1] < S_MAX)
    for place, rate in known.items():
        values[place], unsure[place] = rate, False
    found, inside = visage(values), max(float(np.sum(values < _INSIDE)), 1.0)
    bent = np.where(unsure | (values >= _INSIDE), 0.0, np.abs(values - straight[..., 0])) / inside
    # V is a mean over the places inside: one that is taken for the wrong side brings or takes 100 − S − V.
    turned = np.where(unsure, np.abs(S_MAX - np.minimum(smooth[..., 0], straight[..., 0]) - found) / 2, 0.0) / inside
    for place in known:
        bent[place] = turned[place] = 0.0
    parts = {cell: tuple(slice(low, high + 1) for low, high in cell) for cell in _cells(shape, known)}
    cells = {cell: (float(bent[part].sum()), float(turned[part].sum())) for cell, part in parts.items()}
    cells = {cell: share for cell, share in cells.items() if sum(share) > 0}
    return Filled(values, _together(cells.values()), cells)


def interpolated(shape: Sequence[int], places: npt.NDArray[np.int64], values: Array) -> tuple[Array, Array]:
    """(smooth, straight) surfaces [*shape, K] through K sets of values [P, K] at the places [P, axes]; within 0 to 100."""
    if len(shape) == 1:
        every = np.arange(shape[0])
        smooth = PchipInterpolator(places[:, 0], values)(every)
        straight = np.stack([np.interp(every, places[:, 0], column) for column in values.T], -1)
    else:
        every_2 = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), -1)
        smooth = CloughTocher2DInterpolator(places, values)(every_2)
        straight = LinearNDInterpolator(places, values)(every_2)
    return np.clip(smooth, 0, S_MAX), np.clip(straight, 0, S_MAX)


def _cells(shape: Sequence[int], known: Mapping[Index, float]) -> Iterator[Cell]:
    """The undivided ones."""
    ends = [sorted({place[axis] for place in first_places(shape)}) for axis in range(len(shape))]
    waiting: list[Cell] = list(product(*(list(pairwise(axis)) for axis in ends)))
    while waiting:
        cell = waiting.pop()
        division = _division(cell)
        if not division or not all(place in known for place in division):
            yield cell
            continue
        halves = [[(a, (a + b) // 2), ((a + b) // 2, b)] if b - a > 1 else [(a, b)] for a, b in cell]
        waiting.extend(product(*halves))


def _division(cell: Cell) -> list[Index]:
    """The places that divide a cell in halves by each axis; none where it holds no place between its corners."""
    if all(high - low < 2 for low, high in cell):
        return []
    axes = [sorted({low, (low + high) // 2, high}) if high - low > 1 else [low, high] for low, high in cell]
    corners = set(product(*cell))
    return [place for place in product(*axes) if place not in corners]
