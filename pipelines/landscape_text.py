"""What `realign landscape` prints: a line for each model and scan, and where models lie on the way to others."""

from __future__ import annotations

from collections.abc import Mapping

from components.landscape.figures import FIGURES, figures_of
from components.landscape.schema import LandscapeResult, ScanResult
from components.reporting.rows import level
from components.reporting.schema import Figure

_LARGE = 1e5
_OFF = 0.99
"""From here on a model's place says nothing: it lies at a right angle."""


def told_lines(results: Mapping[str, LandscapeResult]) -> list[str]:
    """The table, and below it the marks."""
    rows = [("model", "scan", *_TITLES.values(), "points")]
    notes = []
    for name, result in results.items():
        for scan in result["scans"].values():
            figures = figures_of(result, scan["name"])
            cells = [_cell(figures.get(key), key) for key in FIGURES]
            rows.append((name, scan["name"], *cells, str(sum(len(one["points"]) for one in scan["directions"]))))
            notes += _notes(name, scan)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    confidence = next(iter(results.values()))["confidence"]
    meaning = f"VISAGE, depth, area: 0 to 100, the more the safer; width in lengths of the axis ({level(confidence)} interval)"
    return [*lines, meaning, *notes]


_TITLES = {"visage": "VISAGE", "width": "width", "depth": "depth", "area": "area"}


def _cell(figure: Figure | None, key: str) -> str:
    if figure is None:
        return "–"
    digits = 2 if key == "width" else 1
    value, low, high = (_short(figure[name], digits) for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _short(value: float, digits: int = 2) -> str:
    """A number as it is read; one too large, or too small, for that by its power of ten."""
    return f"{value:.{digits}f}" if value == 0 or 1e-3 <= abs(value) < _LARGE else f"{value:.3g}"


def _notes(name: str, scan: ScanResult) -> list[str]:
    """Where the model and the scan's other models lie, what was not finite, and how far a refined VISAGE may be off."""
    lines = []
    if any(0 not in places for places in scan["grid"]):
        lines.append(f"{name}, {scan['name']}: 0 is none of its places, so the model itself was measured besides")
    for one in scan["directions"]:
        near = [mark for mark in one["marks"] if mark["off"] < _OFF]
        for mark in near:
            at = ", ".join(map(_short, mark["at"]))
            place = f"{mark['name']} lies at {at} (off by {mark['off']:.2f} of its distance)"
            lines.append(f"{name}, {scan['name']}: {place}")
        broken = sum(not point["finite"] for point in one["points"])
        if broken:
            lines.append(
                f"{name}, {scan['name']}: {broken} points with weights that are no numbers, counted as incoherent"
            )
    errors = [one["error"] for one in scan["directions"] if "error" in one]
    if errors:
        lines.append(
            f"{name}, {scan['name']}: refined, VISAGE within {max(errors):.1f} of the whole grid's by estimate"
        )
    return lines
