"""How a mask's training is spread: nothing here changes what it learns, beyond rounding."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ZeroSettings(BaseModel):
    """Execution of mask training on several ranks (ZeRO, arXiv 1910.02054)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: Literal[0, 1, 2, 3] = 3
    """What is spread over ranks beside the batch: 0 nothing, 1 the mask's state and the two models' stored weights, 2
    gradients too, 3 the fused weights too (DeepSpeed gathers one layer at a time)."""
    accumulate: int = Field(default=1, ge=1)
    """Parts in which a rank's share of a batch goes through the model: less memory for activations."""
    activation_checkpointing: bool = False
    """Keep a layer's input only and compute the rest again in backward."""


class MaskExecution(ZeroSettings):
    """The processes that train a mask together."""

    ranks: int = Field(default=1, ge=1)
    """Processes, each with its CPU threads (and a GPU where `device` says so), on as many nodes as it takes. 1: the stage's
    own process, in which nothing is spread."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model goes forward and backward: gloo connects CPUs, NCCL GPUs."""
    checkpoint_seconds: float = Field(default=10.0, ge=0)
    """Seconds between two states that a killed training goes on from."""
    max_failures: int = Field(default=3, ge=0)
    """How often lost ranks are started again before the stage fails."""
