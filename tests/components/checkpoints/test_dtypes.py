"""Element types and plain memory say what torch says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from components.checkpoints.dtypes import (
    DTYPES,
    DType,
    all_finite,
    as_bits,
    as_floats,
    as_tensor,
    named,
    promoted,
    stretch_of,
)
from components.errors import CheckpointError

FLOATS = [one for one in DTYPES.values() if one.is_float]


@pytest.mark.parametrize("one", DTYPES.values(), ids=str)
def test_a_type_is_torchs(one: DType) -> None:
    dtype = one.in_torch
    assert (dtype.itemsize, dtype.is_floating_point) == (one.itemsize, one.is_float)
    assert DType.of(dtype) == named(one.name) == one


@pytest.mark.parametrize(("one", "other"), itertools.product(DTYPES.values(), repeat=2), ids=str)
def test_the_wider_of_two_is_torchs(one: DType, other: DType) -> None:
    assert promoted(one, other).in_torch == torch.promote_types(one.in_torch, other.in_torch)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_what_files_cannot_hold_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(CheckpointError, match=f"cannot hold {str(dtype).removeprefix('torch.')}"):
        DType.of(dtype)


@pytest.mark.parametrize("one", FLOATS, ids=str)
def test_every_pattern_has_the_value_that_torch_gives_it(one: DType) -> None:
    bits = np.random.default_rng(0).integers(0, 2**64, 65_536, dtype=np.uint64).view(one.bits)[:65_536]
    if one.itemsize == 2:
        bits = np.arange(65_536, dtype=np.uint16)  # all there are
    values = as_floats(bits, one)
    wanted = as_tensor(bits, one).to(torch.float64 if one.itemsize == 8 else torch.float32).numpy()
    assert values.dtype == wanted.dtype
    np.testing.assert_array_equal(values, wanted)  # NaN beside NaN
    finite = np.isfinite(wanted)
    assert all_finite(bits[finite], one)
    assert not any(all_finite(np.append(bits[finite][:9], bad), one) for bad in bits[~finite][:50])


def test_one_that_is_not_finite_is_found_in_any_block() -> None:
    for at in (0, 262_143, 262_144, 599_999):
        values = torch.full((600_000,), -3.4e38)
        assert all_finite(*stretch_of(values))
        values[at] = float("nan")
        assert not all_finite(*stretch_of(values))
    assert all_finite(*stretch_of(torch.empty(0)))
    assert all_finite(*stretch_of(torch.full((9,), -1)))


@pytest.mark.parametrize("one", DTYPES.values(), ids=str)
def test_bits_and_tensors_share_memory(one: DType) -> None:
    tensor = torch.zeros(7, dtype=one.in_torch)
    bits = as_bits(tensor[2:])
    bits[:2] = 1
    back = as_tensor(bits, one)
    assert back.dtype == one.in_torch
    assert back.data_ptr() == tensor[2:].data_ptr()
    assert tensor.count_nonzero() == 2
