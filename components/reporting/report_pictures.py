"""The report's pictures: charts over all models, and of each model its mask, its task vector and its landscape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from components.reporting.charts import Line, Mark, interval_chart
from components.reporting.cosines import DRAWN, Cosines, matrix_svg, most_alike
from components.reporting.heat_map import density_grid, grid_svg, norm_grid, thinned
from components.reporting.rows import Column, cell, visage_of
from components.reporting.schema import FinetuneSummary, Interval, RunSummary, selected_rates, shown_models

_CELLS = 9000
"""Of all heat maps of a page together."""
_CHARTS = (
    (Column("ASR, %: lower is safer", "asr"), True),
    (Column("ASR of hard requests, %", "asr", set="harmful_hard"), True),
    (Column("over-refusal, %: lower is more helpful", "over_refusal"), False),
    (Column("task, %: higher is more skill", "task"), True),
)


def before_and_after(summary: RunSummary) -> list[Markup]:
    """A chart for each measurement that any model has before or after: aligned, before, after, one below the other."""
    models = [one for one in shown_models(summary) if one.get("before") or selected_rates(one)]
    charts = []
    for column, whole in _CHARTS:
        aligned = cell(summary["aligned"], column) if summary["aligned"] and column.metric != "task" else None
        lines = [_line(one, aligned, *(_cell(one, column, when) for when in ("before", "after"))) for one in models]
        if any(len(line.marks) > (aligned is not None) for line in lines):
            charts.append(interval_chart(lines, title=column.title, whole=whole))
    drawn = [one for one in models if "landscape" in one]
    aligned = visage_of(summary.get("landscape"))
    lines = [
        _line(one, aligned, *(visage_of(one["landscape"].get(k)) for k in ("before", "realigned"))) for one in drawn
    ]
    if any(line.marks for line in lines):
        charts.append(interval_chart(lines, title="VISAGE, 0 to 100: higher is safer"))
    return charts


def _cell(one: FinetuneSummary, column: Column, when: str) -> Interval | None:
    rates = one.get("before") if when == "before" else selected_rates(one)
    return cell(rates, column) if rates else None


def _line(one: FinetuneSummary, aligned: Interval | None, before: Interval | None, after: Interval | None) -> Line:
    found = (("aligned", aligned), ("before", before), ("after", after))
    return Line(one["name"], tuple(Mark(kind, interval) for kind, interval in found if interval is not None))


def pictures(summary: RunSummary) -> dict[str, dict[str, Any]]:
    """Model -> `mask` and `delta` (heat maps), `landscape` (drawings); what it does not have is empty."""
    models = shown_models(summary)
    maps = sum(
        bool(one.get("density", {}).get("tensors")) + bool(one.get("delta", {}).get("tensors")) for one in models
    )
    room = _CELLS // max(1, maps)
    return {
        one["name"]: {"mask": _mask(one, room), "delta": _delta(one, room), "landscape": _landscape(summary, one)}
        for one in models
    }


def _mask(one: FinetuneSummary, room: int) -> Markup:
    tensors = one.get("density", {}).get("tensors", {})
    if not tensors:
        return Markup("")
    grid = density_grid(tensors)
    svg = grid_svg(thinned(grid, room // max(1, len(grid.kinds))), title="weights of the delta that are kept, percent")
    return Markup(svg)  # it escapes what it writes itself


def _delta(one: FinetuneSummary, room: int) -> Markup:
    tensors = one.get("delta", {}).get("tensors", {})
    if not tensors:
        return Markup("")
    grid = norm_grid(tensors)
    svg = grid_svg(
        thinned(grid, room // max(1, len(grid.kinds))),
        title="norm of the delta, percent of the aligned weights' norm",
        most=max(grid.cells.values(), default=0.0),
    )
    return Markup(svg)


def _landscape(summary: RunSummary, one: FinetuneSummary) -> list[Any]:
    if "landscape" not in one:
        return []
    from components.reporting.report_landscape import curve_charts, read_results

    return curve_charts(read_results(summary, one))


def task_vectors(models: Sequence[FinetuneSummary]) -> dict[str, Any]:
    """`norms`: (model, its delta's statistics); `matrix`: of the cosines; `alike`: the pairs with the largest ones, where a
    matrix would be too large to read."""
    norms = [(one["name"], one["delta"]) for one in models if "norm" in one.get("delta", {})]
    cosines: Cosines = {one["name"]: one["delta"]["cosines"] for one in models if "cosines" in one.get("delta", {})}
    large = len(cosines) > DRAWN
    return {
        "norms": norms,
        "matrix": matrix_svg(cosines) if len(cosines) > 1 and not large else "",
        "alike": most_alike(cosines, 20) if large else [],
    }
