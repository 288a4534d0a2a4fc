"""Ways to make one task vector of several: plain functions of flattened fp32 slices, with their papers.

They do no more than each element's own arithmetic, in an order that does not depend on where a slice begins: multiplication and
addition are never one operation, which torch may or may not round once, by where in a vector an element stands.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from components.checkpoints.source import TensorSource, blocks
from components.fusion.sums import dot
from components.masks.concrete import BLOCK as HASH_BLOCK
from components.masks.concrete import hash_keys, mask_halves

BLOCK = 131_072
"""Elements of each model worked on at once: small enough for a core's cache (measured)."""
CHUNK = 1 << 20
"""Elements that are asked for at once, and that a compiled kernel works on, which keeps no more than the result; after as many,
files' pages are let go of: often enough to hold few, seldom enough not to fetch any twice."""
_COLINEAR = 0.9995
"""The cosine from which on an arc is taken for a line (mergekit's)."""


def widened(values: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """In fp32: in `room`, or as they are where they are that already."""
    return values if values.dtype == torch.float32 else room.copy_(values)


def weighted_sum(deltas: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Σ w_t τ_t: task arithmetic, https://arxiv.org/abs/2212.04089; with w_t = 1/T weight averaging,
    https://arxiv.org/abs/2203.05482. Overwrites the deltas."""
    total: torch.Tensor | None = None
    for delta, weight in zip(deltas, weights, strict=True):
        if weight != 1:
            delta.mul_(weight)
        total = delta if total is None else total.add_(delta)
    assert total is not None
    return total


def ties(
    deltas: Sequence[torch.Tensor], weights: Sequence[float], thresholds: Sequence[float], *, mean: bool
) -> torch.Tensor:
    """Trim what is smaller than its threshold, elect each element's sign by the sum, join those that agree:
    TIES, https://arxiv.org/abs/2306.01708. The mean is over the weights of those that agree. Overwrites the deltas."""
    kept = [_trimmed(delta, threshold) for delta, threshold in zip(deltas, thresholds, strict=True)]
    for one, weight in zip(kept, weights, strict=True):
        if weight != 1:
            one.mul_(weight)
    elected = _sum(kept).sign_()
    for one in kept:
        one.mul_(elected).clamp_min_(0)  # |w τ| where the signs agree, else 0
    total = _sum(kept).mul_(elected)
    if not mean:
        return total
    for one, weight in zip(kept, weights, strict=True):
        one.sign_()
        if abs(weight) != 1:
            one.mul_(abs(weight))
    return total.div_(_sum(kept).clamp_min_(1e-12))


def _sum(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """One after the other: a stack's sum may add in any order."""
    first, *others = values
    return functools.reduce(torch.Tensor.add_, others[1:], first + others[0]) if others else first.clone()


def _trimmed(delta: torch.Tensor, threshold: float) -> torch.Tensor:
    """τ where |τ| ≥ threshold, else 0."""
    if threshold <= 0:
        return delta
    return torch.nn.functional.hardshrink(
        delta, trimmed_up_to(threshold)
    )  # keeps what is greater: seven times as fast as a comparison


@dataclass(frozen=True)
class Draws:
    """16 uniform bits for each position of a tensor: a function of (seed, name, position), that of the masks' noise."""

    seed: int
    name: str

    def at(self, start: int, count: int) -> npt.NDArray[np.int16]:
        """Those of positions [start, start + count)."""
        segment = (f"dare/{self.name}", start, start + count)
        drawn: npt.NDArray[np.int16] = mask_halves(seed=self.seed, step=0, segments=[segment]).numpy()
        return drawn

    def keys(self, start: int, count: int) -> npt.NDArray[np.uint32]:
        """What a kernel makes them of, [blocks, 2]."""
        first, last = start // 2 // HASH_BLOCK, (start + count + 1) // 2 // HASH_BLOCK
        keys = [hash_keys(self.seed, f"dare/{self.name}", 0, block) for block in range(first, last + 1)]
        return np.array(keys, np.int32).view(np.uint32)


def dropped(delta: torch.Tensor, drawn: npt.NDArray[np.int16], *, keep: float) -> torch.Tensor:
    """Each element kept with probability `keep`, to 2⁻¹⁶, and divided by it: DARE, https://arxiv.org/abs/2311.03099. `drawn`
    decides which. Overwrites the delta."""
    if keep == 1:
        return delta
    kept = (drawn < drop_limit(keep)).view(np.int8)
    # All bits or none, of 8 and then of 32: a select or a product with 0 or 1 takes several times as long (measured).
    bits = torch.empty_like(delta, dtype=torch.int32).copy_(torch.from_numpy(np.negative(kept, out=kept)))
    delta.view(torch.int32).bitwise_and_(bits)
    values = delta.numpy()
    np.divide(values, np.float32(keep), out=values)
    return delta


def drop_limit(keep: float) -> int:
    """Draws h below it are kept: those with (h + ½)/2¹⁶ + ½ < keep."""
    return math.ceil((keep - 0.5) * 65_536 - 0.5)


def trimmed_up_to(threshold: float) -> float:
    """The largest magnitude below a threshold; negative where nothing is below it."""
    return float(np.nextafter(np.float32(threshold), np.float32(0))) if threshold > 0 else -1.0


@dataclass(frozen=True)
class Angle:
    """What spherical interpolation needs of two whole tensors, taken in fp64."""

    dot: float
    first: float
    """Norm of the first."""
    second: float
    """Norm of the second."""

    @property
    def cosine(self) -> float | None:
        """None where one of them is zero (or not finite) and there is no angle."""
        size = self.first * self.second
        return min(1.0, max(-1.0, self.dot / size)) if 0 < size < math.inf else None


def angle_between(first: TensorSource, second: TensorSource, name: str) -> Angle:
    """Reads one tensor of both, block by block. The same number whatever the machine's threads."""
    product = first_square = second_square = 0.0
    for start, stop in blocks(first.spec(name).numel, BLOCK):
        a, b = (source.read(name, start, stop) for source in (first, second))
        product += dot(a, b)
        first_square += dot(a, a)
        second_square += dot(b, b)
    return Angle(product, math.sqrt(first_square), math.sqrt(second_square))


def slerp(first: torch.Tensor, second: torch.Tensor, *, t: float, angle: Angle) -> torch.Tensor:
    """sin((1−t)Ω)/sin Ω · x + sin(tΩ)/sin Ω · y with Ω the angle between the whole tensors, norms left as they are: Shoemake
    1985, https://dl.acm.org/doi/10.1145/325165.325242. Straight from x to y where they are nearly colinear (|cos Ω| > 0.9995,
    as finetunes of one model mostly are) or one is zero. Exactly x at t = 0 and y at t = 1; slices in fp32."""
    if t in (0, 1):
        return second if t else first
    cosine = angle.cosine
    if cosine is None or abs(cosine) > _COLINEAR:
        step = second - first
        return first + step * t if t < 0.5 else second - step * (1 - t)
    omega = math.acos(cosine)
    # In two steps, as in weighted_sum.
    return first * (math.sin((1 - t) * omega) / math.sin(omega)) + second * (math.sin(t * omega) / math.sin(omega))
