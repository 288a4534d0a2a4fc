"""Contours over a plane as a PNG: attacks above, capability below, models side by side; and the surfaces that a page turns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from components.landscape.schema import Mark, ScanResult
from components.reporting.landscape_curves import (
    Array,
    Key,
    Models,
    Surface,
    attack_keys,
    axis_label,
    capability_keys,
    filled,
    heights,
    label,
    mark_label,
    marks_of,
    not_finite,
    side_keys,
    signed,
    surface,
    triangles,
)
from components.reporting.landscape_style import GREY, PER_ROW, figure, interval_said, looks, panels, png, title

_LEVELS = np.arange(0, 101, 10)
_TOP = 100 - 1e-9
_INK, _PAPER = "#1c2024", "#ffffff"
"""What is written on contours, which are the same in light and dark."""
_RISES = (3, 15, -15, 27, -27, 39, -39, 51, -51, 63, -63)
"""How far above its pin a name may be, in points; the first that is free is taken."""


def planes_png(models: Models, *, confidence: float, dark: bool = False) -> bytes:
    """The picture of a scan with two axes: its first plane."""
    attacks, capability = attack_keys(models)[:1], capability_keys(models)[:1]
    with looks(dark):
        columns, rows = min(len(models), PER_ROW), -(-len(models) // PER_ROW)
        shown = [(key, cmap) for keys, cmap in ((attacks, "viridis"), (capability, "cividis")) for key in keys]
        made = figure(max(5.6, 1.3 + 2.7 * columns), 0.5 + 2.75 * rows * max(1, len(shown)))
        grid = panels(made, len(models), [1.0] * max(1, len(shown)))
        drawn = {model: grid[i // PER_ROW][i % PER_ROW] for i, model in enumerate(models)}
        for model, column in drawn.items():
            for ax, (key, cmap) in zip(column, shown, strict=False):
                _contours(ax, models[model], key, cmap)
            _name_axes(column, models[model], first=any(column is row[0] for row in grid))
            title(column[0], model, models[model], attacks)
        for row in grid:
            for i, (key, cmap) in enumerate(shown):
                _scale(made, [column[i] for column in row], key, cmap)
        made.supxlabel(interval_said(list(models.values()), confidence) + ". Dots: measured points", fontsize=8)
        made.draw_without_rendering()
        made.set_layout_engine("none")
        for model, column in drawn.items():
            for ax in column:
                _mark(made, ax, marks_of(models[model], model) if ax.collections else [])
        return png(made)


def surfaces(models: Models) -> dict[str, Any]:
    """What the page's script draws, as plain JSON types: of every model its first plane, each metric in percent on a grid that
    has all measured points, None where nothing is known."""
    keys = [*attack_keys(models), *side_keys(models), *capability_keys(models)]
    first = next(iter(models.values()))
    return {
        "axes": [axis_label(axis, symbol) for axis, symbol in zip(first["axes"], "αβ", strict=True)],
        "metrics": [label(key) for key in keys],
        "models": [_turned(model, scan, keys) for model, scan in models.items()],
    }


def _turned(model: str, scan: ScanResult, keys: Sequence[Key]) -> dict[str, Any]:
    direction = scan["directions"][0]
    points = [p["at"] for p in direction["points"]]
    x, y = (np.array(sorted({*scan["grid"][i], *(at[i] for at in points)})) for i in (0, 1))
    marks = marks_of(scan, model)
    places = np.array([mark["at"] for mark in marks]).T
    found = [surface(direction, key) for key in keys]
    pins = [_plain(heights(one, *places)) if one else None for one in found]
    return {
        "name": model,
        "x": x.tolist(),
        "y": y.tolist(),
        "z": [_plain(filled(one, x, y)) if one else None for one in found],
        "measured": points,
        "marks": [
            {"name": mark_label(mark), "at": mark["at"], "z": [pin and pin[i] for pin in pins]}
            for i, mark in enumerate(marks)
        ],
    }


def _plain(values: Array | None) -> list[Any] | None:
    """As JSON has them: hundredths, None for NaN."""
    if values is None:
        return None
    plain = np.round(values, 2).astype(object)
    plain[np.isnan(values)] = None
    return list(plain.tolist())


def _contours(ax: Axes, scan: ScanResult, key: Key, cmap: str) -> None:
    ax.set_xlim(scan["grid"][0][0], scan["grid"][0][-1])
    ax.set_ylim(scan["grid"][1][0], scan["grid"][1][-1])
    found = surface(scan["directions"][0], key)
    if found is None:
        ax.text(0.5, 0.5, f"{label(key)}: not measured", transform=ax.transAxes, ha="center", va="center", color=GREY)
        return
    net = triangles(found)
    if net is None:
        ax.scatter(found.x, found.y, c=found.z, cmap=cmap, vmin=0, vmax=100, s=20, zorder=3)
    else:
        # The topmost stretch has no upper end of its own: 100 would be left blank.
        ax.tricontourf(net, np.clip(found.z, 0, _TOP), levels=_LEVELS, cmap=cmap, norm=_shades(cmap))
        _dots(ax, found)
    for x, y in not_finite(scan):
        ax.plot([x], [y], "x", color=_INK, ms=4, mew=1, clip_on=False, zorder=4, path_effects=_edged(2.5))


def _dots(ax: Axes, found: Surface) -> None:
    ax.scatter(found.x, found.y, s=2.5, color=_PAPER, edgecolors=_INK, linewidths=0.25, alpha=0.8, zorder=2)


def _name_axes(column: Sequence[Axes], scan: ScanResult, *, first: bool) -> None:
    for ax in column:
        ax.tick_params(labelleft=first, labelbottom=ax is column[-1])
    column[-1].set_xlabel(axis_label(scan["axes"][0], "α"))
    if first:
        for ax in column:
            ax.set_ylabel(axis_label(scan["axes"][1], "β"))


def _scale(made: Figure, axes: Sequence[Axes], key: Key, cmap: str) -> None:
    """One for all models of a row."""
    shade = ScalarMappable(_shades(cmap), cmap)
    bar = made.colorbar(shade, ax=list(axes), ticks=_LEVELS[::2], aspect=30, pad=0.02)
    bar.set_label(f"{label(key)}, %")
    bar.outline.set_linewidth(0)


def _shades(cmap: str) -> BoundaryNorm:
    """A colour for each stretch between two levels, the same on the contours and beside them."""
    return BoundaryNorm(_LEVELS, colormaps[cmap].N)


def _mark(made: Figure, ax: Axes, marks: Sequence[Mark]) -> None:
    """Pins where models lie, on the edge where they lie outside, each with its name where that covers no other."""
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    ends = [(min(max(m["at"][0], left), right), min(max(m["at"][1], low), high)) for m in marks]
    pins = [ax.transData.transform(end) for end in ends]
    taken = [Bbox.from_bounds(pin[0] - 5, pin[1] - 5, 10, 10) for pin in pins]
    for i, (mark, end) in enumerate(zip(marks, ends, strict=True)):
        inside = all(math.isclose(a, b) for a, b in zip(end, mark["at"], strict=True))
        ax.plot(*end, "o" if inside else "D", ms=5, color=_PAPER, mec=_INK, mew=1.2, clip_on=False, zorder=5)
        said = mark_label(mark) + ("" if inside else f" at {', '.join(signed(x) for x in mark['at'])}")
        nearest = min(
            (pin for j, pin in enumerate(pins) if j != i), key=lambda pin: math.dist(pin, pins[i]), default=pins[i]
        )
        away = tuple(1 if mine >= other else -1 for mine, other in zip(pins[i], nearest, strict=True))
        taken.append(_name(made, ax, said, end, away, taken))


def _edged(width: float) -> list[withStroke]:
    """A light edge, so that ink can be read on every colour."""
    return [withStroke(linewidth=width, foreground=_PAPER)]


def _name(
    made: Figure, ax: Axes, said: str, end: tuple[float, float], away: tuple[int, ...], taken: Sequence[Bbox]
) -> Bbox:
    """Write a name beside a pin, first on the side that lies away from the next pin; returns the room that it takes, in
    pixels."""
    text = ax.annotate(
        said, end, xytext=(0, 0), textcoords="offset points", fontsize=7.5, color=_INK, zorder=6, annotation_clip=False,
        path_effects=_edged(2.2),
        arrowprops={"arrowstyle": "-", "lw": 0.8, "color": _INK, "shrinkA": 0, "shrinkB": 3, "path_effects": _edged(2.0)},
    )  # fmt: skip
    text.set_in_layout(False)
    frame = ax.get_window_extent()
    for rise, side in product(_RISES, (away[0], -away[0])):
        text.set(position=(6 * side, rise if rise == 3 else rise * away[1]), ha="left" if side > 0 else "right")
        text.update_positions(made.canvas.get_renderer())  # type: ignore[attr-defined]
        box = Text.get_window_extent(text)  # an Annotation's own would hold the line to its pin too
        within = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        if within and not any(box.overlaps(other) for other in taken):
            break
    if rise == _RISES[0] and text.arrow_patch is not None:
        text.arrow_patch.set_visible(False)
    return box
