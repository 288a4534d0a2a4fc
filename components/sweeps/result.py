"""What a sweep of one target found, as plain data: the front, the run's own settings, the winner. Needs no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from components.errors import EvaluationError
from components.evaluation.metrics import rate
from components.evaluation.settings import IntervalMethod
from components.reporting.schema import Interval
from components.sweeps.front import best, hypervolume, pareto_front, reference_of
from components.sweeps.settings import Objective, SweepSettings
from components.sweeps.space import Tuning, same_tuning, tuning_of
from components.sweeps.trials import Candidate, Scored


class Entry(TypedDict):
    """A candidate that was asked everything."""

    number: int
    """Its place among all that were tried, from 0."""
    candidate: Candidate
    settings: dict[str, Any]
    """`fusion`, and `merge` of a merge: all that differs from the fields' defaults."""
    rates: dict[str, Interval]
    """`Objective.name` -> over all its dev prompts."""
    meets: bool
    """Whether every demand is met by the rates as they were measured."""


class SweepResult(TypedDict):
    """One target's part of `sweep.json`."""

    name: str
    objectives: list[dict[str, Any]]
    pick: str
    front: list[Entry]
    """What no other candidate beats in every objective, best first in the first objective."""
    own: list[Entry]
    """The run's own settings."""
    picked: Entry
    trials: list[dict[str, Any]]
    """Of each that was tried: `candidate`, `rates` as far as it was asked (name -> value), `stopped`."""
    prompts: dict[str, int]
    """`asked` of all candidates, and `all`: what asking each of them everything would have been."""
    hypervolume: float
    """Of the front, from the demands on: how much of what would keep them it beats."""
    seconds: dict[str, float]
    """`fuse` and `score`, summed over candidates."""
    started_ms: int
    """When the first candidate was tried, since the epoch."""
    notes: list[str]


def sweep_result(
    name: str,
    scored: Sequence[Scored],
    *,
    sweep: SweepSettings,
    defaults: Tuning,
    own: Sequence[Candidate],
    prompts: Mapping[str, int],
    started_ms: int = 0,
    confidence: float = 0.95,
    interval: IntervalMethod = "wilson",
) -> SweepResult:
    """`prompts`: `Objective.name` -> how many there are. Raises EvaluationError where no candidate was asked everything."""
    objectives = sweep.objectives
    full = [(i, one) for i, one in enumerate(scored) if one.is_full(prompts)]
    if not full:
        raise EvaluationError(f"sweep of {name}: no candidate was asked every prompt; nothing can be picked")
    usual = usual_of(scored, own, sweep, prompts)
    losses = [one.losses(objectives) for _, one in full]

    def entry(place: int) -> Entry:
        number, one = full[place]
        rates = {
            o.name: rate([hit == "1" for hit in one.hits[o.name]], confidence=confidence, method=interval)
            for o in objectives
        }
        met = all(loss <= o.most_loss for o, loss in zip(objectives, losses[place], strict=True))
        settings = tuning_of(one.candidate, defaults).model_dump(mode="json", exclude_defaults=True)
        return Entry(number=number, candidate=one.candidate, settings=settings, rates=rates, meets=met)

    picked = entry(best([one for _, one in full], objectives, sweep.pick, usual, tolerance=sweep.tolerance))
    front = sorted(pareto_front(losses), key=lambda place: (losses[place], full[place][0]))
    asked = sum(len(hits) for one in scored for hits in one.hits.values())
    return SweepResult(
        name=name,
        objectives=[o.model_dump(mode="json", exclude_none=True) for o in objectives],
        pick=sweep.pick,
        front=[entry(place) for place in front],
        own=[entry(place) for place, (_, one) in enumerate(full) if one.candidate in own],
        picked=picked,
        trials=[_short(one, objectives) for one in scored],
        prompts={"asked": asked, "all": len(scored) * sum(prompts.values())},
        hypervolume=hypervolume(losses, reference_of(objectives)),
        seconds={key: round(sum(one.seconds.get(key, 0.0) for one in scored), 3) for key in ("fuse", "score")},
        started_ms=started_ms,
        notes=_notes(picked, [entry(place) for place in range(len(full))], sweep, own, defaults),
    )


def usual_of(
    scored: Sequence[Scored], own: Sequence[Candidate], sweep: SweepSettings, prompts: Mapping[str, int]
) -> Scored | None:
    """The best of the run's own settings, as far as they were asked everything."""
    found = [one for one in scored if one.candidate in own and one.is_full(prompts)]
    return found[best(found, sweep.objectives, sweep.pick, None, tolerance=sweep.tolerance)] if found else None


def _short(one: Scored, objectives: Sequence[Objective]) -> dict[str, Any]:
    rates = {o.name: round(one.rate(o), 6) for o in objectives if one.hits.get(o.name)}
    return {"candidate": one.candidate, "rates": rates, "stopped": one.stopped}


def _notes(
    picked: Entry, full: Sequence[Entry], sweep: SweepSettings, own: Sequence[Candidate], defaults: Tuning
) -> list[str]:
    notes, objectives = [], sweep.objectives
    if not picked["meets"]:
        demands = ", ".join(f"{o.name} {demand_of(o)}" for o in objectives if o.demand is not None)
        notes.append(f"no candidate meets every demand ({demands}); the one that misses them by the least was picked")
    elif sweep.pick == "skill" and any(
        _skill(one, objectives) > _skill(picked, objectives) for one in full if one["meets"]
    ):
        notes.append(
            f"skill within {100 * sweep.tolerance:g} points of the most there is counts as equal (sweep.tolerance): of these "
            "the one picked is safer"
        )
    best = tuning_of(picked["candidate"], defaults)
    for one in own:
        if same_tuning(best, tuning_of(one, defaults)):
            notes.append(f"the run's own form {form_of(one)} was picked: nothing that was tried is better")
    return notes


def _skill(one: Entry, objectives: Sequence[Objective]) -> float:
    return round(sum(one["rates"][o.name]["value"] for o in objectives if o.grows), 9)


def form_of(own: Candidate) -> str:
    """Of the run's own settings."""
    return str(own.get("form", "soft"))


def asked_share(result: SweepResult) -> float:
    """Of the prompts that asking every candidate everything would have taken."""
    return result["prompts"]["asked"] / max(result["prompts"]["all"], 1)


def demand_of(objective: Objective) -> str:
    """`≤ 5 %`, empty without one."""
    if objective.demand is None:
        return ""
    return f"{'≥' if objective.grows else '≤'} {100 * objective.demand:g} %"


def candidate_text(candidate: Candidate) -> str:
    """A candidate in a line; empty where it says nothing."""
    said = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in candidate.items()]
    return ", ".join(said)
