"""One self-contained HTML page per run, with the numbers of summary.json and no others.

No script, no network, no font: it opens from a disk, on a phone, in print and in ten years. Every text that came from a
model, a prompt file or a config is escaped by the template engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from components.reporting.heat_map import density_svg
from components.reporting.pages import METRIC_NAMES, pages
from components.reporting.rows import KEPT, drawn_models, legend, rows, shown_columns, task_kept
from components.reporting.schema import FinetuneSummary, Rates, RunSummary, shown_models
from components.storage import storage_errors, write_atomic


def render_report(summary: RunSummary) -> str:
    """The page as text."""
    models = shown_models(summary)
    table = rows(summary)
    return (
        pages()
        .get_template("report.html.j2")
        .render(
            # Absent and null are the same to a reader; the template may then be strict about names.
            summary={**dict.fromkeys(RunSummary.__annotations__), **summary},
            models=[{**dict.fromkeys(FinetuneSummary.__annotations__), **one} for one in models],
            columns=shown_columns(summary),
            aligned=[row for row in table if row.model == "aligned" and not row.finetune],
            rows={one["name"]: [r for r in table if r.finetune == one["name"] and r.error is None] for one in models},
            outcomes=[_outcome(one) for one in models],
            sets={one["name"]: _set_table(one) for one in models},
            metric_names=METRIC_NAMES,
            stages=_stages(models),
            drawn={one["name"]: drawn_models(summary, one) for one in models},
            figures={"visage": "VISAGE", "width": "basin width", "depth": "depth", "area": "area"},
            heat_maps={one["name"]: _heat_map(one) for one in models},
            legend=legend(summary),
            kept=KEPT,
        )
    )


def write_report(summary: RunSummary, out: Path) -> Path:
    """Write the page to `out`."""
    with storage_errors(out):
        write_atomic(out, render_report(summary))
    return out


def _outcome(one: FinetuneSummary) -> dict[str, Any]:
    """The first line of a finetune: what it was, what the selected variant is."""
    selected = one.get("selected")
    after: Rates | None = one.get(f"after_{selected}") if selected else None  # type: ignore[assignment]
    before = one.get("before") or {}
    return {
        "one": {**dict.fromkeys(FinetuneSummary.__annotations__), **one},
        "before": {**dict.fromkeys(Rates.__annotations__), **before},
        "after": {**dict.fromkeys(Rates.__annotations__), **(after or {})},
        "kept": task_kept(after or {}, before.get("task")),
    }


def _set_table(one: FinetuneSummary) -> dict[str, Any]:
    """Every metric of every set of every variant: `models` are the columns, `lines` (set, metric, intervals)."""
    variants = {"before": one.get("before"), "soft": one.get("after_soft"), "binary": one.get("after_binary")}
    variants.update({"tuned": one.get("after_tuned"), "adapter": one.get("after_adapter"), **one.get("controls", {})})
    measured = {label: rates.get("sets", {}) for label, rates in variants.items() if rates}
    keys = dict.fromkeys((s, metric) for sets in measured.values() for s, found in sets.items() for metric in found)
    lines = [(s, metric, [sets.get(s, {}).get(metric) for sets in measured.values()]) for s, metric in keys]
    return {"models": list(measured), "lines": lines}


def _heat_map(one: FinetuneSummary) -> Markup:
    """Escapes what it writes itself."""
    tensors = one.get("density", {}).get("tensors", {})
    return Markup(density_svg(tensors, title="weights of the delta that are kept, percent") if tensors else "")


def _stages(models: list[FinetuneSummary]) -> list[str]:
    return list(dict.fromkeys(stage for one in models for stage in one.get("seconds", {})))
