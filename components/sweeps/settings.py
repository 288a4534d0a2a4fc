"""What a sweep looks for and where: the trials, the space of fusion settings, the objectives, how a winner is picked.

Light on purpose: no torch, so that a run config is checked without paying for its import.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from components.evaluation.outcomes import NamedSet, metrics_of

Metric = Literal["asr", "harmful", "over_refusal", "incoherent", "unscored", "task", "exact"]
GROWS: frozenset[str] = frozenset({"task", "exact"})
"""Metrics of which more is better; less is of the others."""
Pick = Literal["skill", "knee", "safest"]
Sampler = Literal["tpe", "nsga2", "gp", "random"]
Value = float | int | str | bool


class Range(BaseModel):
    """Numbers from `low` to `high`, both among them; whole ones where the setting is a whole number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    low: float
    high: float
    log: bool = False
    """Tried evenly in their logarithm."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low {self.low:g} is above high {self.high:g}: the range is empty")
        if self.log and self.low <= 0:
            raise ValueError(f"log: low {self.low:g} has no logarithm; give one above 0")
        return self


WAY = " of values"
"""End of what pydantic calls the two ways to give values, where one of them is wrong."""


def _way(given: Any) -> str:
    return f"range{WAY}" if isinstance(given, Mapping | Range) else f"list{WAY}"


Dimension = Annotated[
    Annotated[Range, Tag(f"range{WAY}")] | Annotated[tuple[Value, ...], Tag(f"list{WAY}")], Discriminator(_way)
]
"""The values that a key may take: a range, or those of a list."""


def _flat(given: Any) -> Any:
    """Mappings of patterns or finetunes under one key as one key each: `layers: {"*.mlp.*": …}` is `layers.*.mlp.*`."""
    if not isinstance(given, Mapping):
        return given
    flat: dict[str, Any] = {}
    for key, value in given.items():
        if isinstance(value, Mapping) and not value.keys() <= Range.model_fields.keys():
            flat |= {f"{key}.{inner}": one for inner, one in _flat(value).items()}
        else:
            flat[key] = value if isinstance(value, Mapping | list | tuple | Range) else [value]
    return flat


Space = Annotated[dict[str, Dimension], BeforeValidator(_flat)]
"""Key of a candidate -> its values. The order of patterns is that in which they are looked through."""


class Objective(BaseModel):
    """One thing that is to get better, over the dev sets that measure it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: Metric
    set: str | None = None
    """Of one dev set; of all that count where none is named."""
    at_most: float | None = Field(None, ge=0, le=1)
    """A demand on a metric that is to fall: candidates above it do not win."""
    at_least: float | None = Field(None, ge=0, le=1)
    """A demand on a metric that is to grow."""

    @property
    def name(self) -> str:
        """`asr`, or `asr/<set>`."""
        return self.metric if self.set is None else f"{self.metric}/{self.set}"

    @property
    def grows(self) -> bool:
        """Whether more is better."""
        return self.metric in GROWS

    @property
    def demand(self) -> float | None:
        """The bound that must be kept, where there is one."""
        return self.at_least if self.grows else self.at_most

    def loss(self, rate: float) -> float:
        """The rate turned so that less is better, 0 … 1."""
        return 1 - rate if self.grows else rate

    @property
    def most_loss(self) -> float:
        """The loss that the demand allows; 1 without a demand."""
        return 1.0 if self.demand is None else self.loss(self.demand)

    def sets(self, there: Sequence[NamedSet]) -> list[NamedSet]:
        """Those of the dev sets that are counted."""
        own = [one for one in there if (one.counts if self.set is None else one.name == self.set)]
        return [one for one in own if self.metric in metrics_of(one.kind)]


DEFAULT_OBJECTIVES = (Objective(metric="asr", at_most=0.05), Objective(metric="task"), Objective(metric="over_refusal"))


class SweepSettings(BaseModel):
    """A sweep for each target of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    trials: int = Field(60, ge=1)
    """Candidates tried for each target, the run's own settings among them."""
    space: Space = Field(default_factory=dict)
    """Any key of the fusion settings -> a range or a list; empty: what makes sense for the run."""
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)] = DEFAULT_OBJECTIVES
    pick: Pick = "skill"
    """skill: the most skilful of those that keep every demand, and of those that are as skilful but for `tolerance` the safest;
    knee: where giving up more of one objective stops paying in the others; safest: the lowest attack success rate."""
    racing: bool = True
    """Stop candidates that cannot win before they have been asked every prompt."""
    sampler: Sampler = "tpe"
    seed: int = Field(0, ge=0)
    """Of the sampler and of the order of prompts."""
    sample: int = Field(16, ge=1)
    """Prompts of each objective that a candidate is asked first; each further sample doubles what was asked."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """That a candidate which is stopped would not have won, each time one is."""
    tolerance: float = Field(0.02, ge=0, lt=1)
    """What the front may lose where candidates are stopped, of the range in which an objective counts: from the best there is
    to its demand, or to the worst. And under `skill` what counts as equal skill."""

    @model_validator(mode="after")
    def _objectives_agree(self) -> Self:
        problems = contradictions(self.objectives)
        if problems:
            raise ValueError("; ".join(problems))
        return self


def contradictions(objectives: Sequence[Objective]) -> list[str]:
    """Demands against the direction in which a metric gets better, and objectives named twice."""
    problems = []
    for one in objectives:
        if one.grows and one.at_most is not None:
            problems.append(
                f"objective {one.name} is to grow and cannot be held to at_most {one.at_most:g}; use at_least"
            )
        if not one.grows and one.at_least is not None:
            problems.append(
                f"objective {one.name} is to fall and cannot be held to at_least {one.at_least:g}; use at_most"
            )
    named: dict[str, list[Objective]] = {}
    for one in objectives:
        named.setdefault(one.name, []).append(one)
    for name, several in named.items():
        if len(several) == 1:
            continue
        highest = min((o.at_most for o in several if o.at_most is not None), default=1.0)
        lowest = max((o.at_least for o in several if o.at_least is not None), default=0.0)
        why = (
            f"at most {highest:g} and at least {lowest:g} exclude each other"
            if lowest > highest
            else "keep one of them"
        )
        problems.append(f"objective {name} is named {len(several)} times: {why}")
    return problems


def objective_problems(objectives: Sequence[Objective], dev_sets: Sequence[NamedSet]) -> list[str]:
    """Objectives that no dev set measures, with what there is."""
    problems = []
    for one in objectives:
        if not one.sets(dev_sets):
            asked = [s for s in dev_sets if (s.counts if one.set is None else s.name == one.set)]
            there = dict.fromkeys(metric for s in asked for metric in metrics_of(s.kind))
            if one.set is not None and not asked:
                names = ", ".join(sorted(s.name for s in dev_sets)) or "none"
                problems.append(f"objective {one.name}: no dev set {one.set} (there: {names})")
            else:
                problems.append(
                    f"objective {one.name}: no dev set {'that counts ' if one.set is None else ''}measures it "
                    f"(measured: {', '.join(there) or 'nothing'}); a sweep chooses on sets with split dev alone"
                )
    return problems
