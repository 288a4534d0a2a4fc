"""What a merge of several finetunes is: the method and every number that changes the merged weights, and nothing else.

Light on purpose: no torch, so that a run config is checked without paying for its import.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MergeMethod = Literal["average", "task_arithmetic", "ties", "dare", "dare_ties", "slerp"]

MERGE_PAPERS: Mapping[MergeMethod, tuple[str, ...]] = {
    "average": ("https://arxiv.org/abs/2203.05482",),
    "task_arithmetic": ("https://arxiv.org/abs/2212.04089",),
    "ties": ("https://arxiv.org/abs/2306.01708",),
    "dare": ("https://arxiv.org/abs/2311.03099",),
    "dare_ties": ("https://arxiv.org/abs/2311.03099", "https://arxiv.org/abs/2306.01708"),
    "slerp": ("https://dl.acm.org/doi/10.1145/325165.325242",),
}
"""Where each method was published."""

OWN_FIELDS: dict[str, frozenset[str]] = {
    "average": frozenset({"scale", "layers"}),
    "task_arithmetic": frozenset({"scale", "layers", "weights"}),
    "ties": frozenset({"scale", "layers", "weights", "density", "densities", "threshold", "aggregate"}),
    "dare": frozenset({"scale", "layers", "weights", "density", "densities", "seed"}),
    "dare_ties": frozenset({"scale", "layers", "weights", "density", "densities", "seed", "aggregate"}),
    "slerp": frozenset({"t"}),
}
_DENSITY: dict[str, float] = {"ties": 0.2, "dare": 0.8, "dare_ties": 0.8}


_LEAST_KEPT = 2.0**-12
"""DARE's noise has 16 bits."""


def _as_pairs(value: Any) -> Any:
    return tuple(value.items()) if isinstance(value, Mapping) else value


Patterns = Annotated[tuple[tuple[str, float], ...], BeforeValidator(_as_pairs)]
"""Shell-style pattern of tensor names -> factor; the first that matches counts. Written as a mapping; kept, dumped and hashed
as a list of pairs, because JSON with sorted keys would lose the order that decides."""
Factor = float | Patterns
"""One number for every tensor, or numbers by pattern."""


def factor_for(factor: Factor, name: str) -> float | None:
    """The number for the tensor `name`; None where no pattern matches it."""
    if isinstance(factor, int | float):
        return float(factor)
    return next((value for pattern, value in factor if fnmatch.fnmatchcase(name, pattern)), None)


def idle_patterns(factor: Factor, names: Sequence[str]) -> list[str]:
    """Patterns that match none of the tensors."""
    patterns = [] if isinstance(factor, int | float) else [pattern for pattern, _ in factor]
    return [pattern for pattern in patterns if not any(fnmatch.fnmatchcase(name, pattern) for name in names)]


class MergeSettings(BaseModel):
    """How the task vectors τ_t of several finetunes become one. A field that the method has no use for is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: MergeMethod
    """`average`: their mean; `task_arithmetic`: their sum; `ties`: trim, elect signs, join those that agree; `dare`: drop at
    random, rescale, sum; `dare_ties`: drop at random, rescale, elect signs, join those that agree (nothing is trimmed);
    `slerp`: no merge of task vectors, but the arc between two models' weights."""
    scale: float = Field(1.0, gt=0)
    """λ, the factor on the merged task vector."""
    layers: Patterns = ()
    """Pattern of tensor names -> another factor on the merged task vector, beside λ; 1 where no pattern matches."""
    weights: dict[str, Factor] = Field(default_factory=dict)
    """finetune -> factor on its own task vector, one number or a number by pattern of tensor names, as in `{zh: 1.0, hi:
    {"model.layers.[0-9].*": 0.5, "*": 1.0}}`; 1 where none is given and where no pattern matches."""
    density: float | None = Field(None, gt=0, le=1)
    """Share of each task vector that stays: with ties the largest (default 0.2), with dare and dare_ties random ones (default
    0.8)."""
    densities: dict[str, Factor] = Field(default_factory=dict)
    """finetune -> its own density, one number or a number by pattern; `density` where none is given and where no pattern
    matches."""
    threshold: Literal["tensor", "model"] = "tensor"
    """ties: what is largest is found in each tensor by itself, or over the whole model."""
    aggregate: Literal["mean", "sum"] = "mean"
    """ties, dare_ties: of the task vectors that agree with the elected sign, their mean (as published) or their sum."""
    seed: int = Field(0, ge=0)
    """dare, dare_ties: which weights are dropped."""
    t: Factor | None = None
    """slerp: the place on the arc, 0 … 1, one number or a number by pattern (every tensor must then have one)."""

    @model_validator(mode="before")
    @classmethod
    def _with_its_density(cls, given: Any) -> Any:
        """Written out, so that records say what was used."""
        if isinstance(given, Mapping) and given.get("density") is None and given.get("method") in _DENSITY:
            return {**given, "density": _DENSITY[given["method"]]}
        return given

    @model_validator(mode="after")
    def _fields_fit_the_method(self) -> Self:
        useless = [
            name
            for name in sorted((MergeSettings.model_fields.keys() & self.model_fields_set) - OWN_FIELDS[self.method])
            if name != "method"
            and getattr(self, name) != MergeSettings.model_fields[name].get_default(call_default_factory=True)
        ]
        if useless:
            raise ValueError(f"method {self.method} has no use for {', '.join(useless)}")
        if self.method == "slerp":
            places = [] if self.t is None else [self.t] if isinstance(self.t, int | float) else [v for _, v in self.t]
            if not places:
                raise ValueError("method slerp needs t, the place between the first model (0) and the second (1)")
            if any(not 0 <= place <= 1 for place in places):
                raise ValueError("t is outside 0 … 1")
        for field, factors in (("weights", self.weights), ("densities", self.densities)):
            empty = [one for one, factor in factors.items() if factor == ()]
            if empty:
                raise ValueError(f"{field} of {', '.join(empty)}: no pattern is given")
        self._check_densities()
        if self.method in ("dare", "dare_ties") and self.kept < _LEAST_KEPT:
            raise ValueError(f"density {self.kept} is less than drops can be told apart at ({_LEAST_KEPT:.1e})")
        return self

    def _check_densities(self) -> None:
        for one, factor in self.densities.items():
            shares = [factor] if isinstance(factor, int | float) else [share for _, share in factor]
            if any(not 0 < share <= 1 for share in shares):
                raise ValueError(f"densities of {one}: a share is above 0 and at most 1")
            if isinstance(factor, tuple) and self.threshold == "model":
                raise ValueError(f"densities of {one}: a threshold over the whole model has one density; give a number")

    @property
    def kept(self) -> float:
        """The density that counts: 1 where the method leaves nothing out."""
        return 1.0 if self.density is None else self.density

    def kept_of(self, finetune: str, name: str) -> float:
        """The density that counts for one finetune's tensor."""
        found = factor_for(self.densities.get(finetune, self.kept), name)
        return self.kept if found is None else found


def merge_problems(
    settings: MergeSettings, finetunes: Sequence[str], tensors: Sequence[str] | None = None
) -> list[str]:
    """Everything in the settings that does not fit the finetunes and, where they are known, the names of the tensors: weights
    or densities of an unknown finetune, patterns that match nothing, tensors that slerp has no place for, a third model for
    slerp."""
    own = {"weights": settings.weights, "densities": settings.densities}
    problems = [
        f"{field} names {one!r}, which is not there" for field, of in own.items() for one in of if one not in finetunes
    ]
    if settings.method == "slerp" and not 1 <= len(finetunes) <= 2:
        problems.append(
            f"slerp is between two models: two finetunes, or the aligned model and one finetune; given are {len(finetunes)}"
        )
    if tensors is None:
        return problems
    fields: list[tuple[str, Factor | None]] = [("layers", settings.layers), ("t", settings.t)]
    fields += [(f"{field} of {one}", factor) for field, of in own.items() for one, factor in of.items()]
    for field, factor in fields:
        idle = [] if factor is None else idle_patterns(factor, tensors)
        problems += [f"{field}: pattern {pattern!r} matches no tensor" for pattern in idle]
    if isinstance(settings.t, tuple):
        problems += [f"t: no pattern matches {n}" for n in tensors if factor_for(settings.t, n) is None]
    return problems
