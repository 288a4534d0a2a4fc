"""TensorSource: everything with weights looks the same to later stages.

Sharded safetensors, a LoRA adapter over its base, and a delta are implementations; later stages never ask which.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor before a byte of it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        n = 1
        for s in self.shape:
            n *= s
        return n

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@runtime_checkable
class TensorSource(Protocol):
    """Named tensors that are read by flattened range. Tied weights are one tensor with aliases."""

    def names(self) -> list[str]:
        """Every distinct tensor, sorted. An alias of a tied tensor is not listed."""
        ...

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of one tensor, from headers only. Raises CheckpointError for an unknown name."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, 1-D, in its stored dtype. The result may alias a read-only
        map: never write into it."""
        ...

    def aliases(self) -> Mapping[str, str]:
        """alias name -> the name under which the tensor is listed (tied weights, e.g. lm_head -> embed_tokens)."""
        ...


@runtime_checkable
class InFiles(Protocol):
    """A source that can say where a tensor lies, for messages."""

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor (or its alias's)."""
        ...


def read_whole(source: TensorSource, name: str) -> torch.Tensor:
    """One tensor in its own shape and stored dtype."""
    return source.read(name).reshape(source.spec(name).shape)


def blocks(numel: int, size: int) -> Iterator[tuple[int, int]]:
    """[start, stop) ranges of at most `size` elements that cover `numel` elements."""
    for start in range(0, numel, size):
        yield start, min(start + size, numel)
