"""What `realign sweep` prints: of each target the front, and how its winner does on the test sets."""

from __future__ import annotations

from collections.abc import Sequence

from components.reporting.rows import compact
from components.reporting.schema import Difference, FinetuneSummary, RunSummary, shown_models
from components.sweeps.result import Entry, SweepResult, asked_share, candidate_text, demand_of, form_of
from components.sweeps.settings import Objective


def front_lines(result: SweepResult) -> list[str]:
    """A row for each candidate of the front, and for the run's own settings where they are none of it."""
    objectives = [Objective(**one) for one in result["objectives"]]
    rows = [("", "candidate", *(f"{o.name} {demand_of(o)}".strip() for o in objectives), "meets")]
    front = [one["number"] for one in result["front"]]
    others = {one["number"]: one for one in (*result["own"], result["picked"]) if one["number"] not in front}
    for one in (*result["front"], *others.values()):
        rows.append(_row(one, objectives, result, on_front=one["number"] in front))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [f"{result['name']}: {_told(result)}", *lines, *(f"{result['name']}: {note}" for note in result["notes"])]


def _row(one: Entry, objectives: Sequence[Objective], result: SweepResult, *, on_front: bool) -> tuple[str, ...]:
    picked, own = one["number"] == result["picked"]["number"], one["number"] in [o["number"] for o in result["own"]]
    text = f"form {form_of(one['candidate'])} (the run's own)" if own else candidate_text(one["candidate"])
    text += "" if on_front else ", not on the front"
    cells = [compact(one["rates"][objective.name]) for objective in objectives]
    return "★" if picked else "", text, *cells, "yes" if one["meets"] else "no"


def _told(result: SweepResult) -> str:
    stopped = sum(one["stopped"] is not None for one in result["trials"])
    return (
        f"{len(result['trials'])} candidates, {stopped} stopped early; {asked_share(result):.0%} of all prompts asked; "
        f"the front on dev sets, in percent (★ picked by {result['pick']})"
    )


def lines_against_own(summary: RunSummary) -> list[str]:
    """Each winner against the run's own settings on the test sets."""
    return [line for one in shown_models(summary) if "after_tuned" in one for line in _compared(one)]


def _compared(one: FinetuneSummary) -> list[str]:
    lines, places = [], one.get("fused", {})
    for form in ("soft", "binary"):
        if places.get(form) is not None and places.get(form) == places.get("tuned"):
            return [f"{one['name']}: what was picked is the form {form}, bit for bit"]
        found = one.get("comparisons", {}).get(f"tuned_vs_{form}")
        if found:
            said = ", ".join(f"{metric} {_difference(difference)}" for metric, difference in found.items())
            lines.append(f"{one['name']} on the test sets, tuned less {form} in points: {said}")
    return lines


def _difference(found: Difference) -> str:
    return f"{100 * found['diff']:+.1f} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})".replace("-", "−")
