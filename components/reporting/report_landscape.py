"""The report's landscapes: curves along each axis as SVG, from the `landscape.json` files that a summary names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from pydantic import TypeAdapter, ValidationError

from components.landscape.schema import LandscapeResult, ScanResult
from components.reporting.landscape_curves import (
    Key,
    Models,
    attack_keys,
    axis_label,
    capability_keys,
    curve,
    label,
    marks_of,
    tenths,
)
from components.reporting.rows import shortened
from components.reporting.schema import FinetuneSummary, LandscapeSummary, RunSummary

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 340, 220, 36, 10, 40, 42
_SCANS = 3
"""Scans of a finetune that the report draws; its landscape page has all."""
_OFF = 0.5
"""A model that lies further off an axis, as a share of its distance, is not marked on it."""

Results = dict[str, LandscapeResult]


def read_results(summary: RunSummary, one: FinetuneSummary) -> Results:
    """Model (aligned, before, realigned) -> what its landscapes say; those whose files are there and whole."""
    own = one.get("landscape", {})
    files: dict[str, list[LandscapeSummary | None]] = {
        "aligned": [summary.get("landscape"), own.get("between")],
        "before": [own.get("before")],
        "realigned": [own.get("realigned")],
    }
    found: Results = {}
    for model, some in files.items():
        results = [result for told in some if told is not None and (result := _read(Path(told["path"]))) is not None]
        if results:
            scans = {name: scan for result in results for name, scan in result["scans"].items()}
            found[model] = {**results[0], "scans": scans}
    return found


@dataclass(frozen=True)
class Drawing:
    """A scan as it is drawn."""

    scan: str
    charts: list[Markup]
    """One for each model."""
    curves: list[str]
    """What they show, in the order of their styles."""


def curve_charts(results: Results) -> list[Drawing]:
    """Of the scans along one axis, in the order they are there."""
    scans: dict[str, dict[str, ScanResult]] = {}
    for model, result in results.items():
        for name, scan in result["scans"].items():
            if len(scan["axes"]) == 1:
                scans.setdefault(name, {})[model] = scan
    drawn: list[Drawing] = []
    for name, models in list(scans.items())[:_SCANS]:
        keys = _keys(models)
        drawn.append(
            Drawing(name, [_chart(model, scan, keys) for model, scan in models.items()], list(map(label, keys)))
        )
    return drawn


def _keys(models: Models) -> list[Key]:
    """The attack curve, the first task's and the first over-refusal's."""
    found = {metric: (name, metric) for name, metric in reversed(capability_keys(models))}
    return [
        *attack_keys(models)[:1],
        *(found[metric] for metric in ("task", "exact", "over_refusal") if metric in found),
    ]


def _read(path: Path) -> LandscapeResult | None:
    try:
        return TypeAdapter(LandscapeResult).validate_json(path.read_bytes())
    except (OSError, ValidationError):  # the workspace was moved or cleared; the summary's figures remain
        return None


def _chart(model: str, scan: ScanResult, keys: Sequence[Key]) -> Markup:
    """One model's curves. A line's dashes say which metric it is, beside its colour."""
    low, high = scan["grid"][0][0], scan["grid"][0][-1]
    parts = [
        Markup(
            '<svg class="chart" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img"><title>{t}</title>'
        ).format(w=_WIDTH, h=_HEIGHT, t=f"{model}, along {scan['name']}"),
        Markup('<text class="head" x="0" y="14">{}</text>').format(f"{model}{_visage(scan, keys)}"),
    ]
    for percent in (0, 25, 50, 75, 100):
        y = _y(percent)
        parts.append(Markup('<path class="grid" d="M{} {}H{}"/>').format(_LEFT, y, _WIDTH - _RIGHT))
        parts.append(Markup('<text class="tick end" x="{}" y="{}">{}</text>').format(_LEFT - 6, y + 4, percent))
    for at, anchor in ((low, "start"), (0.0, "middle"), (high, "end")):
        if low <= at <= high:
            parts.append(_text(_x(at, low, high), _HEIGHT - 24, f"{at:g}".replace("-", "−"), anchor))
    parts.append(_text(_LEFT + (_WIDTH - _LEFT - _RIGHT) / 2, _HEIGHT - 6, axis_label(scan["axes"][0], "α"), "middle"))
    for i, key in enumerate(keys):
        parts.append(_curve(scan, key, i))
    parts += _marks(scan, model, low, high)
    return Markup("\n").join([*parts, Markup("</svg>")])


def _curve(scan: ScanResult, key: Key, style: int) -> Markup:
    """The mean over directions, and behind it lowest to highest; nothing where it was not measured."""
    found = curve(scan, key)
    if found is None:
        return Markup("")
    low, high = scan["grid"][0][0], scan["grid"][0][-1]
    xs = [_x(x, low, high) for x in found.x]
    line = "L".join(f"{x} {_y(y)}" for x, y in zip(xs, found.mean, strict=True))
    drawn = Markup('<path class="curve c{}" d="M{}"><title>{}</title></path>').format(style, line, label(key))
    if found.directions == 1 or style:
        return drawn
    up = [f"{x} {_y(y)}" for x, y in zip(xs, found.high, strict=True)]
    down = [f"{x} {_y(y)}" for x, y in zip(xs, found.low, strict=True)]
    band = "L".join([*up, *reversed(down)])
    return Markup('<path class="band c{}" d="M{}Z"/>{}').format(style, band, drawn)


def _marks(scan: ScanResult, model: str, low: float, high: float) -> list[Markup]:
    parts = []
    marks = [m for m in marks_of(scan, model) if m["off"] <= _OFF and low <= m["at"][0] <= high]
    for i, mark in enumerate(sorted(marks, key=lambda one: one["at"][0])):
        x = _x(mark["at"][0], low, high)
        parts.append(Markup('<path class="here" d="M{} {}V{}"/>').format(x, _TOP, _y(0)))
        anchor = "middle" if _LEFT + 30 < x < _WIDTH - 40 else "end" if x > _WIDTH / 2 else "start"
        parts.append(_text(x, _TOP - 4 - (10 if i % 2 else 0), shortened(mark["name"], 16), anchor))
    return parts


def _visage(scan: ScanResult, keys: Sequence[Key]) -> str:
    """Of a scan of random directions alone: towards a model it says nothing of how safe this one is."""
    if any(axis["kind"] != "random" for axis in scan["axes"]):
        return ""
    found = scan["numbers"].get(keys[0][0], {}).get("asr", {}).get("visage") if keys else None
    return f", VISAGE {tenths(found['value'])}" if found else ""


def _text(x: float, y: float, said: str, anchor: str) -> Markup:
    return Markup('<text class="tick {}" x="{}" y="{}">{}</text>').format(anchor, x, y, said)


def _x(at: float, low: float, high: float) -> float:
    return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * (float(at) - low) / (high - low), 1)


def _y(percent: float) -> float:
    return round(_TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - min(max(float(percent), 0.0), 100.0) / 100), 1)
