"""TensorSource: everything with weights looks the same to later stages.

Sharded safetensors, a LoRA adapter over its base, and a delta are implementations; later stages never ask which.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from components.checkpoints.dtypes import Bits, DType, Stretch, as_bits


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor before a byte of it is read."""

    kind: DType
    shape: tuple[int, ...]

    @staticmethod
    def of(tensor: torch.Tensor) -> TensorSpec:
        """That of a tensor in memory. Raises CheckpointError for a dtype that safetensors files cannot hold."""
        return TensorSpec(DType.of(tensor.dtype), tuple(tensor.shape))

    @property
    def dtype(self) -> torch.dtype:
        """`kind`, for torch."""
        return self.kind.in_torch

    @property
    def numel(self) -> int:
        n = 1
        for s in self.shape:
            n *= s
        return n

    @property
    def nbytes(self) -> int:
        return self.numel * self.kind.itemsize


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
class BitSource(Protocol):
    """A source whose tensors are as they lie in files: they can be had without torch."""

    def bits(self, name: str, start: int, stop: int) -> Bits:
        """What `read` gives, as plain memory: never write into it."""
        ...


@runtime_checkable
class InFiles(Protocol):
    """A source that can say where a tensor lies, for messages."""

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor (or its alias's)."""
        ...


def bits_of(source: TensorSource, name: str, start: int, stop: int) -> Bits:
    """Elements [start, stop) of any source as plain memory, without torch where it is a `BitSource`."""
    if has_bits(type(source)):
        found: Bits = source.bits(name, start, stop)  # type: ignore[attr-defined]
        return found
    return as_bits(source.read(name, start, stop))


@functools.cache
def has_bits(kind: type) -> bool:
    """Whether sources of a class are `BitSource`s; to look at a protocol's methods takes as long as to read a block."""
    return issubclass(kind, BitSource)


def stretch_from(source: TensorSource, name: str, start: int, stop: int) -> Stretch:
    """The same with what they mean."""
    return bits_of(source, name, start, stop), source.spec(name).kind


def read_whole(source: TensorSource, name: str) -> torch.Tensor:
    """One tensor in its own shape and stored dtype."""
    return source.read(name).reshape(source.spec(name).shape)


def blocks(numel: int, size: int) -> Iterator[tuple[int, int]]:
    """[start, stop) ranges of at most `size` elements that cover `numel` elements."""
    for start in range(0, numel, size):
        yield start, min(start + size, numel)
