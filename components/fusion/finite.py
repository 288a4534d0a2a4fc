"""Whose weight is not a number, and which."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from components.checkpoints.compare import unravel
from components.checkpoints.dtypes import Bits, DType, as_floats
from components.errors import CheckpointError


def refuse_not_finite(name: str, shape: tuple[int, ...], start: int, slices: Mapping[str, tuple[Bits, DType]]) -> None:
    """Raise CheckpointError for the first weight that is not finite, in the order of `slices`: whose -> its elements `start`
    and on of the tensor `name`. Nothing happens where all are."""
    for whose, (bits, dtype) in slices.items():
        values = as_floats(bits, dtype)
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            at = int(bad[0])
            index = ", ".join(map(str, unravel(start + at, shape)))
            hint = f"; {dtype} overflows" if whose == "fused" else ""
            raise CheckpointError(f"{whose} model: {name}[{index}] is {float(values[at])}{hint}")
