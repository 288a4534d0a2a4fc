"""The numbers of a summary, laid out once for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from components.reporting.schema import (
    FinetuneSummary,
    Interval,
    LandscapeSummary,
    Rates,
    RunSummary,
    selected_rates,
    shown_models,
)


@dataclass(frozen=True)
class Column:
    """One measured column: a headline rate, or (with `set`) a metric of one set."""

    title: str
    metric: str
    set: str | None = None
    said: str = ""
    """What it means; empty: what its title says."""


VISAGE = "visage"
COLUMNS: tuple[Column, ...] = (
    Column("ASR", "asr", said="ASR: no refusal phrase, gibberish counts."),
    Column("harmful", "harmful", said="harmful: complied and coherent."),
    Column("hard ASR", "asr", set="harmful_hard", said="hard: kinds of harm never refused in training."),
    Column("over-refusal", "over_refusal"),
    Column("hazard over-refusal", "over_refusal", set="hazard", said="hazard: harmless use of a hazard word."),
    Column("task", "task", said="task: of the finetune's own tasks; of the aligned model over all finetunes' tasks."),
    Column("VISAGE", VISAGE, said="VISAGE: mean of 100 − ASR where random moves of the weights leave any refusal."),
)
"""A column that no model of a run has is not shown."""

KEPT = "task kept"
_KEPT_SAID = "task kept: of the finetune's own score."


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
    measured = [shown for _, shown in _models(summary)]
    return tuple(column for column in COLUMNS if any(_cell(shown, column) for shown in measured))


def legend(summary: RunSummary) -> str:
    """What the columns mean that are shown."""
    return " ".join([*(column.said for column in shown_columns(summary) if column.said), _KEPT_SAID])


def rows(summary: RunSummary) -> list[Row]:
    """The aligned model, then each finetune's models: before, its forms, adapter, controls in the order of the summary."""
    columns = shown_columns(summary)
    aligned = [shown for name, shown in _models(summary) if not name]
    found = [Row("", shown.label, tuple(_cell(shown, c) for c in columns), None) for shown in aligned]
    for one in shown_models(summary):
        before = (one.get("before") or {}).get("task")
        for shown in _shown(one):
            found.append(
                Row(
                    finetune=one["name"],
                    model=shown.label,
                    cells=tuple(_cell(shown, c) for c in columns),
                    kept=task_kept(shown.rates, before),
                    selected=shown.label in ("soft", "binary", "tuned") and shown.label == one.get("selected"),
                )
            )
        if one["status"] == "failed":
            found.append(Row(one["name"], "failed", (None,) * len(columns), None, error=one["error"] or "no message"))
    return found


@dataclass(frozen=True)
class _Model:
    """A model that is shown."""

    label: str
    rates: Rates
    visage: Interval | None = None


def _cell(shown: _Model, column: Column) -> Interval | None:
    return shown.visage if column.metric == VISAGE else cell(shown.rates, column)


def cell(rates: Rates, column: Column) -> Interval | None:
    """The interval a column shows of a model's rates, or None where it was not measured."""
    if column.set is not None:
        return rates.get("sets", {}).get(column.set, {}).get(column.metric)
    return rates.get(column.metric)  # type: ignore[return-value]


def visage_of(landscape: LandscapeSummary | None) -> Interval | None:
    """VISAGE as a rate."""
    found = landscape.get("visage") if landscape is not None else None
    if found is None:
        return None
    low, high = max(0.0, found["low"] / 100), min(1.0, found["high"] / 100)
    return {"value": found["value"] / 100, "low": low, "high": high, "n": found["n"]}


def drawn_models(summary: RunSummary, one: FinetuneSummary) -> list[tuple[str, LandscapeSummary]]:
    """(model, landscape) of those of a finetune that have figures: the aligned model, before, the selected form."""
    own = one.get("landscape", {})
    found = [("aligned", summary.get("landscape")), ("before", own.get("before"))]
    found += [(one.get("selected") or "realigned", own.get("realigned"))]
    return [(name, landscape) for name, landscape in found if landscape is not None and "visage" in landscape]


def percent(value: float) -> str:
    """0.021 -> "2.1", 0.86 -> "86": a tenth where it can matter and no more."""
    tenths = round(value * 100, 1) + 0.0  # which makes 0 of −0
    text = f"{tenths:.1f}" if abs(tenths) < 10 else f"{value * 100:.0f}"
    return text.replace("-", "−")


def shortened(text: str, longest: int) -> str:
    """On one line and with both ends: names differ at either."""
    text = " ".join(text.split())
    return text if len(text) <= longest else f"{text[: longest // 2]}…{text[longest // 2 + 1 - longest :]}"


def level(confidence: float) -> str:
    """0.999 -> "99.9 %": never rounded to a certainty."""
    return f"{100 * confidence:g} %"


def confidence_of(summary: RunSummary) -> float:
    """Of a summary's intervals; an older one does not say."""
    return summary.get("confidence", 0.95)


def compact(interval: Interval | None) -> str:
    """ "2.1 (0.8–5.3)", in percent; a dash where nothing was measured."""
    if interval is None:
        return "–"
    return f"{percent(interval['value'])} ({percent(interval['low'])}–{percent(interval['high'])})"


def _models(summary: RunSummary) -> Iterator[tuple[str, _Model]]:
    if summary["aligned"]:
        yield "", _Model("aligned", summary["aligned"], visage_of(summary.get("landscape")))
    for one in shown_models(summary):
        for shown in _shown(one):
            yield one["name"], shown


def _shown(one: FinetuneSummary) -> Iterator[_Model]:
    drawn = one.get("landscape", {})
    visage = {"before": visage_of(drawn.get("before")), one.get("selected"): visage_of(drawn.get("realigned"))}
    for label, rates in variants(one).items():
        yield _Model(label, rates, visage.get(label))


def variants(one: FinetuneSummary) -> dict[str, Rates]:
    """label -> rates of every model of a finetune that was measured: before, its forms, the adapter, controls."""
    found: dict[str, Rates | None] = {"before": one.get("before"), "soft": one.get("after_soft")}
    found |= {"binary": one.get("after_binary"), "tuned": one.get("after_tuned"), "adapter": one.get("after_adapter")}
    return {label: rates for label, rates in {**found, **one.get("controls", {})}.items() if rates}


Standing = Literal["failed", "merged", "unselected", "realigned", "passed", "shut"]


def standing(summary: RunSummary, one: FinetuneSummary) -> Standing:
    """What became of a model in a word: failed; only merged with others; nothing selected; realigned where no gate was asked,
    else what the gate says."""
    if one["status"] == "failed":
        return "failed"
    if not selected_rates(one):
        merges = summary.get("asked", {}).get("merges", {})
        finetune = one["name"] not in merges
        merged = any(not merge.get("of") or one["name"] in merge["of"] for merge in merges.values())
        return "merged" if finetune and merged else "unselected"
    gate = one.get("gate")
    return "realigned" if gate is None else "passed" if gate["passed"] else "shut"


def same_tasks(one: Rates, other: Rates) -> bool:
    """Whether both rates `task` are over the same sets: a finetune has only its own, the aligned model those of all."""
    asked = [
        {name for name, metrics in rates.get("sets", {}).items() if "task" in metrics and "/" not in name}
        for rates in (one, other)
    ]
    return asked[0] == asked[1]


def task_kept(rates: Rates, before: Interval | None) -> float | None:
    """Task score as a share of the finetune's own; None where either is not there or the finetune never scored."""
    task = rates.get("task")
    if task is None or before is None or before["value"] == 0:
        return None
    return task["value"] / before["value"]
