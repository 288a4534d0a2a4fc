"""What shares a logit: spreading to elements and summing back are each other's transpose, on any slice."""

from __future__ import annotations

import pytest
import torch

from components.masks.granularity import gathered, spread, units
from components.masks.settings import MaskSettings


@pytest.mark.parametrize(
    ("granularity", "shape", "unit"),
    [
        ("element", (4, 6), 1), ("row", (4, 6), 6), ("row", (2, 4, 6), 6), ("row", (7,), 1), ("tensor", (4, 6), 24),
        ("tensor", (7,), 7),
    ],
)  # fmt: skip
def test_units_follow_the_shape(granularity: str, shape: tuple[int, ...], unit: int) -> None:
    assert MaskSettings(granularity=granularity).unit(shape) == unit  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("unit", "start", "stop"), [(1, 3, 9), (6, 0, 24), (6, 6, 12), (6, 7, 11), (6, 5, 20), (24, 3, 22)]
)
def test_sums_are_the_transpose_of_spreading(unit: int, start: int, stop: int) -> None:
    owner = torch.arange(24) // unit
    per_unit = torch.randn(24 // unit, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first, last = units(unit, start, stop)
    assert torch.equal(spread(per_unit[first:last], unit, start, stop), per_unit[owner[start:stop]])
    values = torch.randn(stop - start, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.zeros(24 // unit, dtype=torch.float64).index_add(0, owner[start:stop], values)
    torch.testing.assert_close(gathered(values, unit, start), expected[first:last], rtol=1e-12, atol=0)
