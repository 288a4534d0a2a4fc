"""Where a model's numbers come from: its records, from the inputs to the registered version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from components.reporting.schema import FinetuneSummary, RunSummary, StepRecord, shown_models


@dataclass(frozen=True)
class Made:
    """A record on the way to a model."""

    step: str
    record: StepRecord
    parents: tuple[str, ...]
    """Steps that it was made from."""


def lineage(summary: RunSummary, one: FinetuneSummary, ends: Sequence[str] | None = None) -> list[Made]:
    """The records that some steps of a model stand on, parents first; by default those of the selected form's numbers. Empty
    where none is selected or the summary has no records."""
    known: dict[str, tuple[str, StepRecord]] = {}
    owners = [("", summary.get("records", {})), *((o["name"], o.get("records", {})) for o in shown_models(summary))]
    for name, records in owners:
        for step, record in records.items():
            shown = f"{name}/{step}" if name and name != one["name"] else step
            known.setdefault(record["reference"], (shown, record))
    for step, record in one.get("records", {}).items():
        known[record["reference"]] = (step, record)
    selected = one.get("selected")
    if ends is None:
        ends = (f"evaluate_{selected}", "landscape") if selected else ()
    found: dict[str, Made] = {}

    def follow(reference: str) -> None:
        if reference in found or reference not in known:
            return
        step, record = known[reference]
        for parent in record["parents"].values():
            follow(parent)
        parents = tuple(known[p][0] if p in known else p for p in record["parents"].values())
        found[reference] = Made(step, record, parents)

    for step in ends:
        if step in one.get("records", {}):
            follow(one["records"][step]["reference"])
    return list(found.values())
