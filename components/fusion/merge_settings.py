"""What a merge of several finetunes is: the method and every number that changes the merged weights, and nothing else.

Light on purpose: no torch, so that a run config is checked without paying for its import.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MergeMethod = Literal["average", "task_arithmetic", "ties", "dare"]

_OWN_FIELDS: dict[str, frozenset[str]] = {
    "average": frozenset({"scale"}),
    "task_arithmetic": frozenset({"scale", "weights"}),
    "ties": frozenset({"scale", "weights", "density", "threshold", "aggregate"}),
    "dare": frozenset({"scale", "weights", "density", "seed"}),
}
_DENSITY: dict[str, float] = {"ties": 0.2, "dare": 0.8}


class MergeSettings(BaseModel):
    """How the task vectors τ_t of several finetunes become one. A field that the method has no use for is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: MergeMethod
    """`average`: their mean; `task_arithmetic`: their sum; `ties`: trim, elect signs, join those that agree; `dare`: drop at
    random, rescale, sum."""
    scale: float = Field(1.0, gt=0)
    """λ, the factor on the merged task vector."""
    weights: dict[str, float] = Field(default_factory=dict)
    """finetune -> factor on its own task vector; 1 where none is given."""
    density: float | None = Field(None, gt=0, le=1)
    """Share of each task vector that stays: with ties the largest (default 0.2), with dare random ones (default 0.8)."""
    threshold: Literal["tensor", "model"] = "tensor"
    """ties: what is largest is found in each tensor by itself, or over the whole model."""
    aggregate: Literal["mean", "sum"] = "mean"
    """ties: of the task vectors that agree with the elected sign, their mean (as published) or their sum."""
    seed: int = Field(0, ge=0)
    """dare: which weights are dropped."""

    @model_validator(mode="after")
    def _fields_fit_the_method(self) -> Self:
        useless = [
            name
            for name in sorted((MergeSettings.model_fields.keys() & self.model_fields_set) - _OWN_FIELDS[self.method])
            if name != "method"
            and getattr(self, name) != MergeSettings.model_fields[name].get_default(call_default_factory=True)
        ]
        if useless:
            raise ValueError(f"method {self.method} has no use for {', '.join(useless)}")
        return self

    @property
    def kept(self) -> float:
        """The density that counts: 1 where the method leaves nothing out."""
        return self.density if self.density is not None else _DENSITY.get(self.method, 1.0)
