"""Two runs side by side as one self-contained page, like the report."""

from __future__ import annotations

from pathlib import Path

from components.evaluation.outcomes import HEADLINES
from components.reporting.charts import Line, Mark, interval_chart, key
from components.reporting.comparison import cut, shown_flips
from components.reporting.pages import METRIC_NAMES, pages
from components.reporting.runs_compared import Comparison, Measurement
from components.storage import storage_errors, write_atomic


def write_runs_compared(found: Comparison, path: Path) -> None:
    """One self-contained page, like the report."""
    with storage_errors(path):
        write_atomic(path, render_runs_compared(found))


def render_runs_compared(found: Comparison) -> str:
    """The page as text."""
    charts = []
    for metric in HEADLINES:
        lines = [
            Line(f"{pair.model or 'aligned'}{f', {pair.variants[1]}' if pair.model else ''}", marks)
            for pair in found.pairs
            for line in pair.lines
            if not pair.same and line.metric == metric and line.set is None and (marks := _marks(line))
        ]
        if lines:
            charts.append(interval_chart(lines, title=f"{METRIC_NAMES[metric]}, %", whole=metric != "over_refusal"))
    return (
        pages()
        .get_template("runs_compared.html.j2")
        .render(
            found=found,
            charts=charts,
            chart_key=key({"first": found.labels[0], "second": found.labels[1]}),
            flipped_sets={s.name: s.kind for pair in found.pairs for s in pair.sets},
            shown=shown_flips([pair.flips for pair in found.pairs if pair.flips is not None]),
            cut=cut,
            metric_names=METRIC_NAMES,
            count=sum(line.adjusted is not None for pair in found.pairs for line in pair.lines),
        )
    )


def _marks(line: Measurement) -> tuple[Mark, ...]:
    both = (("first", line.first), ("second", line.second))
    return tuple(Mark(kind, interval) for kind, interval in both if interval is not None)
