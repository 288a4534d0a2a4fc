"""How a mask's training is spread: nothing here changes what it learns, beyond rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Offload = Literal["none", "cpu", "nvme"]


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
    offload: Offload = "none"
    """Where logits, Adam's moments and the two stored models live: on the model's device, in the host's memory (cpu), or over
    files (nvme). Off the device they are worked on by the CPU, as in ZeRO-Offload (arXiv 2101.06840): only new weights and
    gradients cross to the GPU and back, a fifth of what fetching all of this would move. Stored models that are read as
    they lie in their files are mapped in every case, and copied to no other place than the device."""
    offload_weights: Offload = "none"
    """Where a rank's partitions of the fused weights and its gradients live. ZeRO-3 only: below it every rank has them all."""
    offload_dir: Path | None = None
    """A directory on a fast local disk for nvme; by default the stage's own state directory in the workspace. What lies there
    has no name and is gone with the process. DeepSpeed's own swapper is not used: it needs a compiled operator
    (libaio) and swaps for DeepSpeed's optimizers, which nothing here uses."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.offload_weights != "none" and self.stage != 3:
            raise ValueError("offload_weights needs stage 3: below it every rank holds all weights on its device")
        return self


class MaskExecution(ZeroSettings):
    """The processes that train a mask together."""

    ranks: int = Field(default=1, ge=1)
    """Processes, each with its CPU threads (and a GPU where `device` says so), on as many nodes as it takes. 1 on the CPU: the
    stage's own process, in which nothing is spread."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model goes forward and backward: gloo connects CPUs, NCCL GPUs."""
    checkpoint_seconds: float = Field(default=10.0, ge=0)
    """Seconds between two states that a killed training goes on from."""
    checkpoint_steps: int = Field(default=0, ge=0)
    """Steps after each of which such a state is kept too; 0: the clock alone decides. A training in the stage's own process
    that is asked to end (SIGTERM) keeps one in any case; ranks of Ray Train run beside the main thread, which alone hears."""
    max_failures: int = Field(default=3, ge=0)
    """How often lost ranks are started again before the stage fails."""
    patience_s: float = Field(default=1800.0, gt=0)
    """How long ranks may wait for nodes that could hold all of them at once; a cluster that grows needs some time. Waiting for
    their turn on nodes that are there does not count."""
    resource: str | None = None
    """A resource of the cluster's own of which each rank takes one: so a group of nodes is kept for training."""

    @property
    def spread(self) -> bool:
        """Whether ranks of their own train, and not the stage's process, which has no GPU."""
        return self.ranks > 1 or self.device == "cuda"

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        idle = [name for name in ("offload", "offload_weights") if getattr(self, name) == "cpu"]
        problems = []
        if idle and self.device == "cpu":
            problems.append(
                f"{' and '.join(idle)}: cpu, but with device: cpu they are there already; take nvme, or none"
            )
        if self.offload_weights != "none" and not self.spread:
            problems.append("offload_weights needs several ranks: one process holds all weights on its device")
        if problems:
            raise ValueError("; ".join(problems))
        return self
