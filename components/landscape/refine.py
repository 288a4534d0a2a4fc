"""Where a surface must be measured to know VISAGE, and what it is in between.

The places are those of a lattice. Measured first are a few far apart; what lies between is taken from a smooth curve or surface
through them: PCHIP on a line, Clough and Tocher's cubics in a plane, neither of which may leave the range of the places around.
That range, and how wide the stretches are in which the basin's edge may lie, say how far VISAGE may be off and which cells to
divide next.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
import numpy.typing as npt
from scipy.interpolate import CloughTocher2DInterpolator, PchipInterpolator
from scipy.spatial import Delaunay

from components.landscape.visage import S_MAX, visage

Index = tuple[int, ...]
Array = npt.NDArray[np.float64]
Cell = tuple[tuple[int, int], ...]
"""First and last index of each axis."""

_FIRST = {1: 9, 2: 6}
"""Places of each axis that are measured first."""
_INSIDE = S_MAX - 1e-9
_OFF = 0.1
"""How far a place in between is off, as a share of the range of the places around it: one standard deviation. Beside a steep
edge half the range would be possible; with this the errors of VISAGE stayed below two deviations, on the testbed's surfaces and
on drawn ones."""
_DEVIATIONS = 2.0
"""How many standard deviations count as the error."""
_LEFT = 0.9
"""Share of the bound that the cells which are not divided may take."""


@dataclass(frozen=True)
class Filled:
    """A surface over the whole lattice."""

    values: Array
    """S at every place: as measured, or in between."""
    error: float
    """By how much VISAGE may be off: two standard deviations, as far as a few places can tell."""
    cells: dict[Cell, float]
    """What each undivided cell contributes to that, one standard deviation; those that contribute nothing are left out."""


def first_places(shape: Sequence[int]) -> list[Index]:
    """Those that are measured first, corners among them."""
    axes = [np.linspace(0, size - 1, min(size, _FIRST[len(shape)])).round().astype(int) for size in shape]
    return list(product(*(map(int, axis) for axis in axes)))


def next_places(shape: Sequence[int], known: Mapping[Index, float], bound: float, step: float) -> list[Index]:
    """What to measure after that; nothing where the error is within the bound or every place is known.

    Divided are the worst cells, so many that the others stay within the bound.
    """
    filled = fill(shape, known, step)
    if filled.error <= bound:
        return []
    wanted: dict[Index, None] = {}
    cells = sorted(filled.cells.items(), key=lambda one: (-one[1], one[0]))
    while cells and (not wanted or _together(share for _, share in cells) > _LEFT * bound):
        (cell, _), *cells = cells
        wanted.update(dict.fromkeys(place for place in _division(cell) if place not in known))
    return sorted(wanted)


def fill(shape: Sequence[int], known: Mapping[Index, float], step: float) -> Filled:
    """The surface from the places that are known, which must hold the first ones. `step`: what one prompt more makes of S."""
    places = np.array(sorted(known))
    measured = np.array([known[tuple(place)] for place in places.tolist()])
    outside = S_MAX * (measured >= _INSIDE)
    smooth, low, high = interpolated(shape, places, np.stack([measured, outside], -1))
    # A rate is a number of prompts: what is nearer to all of them than to one less is outside.
    values = np.where(smooth[..., 0] > S_MAX - step / 2, S_MAX, smooth[..., 0])
    on_edge = low[..., 1] < high[..., 1]
    for place, rate in known.items():
        values[place] = rate
    found, inside = visage(values), max(int(np.sum(values < _INSIDE)), 1)
    off = np.where(values < _INSIDE, _OFF * (high - low)[..., 0], 0.0)
    # V is a mean over the places inside: one that is taken for the wrong side brings or takes 100 − S − V.
    turned = np.where(on_edge, np.abs(S_MAX - smooth[..., 0] - found) / 2, 0.0)
    doubt = np.maximum(off, turned) / inside
    for place in known:
        doubt[place] = 0.0
    cells = {c: float(doubt[tuple(slice(a, b + 1) for a, b in c)].sum()) for c in _cells(shape, known)}
    return Filled(values, _together(cells.values()), {cell: share for cell, share in cells.items() if share > 0})


def interpolated(shape: Sequence[int], places: npt.NDArray[np.int64], values: Array) -> tuple[Array, Array, Array]:
    """Smooth surfaces [*shape, K] through K sets of values [P, K] at the places [P, axes], and the least and the largest value
    of the places around each place (at a measured one, some of its neighbours among them)."""
    if len(shape) == 1:
        every = np.arange(shape[0])
        right = np.searchsorted(places[:, 0], every, side="right").clip(1, len(places) - 1)
        around = np.stack([values[right - 1], values[right]], -2)
        return PchipInterpolator(places[:, 0], values)(every), around.min(-2), around.max(-2)
    triangles = Delaunay(places)
    grid = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), -1)
    around = values[triangles.simplices[triangles.find_simplex(grid)]]  # [*shape, 3, K]
    low, high = around.min(-2), around.max(-2)
    # Beside a steep edge cubics swing beyond what was measured on either side.
    return np.clip(CloughTocher2DInterpolator(triangles, values)(grid), low, high), low, high


def _together(shares: Iterable[float]) -> float:
    """Cells err by themselves, to either side."""
    return _DEVIATIONS * math.sqrt(sum(share**2 for share in shares))


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
