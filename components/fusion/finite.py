"""Whose weight is not a number, and which."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from components.checkpoints.compare import unravel
from components.errors import CheckpointError


def refuse_not_finite(name: str, shape: tuple[int, ...], start: int, slices: Mapping[str, torch.Tensor]) -> None:
    """Raise CheckpointError for the first weight that is not finite, in the order of `slices`: whose -> its elements `start`
    and on of the tensor `name`, 1-D. Nothing happens where all are."""
    for whose, values in slices.items():
        bad = (~torch.isfinite(values)).nonzero().reshape(-1)
        if bad.numel():
            at = int(bad[0])
            index = ", ".join(map(str, unravel(start + at, shape)))
            hint = f"; {values.dtype} overflows" if whose == "fused" else ""
            raise CheckpointError(f"{whose} model: {name}[{index}] is {float(values[at])}{hint}")
