"""The tables of a landscape's page: what was asked, and every figure of every model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from components.landscape.schema import Estimate, LandscapeResult, ScanResult
from components.reporting.landscape_curves import Key, Models, attack_keys, bounds, label, signed, tenths

FIGURES = {
    "visage": "VISAGE",
    "visage_official": "official",
    "depth": "depth",
    "area": "area",
    "width": "width",
    "share": "share, %",
    "sharpness": "sharpness",
}


@dataclass(frozen=True)
class Cell:
    """A figure as it is written; `over` and `prompts` are its intervals over directions and over prompts."""

    value: str
    over: str | None
    prompts: str
    exact: str


@dataclass(frozen=True)
class Row:
    """The figures of one model's one curve."""

    model: str
    curve: str
    cells: dict[str, Cell]


@dataclass(frozen=True)
class MeanTable:
    """What models can do, on average over a scan: percent by model and column."""

    columns: list[str]
    rows: list[tuple[str, list[float | None]]]


def set_rows(results: Mapping[str, LandscapeResult]) -> list[tuple[str, str, str]]:
    """(set, kind, prompts); all numbers where models were not asked equally many."""
    kinds = {name: kind for one in results.values() for name, kind in one["sets"].items()}
    counts = {name: dict.fromkeys(one["prompts"].get(name, 0) for one in results.values()) for name in kinds}
    return [(name, kind, ", ".join(str(n) for n in counts[name])) for name, kind in kinds.items()]


def overview(
    results: Mapping[str, LandscapeResult], scans: Mapping[str, Models]
) -> list[tuple[str, list[Cell | None]]]:
    """Model -> VISAGE of every scan."""
    return [(model, [_visage(models, model) for models in scans.values()]) for model in results]


def figure_rows(models: Models) -> tuple[list[Row], list[Row]]:
    """What is compared first: ASR of all sets and of each, harmful compliance of all; then harmful compliance of each. Curve by
    curve, so that models stand below each other."""
    attacks = attack_keys(models)
    harmful = [(name, "harmful") for name, _ in attacks]
    return _rows(models, [*attacks, *harmful[:1]]), _rows(models, harmful[1:])


def mean_table(models: Models) -> MeanTable:
    """Of metrics other than attacks."""
    keys = dict.fromkeys(
        (name, metric)
        for scan in models.values()
        for direction in scan["directions"]
        for name, found in direction["means"].items()
        for metric in found
    )
    rows = [(model, [_mean(scan, key) for key in keys]) for model, scan in models.items()]
    return MeanTable([label(key) for key in keys], rows)


def measured_rows(models: Models) -> list[tuple[str, str, int, str | None]]:
    """(model, points measured by direction, points of the full grid, how far VISAGE may be off where points were saved)."""
    found = []
    for model, scan in models.items():
        counts = ", ".join(str(len(direction["points"])) for direction in scan["directions"])
        errors = [direction["error"] for direction in scan["directions"] if "error" in direction]
        full = 1
        for axis in scan["grid"]:
            full *= len(axis)
        found.append((model, counts, full, ", ".join(f"{error:.2g}" for error in errors) or None))
    return found


def axis_said(models: Models) -> list[str]:
    """A sentence of every axis."""
    first = next(iter(models.values()))
    return [
        _said(axis, symbol, bounds(models, i))
        for i, (axis, symbol) in enumerate(zip(first["axes"], "αβ", strict=False))
    ]


def _said(axis: Mapping[str, Any], symbol: str, ends: tuple[float, float]) -> str:
    along = f"{symbol} goes from {signed(ends[0])} to {signed(ends[1])}"
    if axis["kind"] == "towards":
        return f"{along} on the way from the model, at 0, to {axis['model']}, at 1."
    long = "row of a tensor" if axis.get("norm") == "filter" else "tensor"
    return f"{along} along a random direction in which every {long} is as long as the model's own; seed {axis.get('seed', 0)}."


def _rows(models: Models, keys: Sequence[Key]) -> list[Row]:
    found = [Row(model, label(key), _cells(scan, key)) for key in keys for model, scan in models.items()]
    return [row for row in found if row.cells]


def _visage(models: Models, model: str) -> Cell | None:
    if model not in models:
        return None
    return next((_cells(models[model], key).get("visage") for key in attack_keys(models)), None)


def _cells(scan: ScanResult, key: Key) -> dict[str, Cell]:
    name, metric = key
    found = scan["numbers"].get(name, {}).get(metric, {})
    cells = {figure: _cell(figure, found[figure]) for figure in FIGURES if figure in found}
    directions = [direction["numbers"].get(name, {}).get(metric) for direction in scan["directions"]]
    if "width" in cells and any(one and one["width_cut"] for one in directions):
        was = cells["width"]
        cells["width"] = Cell(f"≥ {was.value}", was.over, was.prompts, f"{was.exact}; reaches an end of the axis")
    return cells


def _cell(figure: str, found: Estimate) -> Cell:
    scale = 100 if figure == "share" else 1
    write = signed if figure in ("width", "sharpness") else tenths
    prompts = f"{write(scale * found['prompts_low'])}–{write(scale * found['prompts_high'])}"
    exact = f"{scale * found['value']:.4f}; over prompts "
    exact += f"{scale * found['prompts_low']:.4f} to {scale * found['prompts_high']:.4f}"
    over = None
    if found["low"] is not None and found["high"] is not None:
        over = f"{write(scale * found['low'])}–{write(scale * found['high'])}"
        exact += f"; over {found['n']} directions {scale * found['low']:.4f} to {scale * found['high']:.4f}"
    return Cell(write(scale * found["value"]), over, prompts, exact)


def _mean(scan: ScanResult, key: Key) -> float | None:
    name, metric = key
    found = [d["means"][name][metric] for d in scan["directions"] if metric in d["means"].get(name, {})]
    return fmean(found) if found else None
