"""What a fusion method is given and what it gives: one tensor's inputs, a slice, the function for its slices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from components.checkpoints.source import TensorSource
from components.fusion.restoration import Lineage
from components.fusion.settings import FusionSettings


class Mask(Protocol):
    """What fusion needs of a mask artifact."""

    def names(self) -> list[str]:
        """Tensors that the mask speaks of."""
        ...

    def numel(self, name: str) -> int:
        """Elements of one of them."""
        ...

    def is_masked(self, name: str) -> bool:
        """False for a tensor that was left out in training: it keeps the finetune's weights."""
        ...

    def soft(self, name: str, start: int, stop: int, *, temperature: float = 1.0) -> torch.Tensor:
        """σ(ℓ / temperature) of a slice, 1-D fp32."""
        ...

    def binary(self, name: str, start: int, stop: int, *, threshold: float = 0.0) -> torch.Tensor:
        """ℓ > threshold of a slice, 1-D bool."""
        ...

    def soft_mean(self, name: str, *, temperature: float = 1.0) -> float:
        """Mean of σ(ℓ / temperature) over the whole tensor."""
        ...

    def density(self, name: str, *, threshold: float = 0.0) -> float:
        """Share of ℓ > threshold in the whole tensor."""
        ...

    def unit(self, name: str) -> int:
        """Neighbours that share a logit."""
        ...


@dataclass(frozen=True)
class TensorInputs:
    """One tensor's inputs beyond the two slices that every method is given."""

    name: str
    numel: int
    dtype: torch.dtype
    """Of the output."""
    mask: Mask | None
    unaligned: TensorSource | None
    aligned: TensorSource | None = None
    """Of the whole model, for methods that look at whole tensors; the finetune's and a safe finetune's likewise."""
    finetune: TensorSource | None = None
    safe: TensorSource | None = None

    @property
    def lineage(self) -> Lineage:
        """The three models whose differences a restoration is made of."""
        assert self.aligned is not None
        assert self.finetune is not None
        assert self.unaligned is not None
        return Lineage(self.aligned, self.finetune, self.unaligned)


@dataclass(frozen=True)
class Block:
    """Slices [start, stop) of aligned and finetune, flattened, as stored."""

    start: int
    stop: int
    aligned: torch.Tensor
    finetune: torch.Tensor


Kernel = Callable[[Block], "torch.Tensor"]
"""Fused slice: fp32, or already in the output dtype."""


@dataclass(frozen=True)
class Method:
    """A named way to fuse. `prepare` does what a whole tensor needs once and gives the function for its slices."""

    name: str
    paper: str
    prepare: Callable[[TensorInputs, FusionSettings], Kernel]
    needs_mask: bool = False
    needs_unaligned: bool = False
    takes_safe: bool = False
    """Has a use for a finetune that was made safe."""
    keeps_equal: bool = True
    """Where aligned and finetune are equal, so is the result."""
    whole_tensors: bool = False
    """A kernel holds matrices: no more than one is to be kept at a time."""
    settle: Callable[[Lineage, FusionSettings, int], FusionSettings] | None = None
    """Finds, by looking at all tensors once with so many processes, settings that need no such look."""
