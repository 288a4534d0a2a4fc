"""Two variants of a model over the same prompts: paired differences, and which prompts flipped."""

from __future__ import annotations

from collections.abc import Sequence

from components.errors import EvaluationError, listed
from components.evaluation.metrics import paired_difference
from components.evaluation.outcomes import HEADLINES, NamedSet, Outcome, grouped, headline_hits, hits
from components.reporting.schema import Difference, FlippedExample


def compare_outcomes(
    *,
    sets: Sequence[NamedSet],
    first: dict[str, list[Outcome]],
    second: dict[str, list[Outcome]],
    confidence: float = 0.95,
) -> dict[str, Difference]:
    """Headline metric -> rate of `first` minus rate of `second` over the prompts of the headline sets both have.

    Raises EvaluationError when the two were not asked the same prompts.
    """
    shared = [one for one in sets if one.name in first and one.name in second]
    if not shared:
        raise EvaluationError("the two evaluations have no prompt set in common; nothing can be compared")
    for one in shared:
        _require_same(one.name, first[one.name], second[one.name])
    left, right = headline_hits(shared, first), headline_hits(shared, second)
    return {metric: paired_difference(left[metric], right[metric], confidence=confidence) for metric in left}


def compare_groups(
    one: NamedSet, first: Sequence[Outcome], second: Sequence[Outcome], *, confidence: float = 0.95
) -> dict[str, dict[str, Difference]]:
    """Group of a set -> headline metric -> rate of `first` minus rate of `second` over the group's prompts. Many are compared:
    adjust their p (`metrics.holm`). Raises EvaluationError when the two were not asked the same prompts."""
    _require_same(one.name, first, second)
    apart: dict[str, dict[str, Difference]] = {}
    for group, some in grouped(first).items():
        own = hits(one.kind, some)
        other = hits(one.kind, [their for our, their in zip(first, second, strict=True) if our.group == group])
        both = [metric for metric in HEADLINES if metric in own and metric in other]
        apart[group] = {m: paired_difference(own[m], other[m], confidence=confidence) for m in both}
    return apart


def flipped(
    *, before: dict[str, list[Outcome]], after: dict[str, list[Outcome]], per_set: int = 3, longest: int = 600
) -> list[FlippedExample]:
    """Prompts of which something else became (`Outcome.became`), the first `per_set` of each set both have; texts cut to
    `longest` characters."""
    examples: list[FlippedExample] = []
    for name in before:
        if name not in after:
            continue
        _require_same(name, before[name], after[name])
        changed = [(b, a) for b, a in zip(before[name], after[name], strict=True) if b.became != a.became]
        examples += [
            {
                "set": name,
                "prompt": _short(b.prompt, longest),
                "before": _short(b.answer, longest),
                "after": _short(a.answer, longest),
                "before_verdict": b.became,
                "after_verdict": a.became,
            }
            for b, a in changed[:per_set]
        ]
    return examples


def _require_same(name: str, first: Sequence[Outcome], second: Sequence[Outcome]) -> None:
    left, right = [o.question for o in first], [o.question for o in second]
    if left != right:
        differing = sorted({question[0] for question in set(left) ^ set(right)}) or ["the order"]
        raise EvaluationError(f"set {name!r} was asked differently of the two ({listed(differing, 4)}); evaluate again")


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
