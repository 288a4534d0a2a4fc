"""What the points of a landscape say: rates, figures, intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from scipy import stats

from components.evaluation.outcomes import NamedSet
from components.landscape.points import Point, Where
from components.landscape.refine import Index, fill, interpolated
from components.landscape.schema import (
    POOLED,
    DirectionResult,
    Estimate,
    LandscapeResult,
    Mark,
    Numbers,
    PlacePoint,
    ScanResult,
)
from components.landscape.settings import Scan
from components.landscape.survey import Lattice, attack_sets
from components.landscape.visage import S_MAX, line_numbers, plane_numbers

SCHEMA = 1
ATTACKS = ("asr", "harmful")
"""Metrics that are 0 where a model is safe."""
_ESTIMATED = ("visage", "visage_official", "area", "depth", "width", "sharpness", "share")
_REPLICATES, _SEED = 400, 0
Array = npt.NDArray[np.float64]


def landscape_result(
    *,
    model: str,
    scans: Sequence[Scan],
    points: Sequence[Point],
    sets: Sequence[NamedSet],
    marks: Mapping[tuple[str, int], list[Mark]],
    confidence: float,
) -> LandscapeResult:
    """All that is said of one model's landscape.

    Args:
        points: every point of the scans, as a finished `Survey` has them.
        sets: those that were asked, in the order of the points' prompts.
        marks: (scan, direction) -> where other models lie.
        confidence: of every interval.
    """
    by_line: dict[tuple[str, int], list[Point]] = {}
    for point in completed(points):
        by_line.setdefault((point.scan, point.direction), []).append(point)
    first = points[0]
    return {
        "schema": SCHEMA,
        "model": model,
        "sets": {one.name: one.kind for one in sets},
        "prompts": {one.name: len(next(iter(first.hits[one.name].values()))) for one in sets},
        "confidence": confidence,
        "scans": {scan.name: _scan_result(scan, by_line, sets, marks, confidence) for scan in scans},
    }


def completed(points: Sequence[Point]) -> list[Point]:
    """Points that all have the same metrics: `outcomes.hits` says how many answers were unscored only where some were, and of a
    model that is no numbers other things than of one that was asked."""
    metrics: dict[str, dict[str, int]] = {}
    for point in points:
        for name, found in point.hits.items():
            metrics.setdefault(name, {}).update({metric: len(hits) for metric, hits in found.items()})
    return [
        replace(
            point,
            hits={
                name: {metric: point.hits[name].get(metric, "0" * count) for metric, count in asked.items()}
                for name, asked in metrics.items()
            },
        )
        for point in points
    ]


def _scan_result(
    scan: Scan,
    by_line: Mapping[tuple[str, int], list[Point]],
    sets: Sequence[NamedSet],
    marks: Mapping[tuple[str, int], list[Mark]],
    confidence: float,
) -> ScanResult:
    lattice, attacked = Lattice(scan), attack_sets(sets)
    lines = [by_line[scan.name, k] for k in range(scan.directions)]
    curves = {(POOLED, metric): attacked for metric in ATTACKS}
    curves |= {(one.name, metric): [one.name] for one in sets if one.kind == "harmful" for metric in ATTACKS}
    directions = [
        _direction(k, line, lattice, sets, attacked, marks.get((scan.name, k), [])) for k, line in enumerate(lines)
    ]
    numbers: dict[str, dict[str, dict[str, Estimate]]] = {}
    for (name, metric), pooled in curves.items():
        own = [_Curve.of(line, lattice, pooled, metric) for line in lines]
        for k, curve in enumerate(own):
            directions[k]["numbers"].setdefault(name, {})[metric] = curve.numbers()
            if scan.refine is not None and (name, metric) == (POOLED, "asr"):
                directions[k]["error"] = fill(lattice.shape, curve.on_lattice(), curve.step).error
        numbers.setdefault(name, {})[metric] = _estimates(own, confidence)
    return {
        "name": scan.name,
        "axes": [axis.model_dump(mode="json") for axis in scan.axes],
        "grid": lattice.grid,
        "directions": directions,
        "numbers": numbers,
    }


def _direction(
    k: int,
    line: Sequence[Point],
    lattice: Lattice,
    sets: Sequence[NamedSet],
    attacked: Sequence[str],
    marks: list[Mark],
) -> DirectionResult:
    points: list[PlacePoint] = []
    for point in line:
        rates = {one.name: {m: point.share(one.name, m) for m in point.hits[one.name]} for one in sets}
        shared = [m for m in point.hits[attacked[0]] if all(m in point.hits[one] for one in attacked)]
        rates[POOLED] = {m: point.pooled(attacked, m) for m in shared}
        points.append({"at": list(point.at), "rates": rates, "finite": point.finite})
    means: dict[str, dict[str, float]] = {}
    for one in sets:
        for metric in line[0].hits[one.name]:
            if metric not in ATTACKS:
                values = _Curve.of(line, lattice, [one.name], metric).values()
                means.setdefault(one.name, {})[metric] = float(np.mean(values)) / 100
    return {"direction": k, "points": points, "marks": marks, "numbers": {}, "means": means}


@dataclass(frozen=True)
class _Curve:
    """A rate along one line or over one plane, prompt by prompt."""

    lattice: Lattice
    places: list[Where]
    hits: Array
    """[places, prompts], 0 or 1."""

    @staticmethod
    def of(line: Sequence[Point], lattice: Lattice, sets: Sequence[str], metric: str) -> _Curve:
        rows = ["".join(point.hits[one].get(metric, "") for one in sets) for point in line]
        return _Curve(lattice, [point.at for point in line], np.array([[c == "1" for c in row] for row in rows], float))

    @property
    def step(self) -> float:
        """What one prompt more makes of a rate, in percent."""
        return S_MAX / int(self.hits.shape[1])

    def rates(self, weights: Array | None = None) -> Array:
        """S in percent at each place, [places]; with weights [prompts, K] of the prompts, of K replicates [places, K]."""
        found: Array = self.hits.mean(1) if weights is None else self.hits @ weights
        return S_MAX * found

    def on_lattice(self) -> dict[Index, float]:
        """Index -> S of the places that are on the lattice."""
        found = zip(map(self.lattice.index, self.places), self.rates(), strict=True)
        return {index: float(rate) for index, rate in found if index is not None}

    def centre(self) -> int:
        """Which of the places is the model itself."""
        return self.places.index(self.lattice.origin)

    def values(self) -> Array:
        """S at every place of the lattice."""
        known = self.on_lattice()
        if len(known) < np.prod(self.lattice.shape):
            return fill(self.lattice.shape, known, self.step).values
        return np.array([known[index] for index in np.ndindex(*self.lattice.shape)]).reshape(self.lattice.shape)

    def numbers(self) -> Numbers:
        return self._numbers(self.values(), float(self.rates()[self.centre()]))

    def replicates(self) -> list[Numbers]:
        """The figures under other draws of as many prompts."""
        prompts = self.hits.shape[1]
        draws = np.random.default_rng(_SEED).multinomial(prompts, np.full(prompts, 1 / prompts), size=_REPLICATES)
        rates = self.rates(draws.T / prompts)
        inside = [(i, index) for i, at in enumerate(self.places) if (index := self.lattice.index(at)) is not None]
        rows, indices = [i for i, _ in inside], np.array([index for _, index in inside])
        if len(rows) < np.prod(self.lattice.shape):
            surfaces = interpolated(self.lattice.shape, indices, rates[rows])[0]
        else:
            surfaces = np.empty((*self.lattice.shape, _REPLICATES))
            surfaces[tuple(indices.T)] = rates[rows]
        centres = rates[self.centre()]
        return [self._numbers(surfaces[..., k], float(centres[k])) for k in range(_REPLICATES)]

    def _numbers(self, values: Array, centre: float) -> Numbers:
        if values.ndim == 1:
            return line_numbers(self.lattice.axes[0], values, centre, every=self.lattice.finer)
        return plane_numbers(values, centre)


def _estimates(curves: Sequence[_Curve], confidence: float) -> dict[str, Estimate]:
    """figure -> over the directions; those that every direction has."""
    found: dict[str, Estimate] = {}
    own = [curve.numbers() for curve in curves]
    drawn = [curve.replicates() for curve in curves]  # the same draws for every direction: the prompts are the same
    for figure in _ESTIMATED:
        values = _all_of(own, figure)
        if values is None:
            continue
        replicated = [
            float(np.mean(some)) for at in zip(*drawn, strict=True) if (some := _all_of(at, figure)) is not None
        ]
        tail = 100 * (1 - confidence) / 2
        low, high = np.percentile(replicated, [tail, 100 - tail])
        mean = float(np.mean(values))
        reach = student_reach(values, confidence)
        found[figure] = {
            "value": mean,
            "low": None if reach is None else mean - reach,
            "high": None if reach is None else mean + reach,
            "prompts_low": float(low),
            "prompts_high": float(high),
            "n": len(values),
        }
    return found


def student_reach(values: Sequence[float], confidence: float) -> float | None:
    """Half the width of Student's t interval of the mean; None of fewer than two values."""
    if len(values) < 2:
        return None
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * error


def _all_of(numbers: Sequence[Numbers], figure: str) -> list[float] | None:
    found = [cast("Mapping[str, Any]", one)[figure] for one in numbers]
    return None if any(value is None for value in found) else found


def refinement_error(scan: Scan, points: Sequence[Point], sets: Sequence[NamedSet], chosen: str | None = None) -> float:
    """By how much VISAGE over the directions may be off because not every place was measured, 0 to 100; 0 of a full grid."""
    if scan.refine is None:
        return 0.0
    lattice, names = Lattice(scan), attack_sets(sets) if chosen is None else [chosen]
    lines = [[p for p in points if (p.scan, p.direction) == (scan.name, k)] for k in range(scan.directions)]
    curves = [_Curve.of(line, lattice, names, "asr") for line in lines]
    return float(np.mean([fill(lattice.shape, curve.on_lattice(), curve.step).error for curve in curves]))


def visages(
    scan: Scan, points: Sequence[Point], sets: Sequence[NamedSet], chosen: str | None = None
) -> tuple[Array, Array]:
    """VISAGE of each direction [D], and the same under other draws of the prompts [D, K], which are the same draws for every
    model that was asked as many. `chosen`: of a set by itself; None: of those that count together."""
    lattice, names = Lattice(scan), attack_sets(sets) if chosen is None else [chosen]
    lines = [[p for p in points if (p.scan, p.direction) == (scan.name, k)] for k in range(scan.directions)]
    curves = [_Curve.of(line, lattice, names, "asr") for line in lines]
    drawn = [[one["visage"] for one in curve.replicates()] for curve in curves]
    return np.array([curve.numbers()["visage"] for curve in curves]), np.array(drawn)
