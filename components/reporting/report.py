"""One self-contained HTML page per run, with the numbers of summary.json and of the files it names, and no others.

No script, no network, no font: it opens from a disk, on a phone, in print and in ten years. Every text that came from a
model, a prompt file or a config is escaped by the template engine. Its size is bounded by what it leaves to summary.json: of
many finetunes pictures get fewer rows, and tables and examples fewer lines, and the page says so.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from components.evaluation.metrics import holm
from components.reporting.charts import key
from components.reporting.pages import METRIC_NAMES, pages
from components.reporting.report_asked import asked_rows, in_words
from components.reporting.report_cost import cost_table
from components.reporting.report_lineage import lineage
from components.reporting.report_pictures import before_and_after, pictures, task_vectors
from components.reporting.rows import (
    KEPT,
    confidence_of,
    drawn_models,
    legend,
    level,
    rows,
    shown_columns,
    standing,
    task_kept,
    variants,
)
from components.reporting.schema import Difference, FinetuneSummary, Rates, RunSummary, selected_rates, shown_models
from components.storage import storage_errors, write_atomic

LONG = 6
"""From more models than so many on, each one's details are closed until somebody opens them."""
_EXAMPLES = 200
"""Flipped examples of the whole page, shared evenly, but of each model three."""
_LINES = 2400
"""Lines of the tables of single prompt sets, shared evenly; beyond that groups are left out, then whole sets."""


def render_report(summary: RunSummary, *, beside: Path | None = None) -> str:
    """The page as text. `beside`: the directory it will lie in, for links to pages that lie there, too."""
    models = shown_models(summary)
    table = rows(summary)
    return (
        pages()
        .get_template("report.html.j2")
        .render(
            # Absent and null are the same to a reader; the template may then be strict about names.
            summary=_whole(RunSummary, summary),
            models=[_whole(FinetuneSummary, one) for one in models],
            long=len(models) > LONG,
            asked=asked_rows(summary),
            columns=shown_columns(summary),
            aligned=[row for row in table if row.model == "aligned" and not row.finetune],
            rows={one["name"]: [r for r in table if r.finetune == one["name"] and r.error is None] for one in models},
            outcomes=[outcome(summary, one) for one in models],
            charts=before_and_after(summary),
            chart_key=key({"aligned": "aligned model", "before": "before (finetune)", "after": "after (realigned)"}),
            sets={one["name"]: _set_table(one, _LINES // max(1, len(models))) for one in models},
            single=_single_sets(summary),
            differences={one["name"]: _differences(one) for one in models},
            words=in_words,
            examples={one["name"]: _examples(one, max(3, _EXAMPLES // max(1, len(models)))) for one in models},
            metric_names=METRIC_NAMES,
            drawn={one["name"]: drawn_models(summary, one) for one in models},
            figures={"visage": "VISAGE", "width": "basin width", "depth": "depth", "area": "area"},
            pictures=pictures(summary),
            vectors=task_vectors(models),
            pages_of={one["name"]: _link(one.get("pictures"), beside) for one in models},
            lineage={one["name"]: lineage(summary, one) for one in models},
            cost=cost_table(summary),
            legend=legend(summary),
            confidence=level(confidence_of(summary)),
            kept=KEPT,
        )
    )


def write_report(summary: RunSummary, out: Path, *, linked: bool = True) -> Path:
    """Write the page to `out`. `linked`: with links to pages that lie beside it."""
    with storage_errors(out):
        write_atomic(out, render_report(summary, beside=out.parent if linked else None))
    return out


def outcome(summary: RunSummary, one: FinetuneSummary) -> dict[str, Any]:
    """The first line of a finetune: what it was, what the selected variant is, and what became of it in a word."""
    after, before = selected_rates(one) or {}, one.get("before") or {}
    return {
        "one": _whole(FinetuneSummary, one),
        "before": _whole(Rates, before),
        "after": _whole(Rates, after),
        "kept": task_kept(after, before.get("task")),
        "standing": standing(summary, one),
    }


def _whole(kind: Any, found: Any) -> dict[str, Any]:
    return {**dict.fromkeys(kind.__annotations__), **found}


def _set_table(one: FinetuneSummary, most: int) -> dict[str, Any]:
    """Every metric of every set of every variant: `models` are the columns, `lines` (set, metric, intervals)."""
    measured = {label: rates.get("sets", {}) for label, rates in variants(one).items()}
    keys = list(dict.fromkeys((s, m) for sets in measured.values() for s, found in sets.items() for m in found))
    kept = keys if len(keys) <= most else [at for at in keys if "/" not in at[0]][:most]
    lines = [(s, metric, [sets.get(s, {}).get(metric) for sets in measured.values()]) for s, metric in kept]
    return {"models": list(measured), "lines": lines, "left_out": len(keys) - len(kept)}


def _single_sets(summary: RunSummary) -> dict[str, list[tuple[str, str, list[Any]]]]:
    """`over_refusal` and `task` -> (model, set, [aligned, before, after]) of every set that measures it, but for groups."""
    aligned = (summary["aligned"] or {}).get("sets", {})
    found: dict[str, list[tuple[str, str, list[Any]]]] = {"over_refusal": [], "task": []}
    for one in shown_models(summary):
        before, after = ((rates or {}).get("sets", {}) for rates in (one.get("before"), selected_rates(one)))
        for name in dict.fromkeys([*before, *after]):
            for metric, lines in found.items():
                cells = [sets.get(name, {}).get(metric) for sets in (aligned, before, after)]
                if "/" not in name and any(cells[1:]):
                    lines.append((one["name"], name, cells))
    return found


def _differences(one: FinetuneSummary) -> list[tuple[str, str, Difference, float | None]]:
    """(first against second, metric, difference, p corrected for all of these) of every paired difference."""
    every = [(pair, metric, d) for pair, found in one.get("comparisons", {}).items() for metric, d in found.items()]
    fair = holm({f"{pair} {metric}": d["p"] for pair, metric, d in every if "p" in d})
    return [(pair.replace("_vs_", " against "), metric, d, fair.get(f"{pair} {metric}")) for pair, metric, d in every]


def _examples(one: FinetuneSummary, most: int) -> dict[str, Any]:
    """A few of every set, in turn, and how many are left out."""
    every = one.get("examples", [])
    by_set: dict[str, list[Any]] = {}
    for example in every:
        by_set.setdefault(example["set"], []).append(example)
    turns: Sequence[Any] = [some[i] for i in range(most) for some in by_set.values() if i < len(some)]
    return {"shown": turns[:most], "left_out": len(every) - len(turns[:most])}


def _link(path: str | None, beside: Path | None) -> str | None:
    """A page's address from the report's place; None where it does not lie below it."""
    if path is None or beside is None:
        return None
    relative = os.path.relpath(path, beside)
    return None if relative.startswith("..") else quote(Path(relative).as_posix())
