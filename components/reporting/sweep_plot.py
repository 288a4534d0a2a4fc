"""The picture of a sweep: every candidate by two objectives at a time, the front, the run's own settings, the winner."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from components.reporting.landscape_style import BLUE, GREY, ORANGE, VERMILLION, figure, looks, png
from components.reporting.pages import METRIC_NAMES
from components.storage import storage_errors, write_atomic
from components.sweeps.result import Entry, SweepResult, demand_of
from components.sweeps.settings import Objective

_SIDE = 3.6
"""Inches of one plane."""
_MOST = 3
"""Planes of more pairs of objectives would be too small to read."""


def write_front(result: SweepResult, path: Path) -> None:
    """Write the picture as a PNG. Raises StorageError."""
    with storage_errors(path):
        write_atomic(path, front_png(result))


def front_png(result: SweepResult) -> bytes:
    """A plane for each pair of objectives, the first three pairs; better is lower left."""
    objectives = [Objective(**one) for one in result["objectives"]]
    pairs = list(combinations(range(len(objectives)), 2))[:_MOST] or [(0, 0)]
    with looks(dark=False):
        drawn = figure(_SIDE * len(pairs) + 0.3, _SIDE + 0.9)
        axes = [drawn.add_subplot(1, len(pairs), place + 1) for place in range(len(pairs))]
        for plane, (x, y) in zip(axes, pairs, strict=True):
            _draw(plane, result, objectives[x], objectives[y])
        handles, labels = axes[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        drawn.suptitle(f"{result['name']}: candidates on the dev sets (lower left is better)", fontsize=10)
        return png(drawn)


def _draw(plane: Any, result: SweepResult, x: Objective, y: Objective) -> None:
    tried = [one["rates"] for one in result["trials"] if x.name in one["rates"] and y.name in one["rates"]]
    plane.scatter(
        [100 * rates[x.name] for rates in tried], [100 * rates[y.name] for rates in tried],
        s=12, color=GREY, alpha=0.55, linewidths=0, clip_on=False, label="tried (stopped ones as far as asked)",
    )  # fmt: skip
    for entries, marker, size, colour, label in (
        # The largest first: several are often one point.
        (result["front"], "o", 150, BLUE, "front"),
        (result["own"], "D", 60, ORANGE, "the run's own"),
        ([result["picked"]], "*", 60, VERMILLION, "picked"),
    ):
        at = [_place(entries, one) for one in (x, y)]
        plane.scatter(
            *at, s=size, marker=marker, facecolor=colour, edgecolor="white", linewidths=0.7, clip_on=False, label=label
        )
    for objective, line in ((x, plane.axvline), (y, plane.axhline)):
        if objective.demand is not None:
            line(100 * objective.demand, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    plane.set_xlabel(_label(x))
    plane.set_ylabel(_label(y))
    for objective, limits in ((x, plane.set_xlim), (y, plane.set_ylim)):
        limits(_ends(result, objective))


def _ends(result: SweepResult, objective: Objective) -> tuple[float, float]:
    """From the best rate there can be to a little beyond the worst that was seen or is demanded."""
    seen = [objective.loss(one["rates"][objective.name]) for one in result["trials"] if objective.name in one["rates"]]
    demanded = [objective.most_loss] if objective.demand is not None else []
    worst = min(1.0, 1.1 * max([*seen, *demanded, 0.02]))
    return (100.0, 100 * (1 - worst)) if objective.grows else (0.0, 100 * worst)


def _place(entries: Sequence[Entry], objective: Objective) -> list[float]:
    return [100 * one["rates"][objective.name]["value"] for one in entries]


def _label(objective: Objective) -> str:
    said = METRIC_NAMES.get(objective.metric, objective.metric)
    said += f" ({objective.set})" if objective.set is not None else ""
    demand = f", demand {demand_of(objective)}" if objective.demand is not None else ""
    return f"{said}, percent ({'falls' if objective.grows else 'grows'} this way{demand})"
