"""Two runs side by side: what each measured of the models that both have, how far they are apart, and what was set otherwise.

Differences are paired where both runs asked the same prompts; where they did not, the rates stand by themselves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from components.errors import ConfigError, listed
from components.evaluation.compare import compare_outcomes
from components.evaluation.metrics import holm
from components.evaluation.outcomes import HEADLINES, NamedSet, Outcome, metrics_of
from components.evaluation.settings import SetKind
from components.reporting.comparison import Compared, compared
from components.reporting.pages import METRIC_NAMES
from components.reporting.report_cost import CostLine, cost_table
from components.reporting.rows import confidence_of, level, standing
from components.reporting.schema import Difference, FinetuneSummary, Interval, Rates, RunSummary, shown_models


@dataclass(frozen=True)
class ASet:
    """A test set as a record names it."""

    name: str
    kind: SetKind
    counts: bool


@dataclass(frozen=True)
class Answered:
    """What one evaluation asked and was answered."""

    sets: Sequence[ASet]
    outcomes: Mapping[str, list[Outcome]]


@dataclass(frozen=True)
class Run:
    """A run to compare: its summary, and the answers that are at hand, by model and variant (`zh`, `before` or its form; the
    aligned model is ``)."""

    label: str
    summary: RunSummary
    answers: Mapping[tuple[str, str], Answered] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """One metric of one model in both runs."""

    metric: str
    set: str | None
    """None: over all sets that count."""
    first: Interval | None
    second: Interval | None
    difference: Difference | None = None
    """Second minus first, paired; None where the prompts were not the same or the answers are not at hand."""
    adjusted: float | None = None
    """Its p, corrected (Holm) for all paired differences over the sets that count."""


@dataclass(frozen=True)
class Pair:
    """One model in both runs."""

    model: str
    """The finetune's or merge's name; empty: the aligned model."""
    variants: tuple[str, str]
    """What is compared of it: `aligned`, `before`, or the form that each run selected."""
    lines: tuple[Measurement, ...]
    unpaired: str
    """Why there are no paired differences; empty where there are, or where both have one and the same evaluation."""
    same: bool = False
    """Both runs have one and the same evaluation of it."""
    flips: Compared | None = None
    sets: tuple[ASet, ...] = ()
    """Those that were asked the same of both."""


@dataclass(frozen=True)
class Comparison:
    labels: tuple[str, str]
    pairs: tuple[Pair, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    """Models that only one of the runs has."""
    without: tuple[tuple[str, str, str], ...]
    """(model, run, why) of the models in both that a run has nothing to show of as realigned."""
    settings: tuple[tuple[str, str, str], ...]
    """(setting, in the first, in the second) of those that differ."""
    settings_known: bool
    cost: tuple[CostLine | None, CostLine | None]
    confidence: tuple[float, float]
    """Of each run's intervals; differences have the first's."""

    @property
    def levels(self) -> str:
        """They in words."""
        first, second = map(level, self.confidence)
        if first == second:
            return f"{first} intervals"
        return f"{first} intervals in {self.labels[0]}, {second} in {self.labels[1]}; differences with {first}"


def compare_runs(first: Run, second: Run) -> Comparison:
    """The second run against the first. Raises ConfigError where they have no finetune (or merge) in common."""
    ours, theirs = ([one["name"] for one in shown_models(run.summary)] for run in (first, second))
    common = [name for name in ours if name in theirs]
    if not common:
        raise ConfigError(
            f"the runs have no finetune in common: {first.label} has {listed(ours)}, {second.label} has {listed(theirs)}; "
            "models are compared by their names"
        )
    confidence = confidence_of(first.summary)
    pairs = [_pair("", ("aligned", "aligned"), first, second, confidence)]
    for name in common:
        pairs.append(_pair(name, ("before", "before"), first, second, confidence))
        forms = tuple(_named(run, name).get("selected") for run in (first, second))
        if all(forms):
            pairs.append(_pair(name, (str(forms[0]), str(forms[1])), first, second, confidence))
    asked = [_flat(run.summary.get("asked", {})) for run in (first, second)]
    names = dict.fromkeys([*asked[0], *asked[1]]) if all(asked) else {}
    told = [(name, *(one.get(name, "–") for one in asked)) for name in names]
    tables = [cost_table(run.summary) for run in (first, second)]
    return Comparison(
        labels=(first.label, second.label),
        pairs=_adjusted([pair for pair in pairs if pair.lines]),
        only=(tuple(n for n in ours if n not in theirs), tuple(n for n in theirs if n not in ours)),
        settings=tuple((name, a, b) for name, a, b in told if a != b),
        settings_known=all(asked),
        cost=(tables[0].together if tables[0] else None, tables[1].together if tables[1] else None),
        without=tuple(told for name in common for told in _without(name, (first, second))),
        confidence=(confidence, confidence_of(second.summary)),
    )


def _without(name: str, runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """(model, run, why) of the runs that have no realigned form of a model; nothing of one that both only merge."""
    became = [(run.label, standing(run.summary, _named(run, name)), _named(run, name)["error"]) for run in runs]
    if all(found == "merged" for _, found, _ in became):
        return []
    told = []
    for run, found, error in became:
        why = {"failed": f"failed: {error}", "merged": "merged with others", "unselected": "nothing selected"}.get(
            found
        )
        told += [(name, run, why)] if why is not None else []
    return told


def _named(run: Run, name: str) -> FinetuneSummary:
    return next(one for one in shown_models(run.summary) if one["name"] == name)


def _rates(run: Run, name: str, variant: str) -> Rates | None:
    if not name:
        return run.summary["aligned"]
    return _named(run, name).get("before" if variant == "before" else f"after_{variant}")  # type: ignore[return-value]


def _reference(run: Run, name: str, variant: str) -> str | None:
    """Of an evaluation's record."""
    records = (_named(run, name) if name else run.summary).get("records", {})
    return records[f"evaluate_{variant}"]["reference"] if f"evaluate_{variant}" in records else None


def _pair(name: str, variants: tuple[str, str], first: Run, second: Run, confidence: float) -> Pair:
    rates = [_rates(run, name, variant) or {} for run, variant in zip((first, second), variants, strict=True)]
    answers = [run.answers.get((name, variant)) for run, variant in zip((first, second), variants, strict=True)]
    references = [_reference(run, name, variant) for run, variant in zip((first, second), variants, strict=True)]
    same = references[0] is not None and references[0] == references[1]
    absent = [run.label for run, found in zip((first, second), rates, strict=True) if not found]
    apart, unpaired = ({}, "") if same or absent else _apart(answers[0], answers[1], confidence)
    if absent:
        unpaired = f"no paired difference: not measured in {' and '.join(absent)}"
    lines = []
    for where in (None, *dict.fromkeys(n for found in rates for n in found.get("sets", {}) if "/" not in n)):
        told = [dict(found) if where is None else found.get("sets", {}).get(where, {}) for found in rates]
        for metric in dict.fromkeys(m for one in told for m in one if m in METRIC_NAMES):
            if any(told) and (where is not None or metric in HEADLINES):
                a, b = (one.get(metric) for one in told)
                lines.append(Measurement(metric, where, a, b, apart.get((where, metric))))  # type: ignore[arg-type]
    if not apart or answers[0] is None or answers[1] is None:
        return Pair(name, variants, tuple(lines), unpaired, same)
    shared = _shared(answers[0], answers[1])
    ours, theirs = ({one.name: some.outcomes[one.name] for one in shared} for some in answers if some is not None)
    flips = compared(second.label, {}, {}, ours, theirs)
    return Pair(name, variants, tuple(lines), unpaired, same, flips, tuple(shared))


def _apart(
    first: Answered | None, second: Answered | None, confidence: float
) -> tuple[dict[tuple[str | None, str], Difference], str]:
    """(set or None, metric) -> second minus first; or why there is none."""
    if first is None or second is None:
        return {}, "no paired difference: a run's answers are not at hand"
    shared = _shared(first, second)
    if not shared:
        return {}, "no paired difference: the prompts are not the same"
    found: dict[tuple[str | None, str], Difference] = {}
    for one in shared:
        alone = ASet(one.name, one.kind, True)
        for metric, difference in _compared([alone], first, second, confidence).items():
            found[one.name, metric] = difference
    for metric in HEADLINES:
        counted = [_counted(some, metric) for some in (first, second)]
        sets = [one for one in shared if one.name in counted[0]]
        if counted[0] == counted[1] and sets and len(sets) == len(counted[0]):
            found[None, metric] = _compared(sets, first, second, confidence)[metric]
    return found, ""


def _counted(some: Answered, metric: str) -> set[str]:
    """The sets that make up a headline rate."""
    return {one.name for one in some.sets if one.counts and metric in metrics_of(one.kind)}


def _compared(sets: Sequence[NamedSet], first: Answered, second: Answered, confidence: float) -> dict[str, Difference]:
    return compare_outcomes(sets=sets, first=dict(second.outcomes), second=dict(first.outcomes), confidence=confidence)


def _shared(first: Answered, second: Answered) -> list[ASet]:
    """The sets that were asked the same of both."""
    kinds = {one.name: one.kind for one in second.sets}
    return [
        one
        for one in first.sets
        if kinds.get(one.name) == one.kind
        and [o.question for o in first.outcomes[one.name]] == [o.question for o in second.outcomes[one.name]]
    ]


def _adjusted(pairs: Sequence[Pair]) -> tuple[Pair, ...]:
    """With p corrected over all comparisons of headline rates."""
    p = {
        f"{i} {line.metric}": line.difference["p"]
        for i, pair in enumerate(pairs)
        for line in pair.lines
        if line.set is None and line.difference is not None
    }
    fair = holm(p)
    return tuple(
        replace(
            pair,
            lines=tuple(
                replace(line, adjusted=fair.get(f"{i} {line.metric}")) if line.set is None else line
                for line in pair.lines
            ),
        )
        for i, pair in enumerate(pairs)
    )


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names with text values."""
    found: dict[str, str] = {}
    for name, one in value.items():
        if isinstance(one, Mapping) and one:
            found |= _flat(one, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = one if isinstance(one, str) else json.dumps(one, ensure_ascii=False)
    return found


def comparison_json(found: Comparison) -> dict[str, Any]:
    """Plain JSON types, without the answers."""
    pairs = [
        {key: value for key, value in asdict(replace(p, flips=None)).items() if key != "flips"} for p in found.pairs
    ]
    return {**asdict(replace(found, pairs=())), "schema": 1, "pairs": pairs}
