"""How models are asked, not what: changes no answer beyond floating-point order. Pydantic only, for the command line."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class EvaluationExecution(BaseModel):
    """The processes and devices that answer a model's prompts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    actors: int = Field(default=1, ge=1)
    """Processes that share one model's prompts, each with the model in memory, on whatever nodes have room. With one on the
    CPU the stage answers by itself."""

    device: Literal["cpu", "cuda"] = "cpu"
    """What an actor computes on."""

    devices: int = Field(default=1, ge=1)
    """GPUs of one actor; over several a model is spread layer by layer."""

    patience_s: float = Field(default=1800.0, gt=0)
    """How long none of the actors may be placed and loaded before that is an error; a cluster that grows needs some time. There
    it does not run while others have their place."""

    resource: str | None = None
    """A resource of the cluster's own of which each actor takes one: so a group of nodes is kept for evaluations."""

    max_losses: int = Field(default=3, ge=0)
    """Actors that may be lost in one evaluation; their prompts are asked again of others."""

    @property
    def in_process(self) -> bool:
        """Whether no actor is needed."""
        return self.actors == 1 and self.device == "cpu"
