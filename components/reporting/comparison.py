"""One self-contained HTML page for models that answered the same prompts: rates, differences, and which prompts flipped.

Every text that came from a model or a prompt file is escaped by the template engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.evaluation.compare import compare_outcomes
from components.evaluation.metrics import holm
from components.evaluation.outcomes import HEADLINES, NamedSet, Outcome
from components.reporting.pages import METRIC_NAMES, pages
from components.reporting.rows import level
from components.reporting.schema import Difference, Rates
from components.storage import storage_errors, write_atomic

_SHOWN, _SHOWN_IN_ALL = 50, 1000
"""Flipped prompts of one kind, and of all, that the page has; the table of answers has every one."""
_LONGEST = 1000

Answers = Mapping[str, Sequence[Outcome]]
"""set -> outcomes, in the prompts' order."""


@dataclass(frozen=True)
class Flip:
    """Prompts of a set whose verdict is `first` of the first model and `second` of another one."""

    first: str
    second: str
    prompts: list[tuple[Outcome, Outcome]]


@dataclass(frozen=True)
class Compared:
    """A model against the first one."""

    name: str
    differences: Mapping[str, Difference]
    adjusted: Mapping[str, float]
    """metric -> p, corrected for the number of metrics."""
    verdicts: dict[str, dict[tuple[str, str], int]] = field(default_factory=dict)
    """set -> (verdict of the first, verdict of this one) -> prompts."""
    flips: dict[str, list[Flip]] = field(default_factory=dict)
    """set -> changes of verdict, the commonest first."""


def compared(
    name: str, differences: Mapping[str, Difference], adjusted: Mapping[str, float], first: Answers, second: Answers
) -> Compared:
    """Which prompts flipped, which way. Of a task the verdict is whether the answer is the expected one."""
    found = Compared(name, differences, adjusted)
    for one, before in first.items():
        pairs = list(zip(before, second[one], strict=True))
        found.verdicts[one] = dict(Counter((b.became, a.became) for b, a in pairs).most_common())
        found.flips[one] = [
            Flip(was, now, [(b, a) for b, a in pairs if (b.became, a.became) == (was, now)])
            for was, now in found.verdicts[one]
            if was != now
        ]
    return found


def against_first(
    sets: Sequence[NamedSet], outcomes: Mapping[str, dict[str, list[Outcome]]], *, confidence: float
) -> list[Compared]:
    """Every other model (name -> set -> outcomes) against the first."""
    (_, first), *others = outcomes.items()
    found = []
    for name, second in others:
        apart = compare_outcomes(sets=sets, first=second, second=first, confidence=confidence)
        adjusted = holm({metric: one["p"] for metric, one in apart.items()})
        found.append(compared(name, apart, adjusted, first, second))
    return found


def render_comparison(
    *,
    sets: Sequence[NamedSet],
    rates: Mapping[str, Rates],
    others: Sequence[Compared],
    decisions: Mapping[str, Mapping[str, Any]],
    confidence: float,
    about: Mapping[str, str],
) -> str:
    """The page as text. `rates`: model -> rates, the first model being the one that others are held to. `about`: what else a
    reader must know (who judged, where the models lie, when)."""
    asked = [metric for metric in HEADLINES if any(metric in found for found in rates.values())]
    measured = {
        one: list(dict.fromkeys(metric for found in rates.values() for metric in found.get("sets", {}).get(one, {})))
        for one in dict.fromkeys(one for found in rates.values() for one in found.get("sets", {}))
    }
    return (
        pages()
        .get_template("comparison.html.j2")
        .render(
            about=about,
            first=next(iter(rates)),
            rates=rates,
            asked=asked,
            measured=measured,
            kinds={one.name: one.kind for one in sets},
            others=others,
            decisions=decisions,
            confidence=level(confidence),
            metric_names=METRIC_NAMES,
            shown=shown_flips(others),
            cut=cut,
        )
    )


def shown_flips(others: Sequence[Compared]) -> int:
    """How many flipped prompts of each kind a page shows."""
    return max(2, min(_SHOWN, _SHOWN_IN_ALL // max(1, sum(len(f) for one in others for f in one.flips.values()))))


def cut(text: str) -> str:
    """A text as long as a page shows it."""
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def write_comparison(path: Path, **content: Any) -> None:
    """`render_comparison` to a file."""
    with storage_errors(path):
        write_atomic(path, render_comparison(**content))
