"""Types of stored elements, and stored elements as plain memory: what can be known of a model, and done with it, without torch.

To import torch takes longer than to open a model, and than to fuse a small one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from components.errors import CheckpointError

Bits = npt.NDArray[np.unsignedinteger[Any]]
"""Elements as unsigned integers of their own width, 1-D, whatever they mean."""
_FINITE_BLOCK = 1 << 18


@dataclass(frozen=True)
class DType:
    """A type of element that safetensors files can hold."""

    code: str
    """As safetensors writes it."""
    name: str
    """As torch and config.json do."""
    itemsize: int
    """Bytes of an element."""
    exponent: int = 0
    """Its exponent's bits, all set; 0 for integers."""

    @property
    def is_float(self) -> bool:
        return self.exponent > 0

    @property
    def bits(self) -> np.dtype[np.unsignedinteger[Any]]:
        """The type of `Bits`."""
        return np.dtype(f"u{self.itemsize}")

    @property
    def in_torch(self) -> torch.dtype:
        """torch's."""
        found: torch.dtype = getattr(torch, self.name)
        return found

    @staticmethod
    def of(dtype: torch.dtype) -> DType:
        """Raises CheckpointError for what safetensors files cannot hold."""
        return named(str(dtype).removeprefix("torch."))

    def __str__(self) -> str:
        return self.name


Stretch = tuple[Bits, DType]
"""Elements and what they mean."""

BF16, F16 = DType("BF16", "bfloat16", 2, 0x7F80), DType("F16", "float16", 2, 0x7C00)
F32, F64 = DType("F32", "float32", 4, 0xFF << 23), DType("F64", "float64", 8, 0x7FF << 52)
BOOL, U8, I8 = DType("BOOL", "bool", 1), DType("U8", "uint8", 1), DType("I8", "int8", 1)
I16, I32, I64 = DType("I16", "int16", 2), DType("I32", "int32", 4), DType("I64", "int64", 8)

DTYPES: Mapping[str, DType] = {one.code: one for one in (F64, F32, F16, BF16, I64, I32, I16, I8, U8, BOOL)}
"""By safetensors' code."""
_BY_NAME = {one.name: one for one in DTYPES.values()}


def named(name: str) -> DType:
    """`bfloat16`, `float32`, … Raises CheckpointError for others."""
    if name not in _BY_NAME:
        raise CheckpointError(f"safetensors files cannot hold {name}; there are {', '.join(sorted(_BY_NAME))}")
    return _BY_NAME[name]


def promoted(one: DType, other: DType) -> DType:
    """The type that holds both, as `torch.promote_types` has it."""
    if one == other:
        return one
    if one.is_float != other.is_float:
        return one if one.is_float else other
    if {one, other} == {BF16, F16}:
        return F32
    if {one, other} == {U8, I8}:
        return I16
    order = [BOOL, U8, I8, BF16, F16, I16, F32, I32, I64, F64]
    return max(one, other, key=lambda dtype: (dtype.itemsize, order.index(dtype)))


def as_bits(values: torch.Tensor) -> Bits:
    """A contiguous 1-D CPU tensor's own memory."""
    raw: Bits = values.detach().view(torch.uint8).numpy().view(f"u{values.dtype.itemsize}")
    return raw


def stretch_of(values: torch.Tensor) -> Stretch:
    """A 1-D CPU tensor as memory and type."""
    return as_bits(values.contiguous()), DType.of(values.dtype)


def as_tensor(bits: Bits, dtype: DType) -> torch.Tensor:
    """The same memory as a tensor, 1-D."""
    return torch.from_numpy(bits.view(np.uint8)).view(dtype.in_torch)


def as_floats(bits: Bits, dtype: DType) -> npt.NDArray[np.floating[Any]]:
    """The values of floats: in fp64 those that are, else in fp32, which holds them exactly. May be the same memory."""
    if dtype == BF16:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    values: npt.NDArray[np.floating[Any]] = bits.view(f"f{dtype.itemsize}")
    return values.astype(np.float32) if dtype == F16 else values


def all_finite(bits: Bits, dtype: DType) -> bool:
    """No NaN and no infinity among floats: their exponents are all ones. True of integers."""
    if not dtype.is_float:
        return True
    mask = dtype.bits.type(dtype.exponent)
    room = np.empty(min(_FINITE_BLOCK, bits.size), dtype.bits)
    for start in range(0, bits.size, _FINITE_BLOCK):
        part = bits[start : start + _FINITE_BLOCK]
        if int(np.bitwise_and(part, mask, out=room[: part.size]).max()) == mask:
            return False
    return True
