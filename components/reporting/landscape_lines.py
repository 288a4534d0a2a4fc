"""Curves along an axis as a PNG: attacks above, capability below, models side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator

from components.landscape.schema import Mark, ScanResult
from components.reporting.landscape_curves import (
    Key,
    Models,
    attack_keys,
    axis_label,
    capability_keys,
    curve,
    label,
    mark_label,
    marks_of,
    not_finite,
    side_keys,
    signed,
)
from components.reporting.landscape_style import (
    BLUE,
    DASHES,
    GREEN,
    GREY,
    ORANGE,
    PER_ROW,
    PINK,
    SKY,
    VERMILLION,
    figure,
    interval_said,
    looks,
    panels,
    png,
    title,
)
from components.reporting.rows import shortened

_MARK_ROW = 11.0
"""Points between the baselines of two rows of marks' names."""


def lines_png(models: Models, *, confidence: float, dark: bool = False) -> bytes:
    """The picture of a scan with one axis."""
    attacks, sides, capability = attack_keys(models), side_keys(models), capability_keys(models)
    styles = _styles(attacks, sides, capability)
    shown = [[*sides, *reversed(attacks)], capability] if capability else [[*sides, *reversed(attacks)]]
    with looks(dark):
        columns, rows = min(len(models), PER_ROW), -(-len(models) // PER_ROW)
        made = figure(max(5.6, 0.7 + 2.9 * columns), 0.7 + rows * (4.6 if capability else 3.2))
        grid = panels(made, len(models), [3.0, 1.8][: len(shown)])
        drawn = {model: grid[i // PER_ROW][i % PER_ROW] for i, model in enumerate(models)}
        for model, column in drawn.items():
            _column(column, models[model], shown, styles)
            _tick(column, first=any(column is row[0] for row in grid))
        _legend(made, models, styles, confidence)
        _mark(made, models, drawn, attacks)
        return png(made)


def _styles(attacks: Sequence[Key], sides: Sequence[Key], capability: Sequence[Key]) -> dict[Key, dict[str, Any]]:
    """Key -> how its line looks. Colour says the metric, dashes the set."""
    found: dict[Key, dict[str, Any]] = {}
    for i, key in enumerate(attacks):
        colour = VERMILLION if i == 0 else (BLUE, SKY)[(i - 1) % 2]
        found[key] = {"color": colour, "lw": 2.2 if i == 0 else 1.6, "ls": "-" if i == 0 else DASHES[(i + 1) // 2 % 4]}
    for key in sides:
        found[key] = {
            "color": PINK if key[1] == "harmful" else GREY,
            "lw": 1.0,
            "ls": DASHES[0 if key[1] == "harmful" else 2],
        }
    of_metric: dict[str, int] = {}
    for key in capability:
        turn = of_metric[key[1]] = of_metric.get(key[1], -1) + 1
        found[key] = {"color": ORANGE if key[1] == "over_refusal" else GREEN, "lw": 1.6, "ls": DASHES[turn % 4]}
    return found


def _column(
    axes: Sequence[Axes], scan: ScanResult, keys: Sequence[Sequence[Key]], styles: Mapping[Key, dict[str, Any]]
) -> None:
    missing = [label(key) for shown in keys for key in shown if curve(scan, key) is None]
    for ax, shown in zip(axes, keys, strict=False):
        ax.set_ylim(-3, 103)
        ax.set_xlim(scan["grid"][0][0], scan["grid"][0][-1])
        ax.grid(axis="y", lw=0.5)
        ax.set_yticks(range(0, 101, 25))
        for key in shown:
            found = curve(scan, key)
            if found is None:
                continue
            points: dict[str, Any] = (
                {"marker": "o", "ms": 2.5} if found.directions == 1 and styles[key]["lw"] > 1 else {}
            )
            ax.plot(found.x, found.mean, **styles[key], **points)
            if found.directions > 1 and styles[key]["lw"] > 1:
                ax.fill_between(found.x, found.low, found.high, color=styles[key]["color"], alpha=0.12, lw=0)
    for at in not_finite(scan):
        (cross,) = axes[0].plot(at, [100.0], "x", color=axes[0].xaxis.label.get_color(), ms=5, zorder=5, clip_on=False)
        cross.set_in_layout(False)
    lacks = f"\nnot measured: {shortened(', '.join(missing), 40)}" if missing else ""
    axes[-1].set_xlabel(axis_label(scan["axes"][0], "α") + lacks)


def _tick(axes: Sequence[Axes], *, first: bool) -> None:
    for ax, name in zip(axes, ("attacks, %", "capability, %"), strict=False):
        ax.tick_params(labelleft=first, labelbottom=ax is axes[-1])
        if first:
            ax.set_ylabel(name)
    axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))


def _legend(made: Figure, models: Models, styles: Mapping[Key, dict[str, Any]], confidence: float) -> None:
    handles: list[Any] = [Line2D([], [], **how) for how in styles.values()]
    names = [label(key) for key in styles]
    directions = max(len(scan["directions"]) for scan in models.values())
    if directions > 1:
        handles.append(Patch(color=GREY, alpha=0.3, lw=0))
        names.append(f"mean and lowest to highest of {directions} directions")
    if any(not_finite(scan) for scan in models.values()):
        handles.append(Line2D([], [], marker="x", ls="", color=made.axes[0].xaxis.label.get_color(), ms=5))
        names.append("weights are not finite")
    width = made.get_figwidth()
    made.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=max(2, min(len(names), int(width / 1.75))),
        title=interval_said(list(models.values()), confidence),
        title_fontsize=8,
    )


def _mark(made: Figure, models: Models, drawn: Mapping[str, Sequence[Axes]], attacks: Sequence[Key]) -> None:
    """Lines where models lie, named above in as many rows as keep the names apart. Widths are known once all is laid out."""
    for model, column in drawn.items():
        title(column[0], model, models[model], attacks, above=_MARK_ROW)
    made.draw_without_rendering()
    rows = max(_mark_one(column, marks_of(models[model], model), made.dpi) for model, column in drawn.items())
    for model, column in drawn.items():
        title(column[0], model, models[model], attacks, above=_MARK_ROW * rows)


def _mark_one(column: Sequence[Axes], marks: Sequence[Mark], dpi: float) -> int:
    """How many rows the names take."""
    low, high = column[0].get_xlim()
    ends: list[float] = []
    for mark in sorted(marks, key=lambda m: m["at"][0]):
        x, said = mark["at"][0], mark_label(mark)
        if low <= x <= high:
            for ax in column:
                dashes = "-" if mark["off"] < 0.05 else (0, (3, 3))
                ax.axvline(x, color=ax.xaxis.label.get_color(), lw=0.8, ls=dashes, zorder=1)
        else:
            said = f"← {said} at {signed(x)}" if x < low else f"{said} at {signed(x)} →"
        text = column[0].annotate(
            said, (min(max(x, low), high), 1), xycoords=("data", "axes fraction"), xytext=(0, 0), textcoords="offset points",
            fontsize=7.5, ha="center", va="bottom", annotation_clip=False,
        )  # fmt: skip
        _settle(column[0], text, ends, dpi)
    return len(ends)


def _settle(ax: Axes, text: Annotation, ends: list[float], dpi: float) -> None:
    """Put a name into the first row that has room for it, kept between the ends of its panel. `ends`: of the rows, pixels."""
    box, frame = text.get_window_extent(), ax.get_window_extent()
    shift = max(0.0, frame.x0 - box.x0) - max(0.0, box.x1 - frame.x1)
    row = next((i for i, end in enumerate(ends) if end < box.x0 + shift), len(ends))
    ends[row : row + 1] = [box.x1 + shift + 4]
    text.set_position((shift * 72 / dpi, 2 + _MARK_ROW * row))
    text.set_in_layout(False)
