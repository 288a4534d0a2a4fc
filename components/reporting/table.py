"""The comparison that ends a run, for a terminal and as plain text."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from io import StringIO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from components.reporting.rows import (
    KEPT,
    Row,
    compact,
    confidence_of,
    drawn_models,
    legend,
    level,
    percent,
    rows,
    shown_columns,
)
from components.reporting.schema import FinetuneSummary, RunSummary, shown_models


def comparison_table(summary: RunSummary, *, width: int | None = None) -> Table:
    """A row per model: the aligned one, then each finetune before and in its forms (a star marks the selected
    one) and its controls; a column per measurement.

    `width` is the terminal's, in characters: intervals are left out where they would not fit.
    """
    table = _build(summary, intervals=True)
    if width is not None and table.__rich_measure__(_measuring(), _measuring().options).maximum > width:
        table = _build(summary, intervals=False)
    return table


def _measuring() -> Console:
    return Console(file=StringIO(), width=1000)


def _build(summary: RunSummary, *, intervals: bool) -> Table:
    columns = shown_columns(summary)
    table = Table(
        title=escape(summary["run"]),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("finetune", no_wrap=True)
    table.add_column("model", no_wrap=True)
    for title in (*(column.title for column in columns), KEPT):
        table.add_column(title.replace(" ", "\n"), justify="right", vertical="bottom")
    previous: str | None = None
    for row in rows(summary):
        if previous is not None and row.finetune != previous:
            table.add_section()
        _add(table, row, first=row.finetune != previous, intervals=intervals)
        previous = row.finetune
    return table


def comparison_text(summary: RunSummary) -> str:
    """Table and caption as plain text, as wide as they need to be: for logs and files."""
    out = StringIO()
    Console(file=out, width=200, no_color=True, highlight=False).print(comparison_table(summary))
    lines = [line.rstrip() for line in out.getvalue().rstrip().split("\n")]
    return "\n".join([*lines, "", *comparison_caption(summary)]) + "\n"


def comparison_markdown(summary: RunSummary) -> str:
    """The same rows as a Markdown table, and the caption below it."""
    titles = ["finetune", "model", *(column.title for column in shown_columns(summary)), KEPT]
    lines = [_cells(titles), _cells(["---"] * len(titles))]
    for row in rows(summary):
        if row.error is not None:
            lines.append(_cells([row.finetune, "failed", *[""] * (len(titles) - 2)]))
            continue
        values = [*map(compact, row.cells), "–" if row.kept is None else percent(row.kept)]
        lines.append(_cells([row.finetune, row.model + (" ★" if row.selected else ""), *values]))
    return "\n".join([*lines, "", *(f"- {_plain(line)}" for line in comparison_caption(summary))]) + "\n"


def _cells(values: Sequence[str]) -> str:
    return f"| {' | '.join(map(_plain, values))} |"


def _plain(text: str) -> str:
    """Without a meaning in Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]<>|#!])", r"\\\1", text.replace("\n", " "))


def _add(table: Table, row: Row, *, first: bool, intervals: bool) -> None:
    name = escape(row.finetune) if first else ""
    if row.error is not None:
        table.add_row(name, "[red]failed[/red]", style="red")
        return
    star = " ★" if row.selected else ""
    kept = "–" if row.kept is None else percent(row.kept)
    cells = [compact(one) if intervals or one is None else percent(one["value"]) for one in row.cells]
    table.add_row(name, escape(row.model) + star, *cells, kept, style="bold" if row.selected else None)


def comparison_caption(summary: RunSummary) -> list[str]:
    """What the columns mean, then every failure and note, each a line however long: paths in them can be copied."""
    failed = [f"{one['name']} failed: {one['error']}" for one in shown_models(summary) if one["status"] == "failed"]
    notes = [
        *summary.get("notes", []),
        *(f"{o['name']}: {n}" for o in shown_models(summary) for n in o.get("notes", [])),
    ]
    interval = f"{level(confidence_of(summary))} interval"
    drawn = [line for one in shown_models(summary) for line in _landscape_lines(summary, one)]
    gates = [line for one in shown_models(summary) for line in _gate_lines(one)]
    meaning = textwrap.wrap(f"Percent ({interval}). {legend(summary)} ★ selected.", 120)
    promoted = [line for one in shown_models(summary) for line in _promotion_lines(one)]
    return [*meaning, *failed, *notes, *drawn, *gates, *promoted]


def _landscape_lines(summary: RunSummary, one: FinetuneSummary) -> list[str]:
    """What was drawn of a finetune: VISAGE and the basin's width, and where the pictures are."""
    if "pictures" not in one:
        return []
    told = []
    for name, landscape in drawn_models(summary, one):
        width = f", basin {landscape['width']['value']:.2f} wide" if "width" in landscape else ""
        told.append(f"{name} VISAGE {landscape['visage']['value']:.1f}{width}")
    return [f"landscape, {one['name']}: {'; '.join([*told, one['pictures']])}"]


def _promotion_lines(one: FinetuneSummary) -> list[str]:
    found = one.get("registry")
    if found is None or "promoted" not in found:
        return []
    became = "in service (champion)" if found["promoted"] else "not promoted"
    return [f"registry, {one['name']}: {found['name']} version {found['version']}, {became}"]


def _gate_lines(one: FinetuneSummary) -> list[str]:
    gate = one.get("gate")
    if gate is None:
        return []
    return [f"gate, {one['name']}: {'passed' if gate['passed'] else 'shut'}"] + [
        f"  {'✓' if found['passed'] else '✗'} {found['requirement']}: {found['reason']}" for found in gate["findings"]
    ]
