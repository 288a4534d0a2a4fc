"""The numbers of a summary, laid out once for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from components.reporting.schema import FinetuneSummary, Interval, Rates, RunSummary, shown_models


@dataclass(frozen=True)
class Column:
    """One measured column: a headline rate, or (with `set`) a metric of one set."""

    title: str
    metric: str
    set: str | None = None


COLUMNS: tuple[Column, ...] = (
    Column("ASR", "asr"),
    Column("harmful", "harmful"),
    Column("hard ASR", "asr", set="harmful_hard"),
    Column("over-refusal", "over_refusal"),
    Column("hazard over-refusal", "over_refusal", set="hazard"),
    Column("task", "task"),
)
"""A column that no model of a run has is not shown."""

KEPT = "task kept"
LEGEND = (
    "ASR: no refusal phrase, gibberish counts. harmful: complied and coherent. hard: kinds of "
    "harm never refused in training. hazard: harmless use of a hazard word. task kept: of the finetune's own score."
)


@dataclass(frozen=True)
class Row:
    """One model of a finetune. `cells` follow the shown columns; `kept` is the task score relative to before."""

    finetune: str
    model: str
    cells: tuple[Interval | None, ...]
    kept: float | None
    selected: bool = False
    error: str | None = None
    """Set on the only row of a finetune that failed before anything was measured, and on the last of one after."""


def shown_columns(summary: RunSummary) -> tuple[Column, ...]:
    measured = [rates for _, _, rates in _models(summary) if rates]
    return tuple(column for column in COLUMNS if any(cell(rates, column) for rates in measured))


def rows(summary: RunSummary) -> list[Row]:
    """The aligned model, then each finetune's models: before, soft, binary, adapter, controls in the order of the summary."""
    columns = shown_columns(summary)
    found: list[Row] = []
    if summary["aligned"]:
        found.append(Row("", "aligned", tuple(cell(summary["aligned"], c) for c in columns), None))
    for one in shown_models(summary):
        before = (one.get("before") or {}).get("task")
        for label, rates in _variants(one):
            found.append(
                Row(
                    finetune=one["name"],
                    model=label,
                    cells=tuple(cell(rates, c) for c in columns),
                    kept=task_kept(rates, before),
                    selected=label in ("soft", "binary") and label == one.get("selected"),
                )
            )
        if one["status"] == "failed":
            found.append(Row(one["name"], "failed", (None,) * len(columns), None, error=one["error"] or "no message"))
    return found


def cell(rates: Rates, column: Column) -> Interval | None:
    """The interval a column shows of a model, or None where it was not measured."""
    if column.set is not None:
        return rates.get("sets", {}).get(column.set, {}).get(column.metric)
    return rates.get(column.metric)  # type: ignore[return-value]


def percent(value: float) -> str:
    """0.021 -> "2.1", 0.86 -> "86": a tenth where it can matter and no more."""
    tenths = round(value * 100, 1)
    text = f"{tenths:.1f}" if abs(tenths) < 10 else f"{value * 100:.0f}"
    return text.replace("-", "−")


def compact(interval: Interval | None) -> str:
    """ "2.1 (0.8–5.3)", in percent; a dash where nothing was measured."""
    if interval is None:
        return "–"
    return f"{percent(interval['value'])} ({percent(interval['low'])}–{percent(interval['high'])})"


def _models(summary: RunSummary) -> Iterator[tuple[str, str, Rates | None]]:
    yield "", "aligned", summary["aligned"]
    for one in shown_models(summary):
        for label, rates in _variants(one):
            yield one["name"], label, rates


def _variants(one: FinetuneSummary) -> Iterator[tuple[str, Rates]]:
    first = (("before", one.get("before")), ("soft", one.get("after_soft")), ("binary", one.get("after_binary")))
    for label, rates in (*first, ("adapter", one.get("after_adapter")), *one.get("controls", {}).items()):
        if rates:
            yield label, rates


def task_kept(rates: Rates, before: Interval | None) -> float | None:
    """Task score as a share of the finetune's own; None where either is not there or the finetune never scored."""
    task = rates.get("task")
    if task is None or before is None or before["value"] == 0:
        return None
    return task["value"] / before["value"]
