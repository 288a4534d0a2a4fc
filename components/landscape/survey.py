"""Which points of a landscape are measured, and when all are."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import product

import numpy as np

from components.errors import EvaluationError
from components.evaluation.outcomes import NamedSet
from components.landscape.points import Ask, Point, Where
from components.landscape.refine import Index, first_places, next_places
from components.landscape.settings import Scan
from components.landscape.visage import S_MAX

FINER = 10
"""On a line VISAGE is known from a refined scan as from so many times the intervals of the full grid."""


def attack_sets(sets: Iterable[NamedSet]) -> list[str]:
    """The sets whose prompts together make S: the harmful ones that count, or all harmful ones where none does. Raises
    EvaluationError where there is none."""
    harmful = [one for one in sets if one.kind == "harmful"]
    if not harmful:
        raise EvaluationError("no set of kind harmful is asked: a safety landscape is drawn of harmful requests")
    return [one.name for one in harmful if one.counts] or [one.name for one in harmful]


class Lattice:
    """The places of one line or plane by index."""

    def __init__(self, scan: Scan) -> None:
        self.grid = [_spaced(axis.low, axis.high, scan.points) for axis in scan.axes]
        """Coordinates of the full grid, by axis."""
        fine = scan.refine is not None and len(scan.axes) == 1
        self.finer = FINER if fine else 1
        """How many of its intervals make one of the full grid's."""
        count = (scan.points - 1) * self.finer + 1
        self.axes = [_spaced(axis.low, axis.high, count) for axis in scan.axes]
        """Coordinates of the places that may be measured and that figures are taken over, by axis."""
        self.origin: Where = (0.0,) * len(self.axes)
        self._index = {place: index for index, place in self._places()}

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(len, self.axes))

    def place(self, index: Index) -> Where:
        return tuple(axis[i] for axis, i in zip(self.axes, index, strict=True))

    def index(self, place: Where) -> Index | None:
        """None of a place beside the lattice: the origin may be one."""
        return self._index.get(place)

    def _places(self) -> Iterable[tuple[Index, Where]]:
        for index in product(*map(range, self.shape)):
            yield index, self.place(index)


def _spaced(low: float, high: float, count: int) -> list[float]:
    # Rounded, so that a place is written as a reader would and the middle is 0 and not 1e-17.
    return [round(float(x), 12) + 0.0 for x in np.linspace(low, high, count)]


class _Line:
    """One line or plane under way."""

    def __init__(self, scan: Scan, direction: int) -> None:
        self.scan, self.direction, self.lattice = scan, direction, Lattice(scan)
        self.waiting: deque[Where] = deque()
        self.round: set[Where] = set()
        """Places that must be known before the next are chosen."""
        self.places: set[Where] = set()
        """All that were chosen until now."""
        self.known: dict[Index, float] = {}
        """Index -> S of the rounds that are over: the next is chosen by these alone, whatever else is known already."""
        shape = self.lattice.shape
        first = first_places(shape) if scan.refine is not None else list(product(*map(range, shape)))
        # The model itself first: what nobody can ask of it ends the survey before anything moves.
        self._begin(list(dict.fromkeys([self.lattice.origin, *map(self.lattice.place, first)])))

    def _begin(self, places: Sequence[Where]) -> None:
        self.round, self.waiting = set(places), deque(places)
        self.places.update(places)

    def advance(self, rates: dict[Where, float], step: float) -> None:
        """Go on as far as the known rates allow. `step`: what one prompt more makes of a rate."""
        while self.round and all(place in rates for place in self.round):
            found = {self.lattice.index(place): rates[place] for place in self.round}
            self.known |= {index: rate for index, rate in found.items() if index is not None}
            further = (
                next_places(self.lattice.shape, self.known, self.scan.refine, step)
                if self.scan.refine is not None
                else []
            )
            self._begin([self.lattice.place(index) for index in further])


class Survey:
    """The points of some scans: hands out those to measure and is told of each that is.

    Several may be under way at once and come back in any order. A refined scan goes on in rounds, each chosen by all points of
    the rounds before: the same points come out whoever measures them, and however often the survey is broken off.

    Raises EvaluationError where no set is harmful.
    """

    def __init__(self, scans: Sequence[Scan], *, sets: Iterable[NamedSet], known: Sequence[Point] = ()) -> None:
        self._attacked = attack_sets(sets)
        self._lines = {(scan.name, k): _Line(scan, k) for scan in scans for k in range(scan.directions)}
        self._points: dict[Ask, Point] = {}
        for point in known:
            self._points[point.ask] = point
        self._rates = {key: self._rates_of(key) for key in self._lines}
        for key, line in self._lines.items():
            line.advance(self._rates[key], self._step(known[0]) if known else S_MAX)

    def next(self) -> Ask | None:
        """A point that is not known yet; None where there is none now, be it that all are or that others must come first."""
        for (name, direction), line in self._lines.items():
            while line.waiting:
                ask = Ask(name, direction, line.waiting.popleft())
                if ask not in self._points:
                    return ask
        return None

    def again(self, ask: Ask) -> None:
        """A point that was handed out and is not coming."""
        self._lines[ask.scan, ask.direction].waiting.appendleft(ask.at)

    def told(self, point: Point) -> None:
        """A point that was measured."""
        key = (point.scan, point.direction)
        self._points[point.ask] = point
        self._rates[key][point.at] = self._rate(point)
        self._lines[key].advance(self._rates[key], self._step(point))

    @property
    def finished(self) -> bool:
        """Whether every point is known."""
        return not any(line.round for line in self._lines.values())

    @property
    def points(self) -> list[Point]:
        """Those known of these scans, in order; what was known of others is left out."""
        asks = [Ask(*key, place) for key, line in self._lines.items() for place in line.places]
        return [self._points[ask] for ask in sorted(asks) if ask in self._points]

    @property
    def total(self) -> int:
        """How many points there are as far as is known now; it grows as scans are refined."""
        return sum(len(line.places) for line in self._lines.values())

    @property
    def done(self) -> int:
        """How many of them are known."""
        return sum(place in self._rates[key] for key, line in self._lines.items() for place in line.places)

    def _rates_of(self, key: tuple[str, int]) -> dict[Where, float]:
        return {ask.at: self._rate(p) for ask, p in self._points.items() if (ask.scan, ask.direction) == key}

    def _rate(self, point: Point) -> float:
        return S_MAX * point.pooled(self._attacked, "asr")

    def _step(self, point: Point) -> float:
        return S_MAX / sum(len(point.hits[one]["asr"]) for one in self._attacked)
