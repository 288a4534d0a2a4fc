"""What the pictures of a landscape show of its points: curves along an axis, surfaces over a plane, marks. No picture yet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.tri import LinearTriInterpolator, Triangulation

from components.landscape.schema import POOLED, DirectionResult, Mark, ScanResult
from components.reporting.pages import METRIC_NAMES
from components.reporting.rows import shortened

Array = npt.NDArray[np.float64]

Models = Mapping[str, ScanResult]
"""What one scan found, by the name that a model is shown under; side by side in this order."""

Key = tuple[str, str]
"""A set (or POOLED) and one of its metrics: what one curve or surface shows."""

FAR = 0.99
"""From here on a mark's projection says nothing of where the model lies (any model's onto a random direction): not drawn."""

_CAPABILITY = ("task", "over_refusal")


@dataclass(frozen=True)
class Curve:
    """A rate along an axis in percent: mean, lowest and highest over directions at each of `x`."""

    x: Array
    mean: Array
    low: Array
    high: Array
    directions: int


@dataclass(frozen=True)
class Surface:
    """A rate over a plane in percent, at the measured points."""

    x: Array
    y: Array
    z: Array


def label(key: Key) -> str:
    """What a legend calls it."""
    name, metric = key
    said = METRIC_NAMES.get(metric, metric)
    return said if name == POOLED else f"{said} ({name})"


def attack_keys(models: Models) -> list[Key]:
    """ASR of all sets that count, and of every set that is not those sets by itself."""
    keys = [key for key in _keys(models) if key[1] == "asr"]
    if (POOLED, "asr") not in keys:
        return keys
    return [(POOLED, "asr"), *(key for key in keys if key[0] != POOLED and not _as_pooled(models, key[0]))]


def side_keys(models: Models) -> list[Key]:
    """What the attack curve is made of: harmful compliance and incoherence, of the sets that the first attack curve counts."""
    keys = _keys(models)
    return [
        (name, metric)
        for name, _ in attack_keys(models)[:1]
        for metric in ("harmful", "incoherent")
        if (name, metric) in keys
    ]


def capability_keys(models: Models) -> list[Key]:
    """Tasks, then over-refusal; right answers to harmless prompts where there is no task."""
    keys = _keys(models)
    wanted = _CAPABILITY if any(metric == "task" for _, metric in keys) else ("exact", "over_refusal")
    return [key for metric in wanted for key in keys if key[1] == metric]


def curve(scan: ScanResult, key: Key) -> Curve | None:
    """Of a line; None where it was not measured. Directions with points of their own (refined) are joined by straight lines
    between their points, as they are drawn."""
    lines = [line for line in (_along(direction, key) for direction in scan["directions"]) if len(line[0])]
    if not lines:
        return None
    x = np.unique(np.concatenate([line[0] for line in lines]))
    y = np.stack([np.interp(x, at, rates, left=np.nan, right=np.nan) for at, rates in lines])
    x, y = x[~np.isnan(y).all(axis=0)], y[:, ~np.isnan(y).all(axis=0)]
    return Curve(x, np.nanmean(y, axis=0), np.nanmin(y, axis=0), np.nanmax(y, axis=0), len(lines))


def surface(direction: DirectionResult, key: Key) -> Surface | None:
    """Of a plane; None where it was not measured."""
    name, metric = key
    found = [
        (*p["at"], 100 * p["rates"][name][metric]) for p in direction["points"] if metric in p["rates"].get(name, {})
    ]
    return Surface(*np.array(found, dtype=np.float64).T) if found else None


def triangles(found: Surface) -> Triangulation | None:
    """Between the measured points; None where they lie on a line."""
    spread = np.stack([found.x - found.x[0], found.y - found.y[0]])
    return Triangulation(found.x, found.y) if np.linalg.matrix_rank(spread) == 2 else None


def filled(found: Surface, x: Array, y: Array) -> Array | None:
    """The surface on a grid that has all measured points, `[len(y), len(x)]`: as measured there, linear in the triangles
    between them, NaN outside of all; None where the points lie on a line."""
    grid = heights(found, *np.meshgrid(x, y))
    if grid is not None:
        grid[np.searchsorted(y, found.y), np.searchsorted(x, found.x)] = found.z
    return grid


def heights(found: Surface, x: Array, y: Array) -> Array | None:
    """Of the surface at any places, in their shape; NaN and None as of `filled`."""
    net = triangles(found)
    if net is None:
        return None
    return np.asarray(LinearTriInterpolator(net, found.z)(x, y).filled(np.nan), dtype=np.float64)


def not_finite(scan: ScanResult) -> list[list[float]]:
    """Where weights were no numbers, in any direction."""
    places = {tuple(p["at"]) for direction in scan["directions"] for p in direction["points"] if not p["finite"]}
    return [list(at) for at in sorted(places)]


def marks_of(scan: ScanResult, model: str) -> list[Mark]:
    """The model itself, at 0, then the others: those of the first direction that lie near enough to it to be drawn."""
    first = scan["directions"][0]["marks"] if scan["directions"] else []
    near = [mark for mark in first if mark["off"] < FAR and all(math.isfinite(x) for x in mark["at"])]
    return [{"name": model, "at": [0.0] * len(scan["axes"]), "off": 0.0}, *(m for m in near if m["name"] != model)]


def mark_label(mark: Mark, longest: int = 22) -> str:
    """Its name, cut, and how far it lies off where that is to be seen."""
    off = f" ({100 * mark['off']:.0f} % off)" if mark["off"] >= 0.05 else ""
    return shortened(mark["name"], longest) + off


def tenths(value: float) -> str:
    """One digit after the point, with a real minus."""
    return f"{round(value, 1) + 0.0:.1f}".replace("-", "−")


def signed(value: float) -> str:
    """Three digits that say something, with a real minus: a place on an axis."""
    return f"{value:.3g}".replace("-", "−")


def bounds(models: Models, axis: int) -> tuple[float, float]:
    """From where to where an axis goes, over all models."""
    ends = [end for scan in models.values() for end in (scan["grid"][axis][0], scan["grid"][axis][-1])]
    return min(ends), max(ends)


def axis_label(axis: Mapping[str, Any], symbol: str, longest: int = 28) -> str:
    """What is written along it."""
    if axis["kind"] == "towards":
        return f"{symbol}, towards {shortened(axis['model'], longest)}"
    return f"{symbol}, random" + (", by rows" if axis.get("norm") == "filter" else "")


def _along(direction: DirectionResult, key: Key) -> tuple[Array, Array]:
    name, metric = key
    found = {
        p["at"][0]: 100 * p["rates"][name][metric] for p in direction["points"] if metric in p["rates"].get(name, {})
    }
    return np.array(sorted(found)), np.array([found[x] for x in sorted(found)])


def _rates(models: Models) -> Sequence[dict[str, dict[str, float]]]:
    return [p["rates"] for scan in models.values() for direction in scan["directions"] for p in direction["points"]]


def _keys(models: Models) -> list[Key]:
    return list(dict.fromkeys((name, m) for rates in _rates(models) for name, found in rates.items() for m in found))


def _as_pooled(models: Models, name: str) -> bool:
    found = [
        (rates[name]["asr"], rates[POOLED]["asr"]) for rates in _rates(models) if name in rates and POOLED in rates
    ]
    return all(math.isclose(one, pooled, abs_tol=1e-9) for one, pooled in found)
