"""A line or plane through a model's weights, as numbers per tensor: nothing as large as the weights is held.

With θ₀ the pristine weights, a direction of a tensor is made of raw vectors: noise g (random), or τ = θ_other − θ₀ (towards).

    random, layer    d = ‖W‖/‖g‖ g for each tensor W                          (https://arxiv.org/abs/2405.17374)
    random, filter   the same for each row of a tensor that has rows          (https://arxiv.org/abs/1712.09913)
    towards          d = τ, every tensor, so that the other checkpoint is at 1

Random directions leave tensors with "norm" in their name alone, as the published code does; all others move, embeddings, heads
and biases too. The second axis is made orthogonal to the first (Gram–Schmidt): a random one within each tensor (or row),
which then is brought back to its length; one towards a checkpoint over all tensors together and by nothing but
subtraction, so that the plane holds that checkpoint. What is left are two numbers per tensor (or row) and axis:

    d₁ = a r₁        d₂ = p r₁ + q r₂        θ(α, β) = θ₀ + (α a + β p) r₁ + β q r₂

Squared lengths are summed in fp64 over fixed blocks, in an order that the number of threads does not change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from components.checkpoints.source import TensorSource
from components.errors import CheckpointError, listed
from components.landscape.blocks import Stretch, stretches
from components.landscape.points import Where
from components.landscape.schema import Mark
from components.landscape.vectors import (
    Direction,
    RandomDirection,
    Steps,
    TowardsDirection,
    add_steps,
    require_same_tensors,
)

if TYPE_CHECKING:
    from components.landscape.moving import Pristine

Numbers = npt.NDArray[np.float64]
"""One for the whole tensor, or one for each row."""
_PARALLEL = 1e-12
"""What is left of a squared length when it is no more than rounding."""
_ORDERED = 4096
"""Elements that are summed one after the other: fewer than torch shares out among threads."""


@dataclass
class _Tensor:
    """What is known of one tensor: squared lengths and products of the raw vectors, then the numbers that make the axes of
    them. All are Numbers, by row where any axis goes by rows."""

    squares: dict[tuple[int, int], Numbers]
    """(0, 0): of the weights. (i, j): raw vector i times raw vector j. Of no use once the axes are made."""
    parts: list[Numbers] = field(default_factory=list)
    """a of the first axis; then p and q of the second."""

    @staticmethod
    def of(squares: dict[tuple[int, int], list[float]]) -> _Tensor:
        return _Tensor({pair: np.array(list(map(float, by_row))) for pair, by_row in squares.items()})

    def product(self, i: int, j: int) -> Numbers:
        return self.squares[i, j]


class Plane:
    """One line or plane through a Pristine's weights.

    Raises CheckpointError for a checkpoint of another architecture (all differences at once), weights that are not finite,
    and a direction of no length: towards a checkpoint that equals the model, or a second axis along the first.
    """

    def __init__(self, pristine: Pristine, directions: Sequence[Direction]) -> None:
        assert 1 <= len(directions) <= 2, directions
        self._pristine, self._directions = pristine, tuple(directions)
        for direction in directions:
            if isinstance(direction, TowardsDirection):
                require_same_tensors(pristine, direction.source, direction.name)
        self._tensors = {name: _Tensor.of(self._squares(name)) for name in pristine.names()}
        self._require_finite()
        self._lengths = [self._first_axis()]
        """Squared, of each axis over all tensors."""
        self._shift = 0.0
        """Where a second axis that leads to a checkpoint has that checkpoint on the first."""
        if len(directions) > 1:
            self._lengths.append(self._second_axis())
        for tensor in self._tensors.values():
            tensor.squares.clear()

    def rows(self, name: str) -> int:
        """In how many parts a tensor is worked on."""
        shape = self._pristine.spec(name).shape
        return max(direction.rows(shape) for direction in self._directions)

    def steps(self, name: str, at: Where) -> Steps:
        """What is added to a tensor's pristine weights at a point: raw vectors that are not taken zero times."""
        assert len(at) == len(self._directions), at
        first, *second = self._tensors[name].parts
        times = [at[0] * first]
        if second:
            times = [at[0] * first + at[1] * second[0], at[1] * second[1]]
        device = self._pristine.room(name).device
        return [(d, torch.from_numpy(n).to(device)) for d, n in zip(self._directions, times, strict=True) if n.any()]

    def locate(self, name: str, source: TensorSource) -> Mark:
        """Where another checkpoint of the architecture lies. One that an axis leads to is in the plane by construction, and
        exactly where `Pristine.move` gives its weights bit for bit. Raises CheckpointError."""
        for place, direction in enumerate(self._directions):
            if isinstance(direction, TowardsDirection) and direction.source is source:
                at = [1.0, 0.0][: len(self._directions)] if place == 0 else [self._shift, 1.0]
                return Mark(name=name, at=at, off=0.0)
        require_same_tensors(self._pristine, source, name)
        other = TowardsDirection(source, name)
        along = np.zeros(len(self._directions))
        square = 0.0
        for tensor in self._pristine.names():
            found = self._against(tensor, other)
            square += found[0]
            along += found[1:]
        if not math.isfinite(square):
            raise CheckpointError(f"{name}: its weights are not finite; take an earlier checkpoint")
        at = along / np.array(self._lengths)
        left = square - float(along @ at)
        off = math.sqrt(left / square) if left > _PARALLEL * square else 0.0
        return Mark(name=name, at=[float(c) for c in at], off=off)

    def _against(self, name: str, other: TowardsDirection) -> Numbers:
        """Of one tensor: the squared distance of another checkpoint, and its products with the axes."""
        totals = np.zeros(1 + len(self._directions))
        axes = [self.steps(name, tuple(unit)) for unit in np.eye(len(self._directions)).tolist()]
        for stretch in stretches(self._pristine.spec(name).numel, self.rows(name)):
            total = self._pristine.room(name).sum(stretch.stop - stretch.start)
            away = other.raw(self._pristine, name, stretch.start, torch.empty_like(total))
            totals[0] += _ordered_sum(away * away)
            for k, steps in enumerate(axes, start=1):
                total.zero_()
                totals[k] += _ordered_sum(away * add_steps(self._pristine, name, stretch, steps))
        return totals

    def _squares(self, name: str) -> dict[tuple[int, int], list[float]]:
        """Products of a tensor's raw vectors, by row. Those of noise alone are exact integers."""
        pristine, rows = self._pristine, self.rows(name)
        moving = [(k, d) for k, d in enumerate(self._directions, start=1) if d.moves(name)]
        pairs = [(0, 0), *((i, j) for i in (1, 2) for j in (1, 2) if i <= j <= len(self._directions))]
        totals: dict[tuple[int, int], list[float]] = {pair: [0] * rows for pair in pairs}
        for stretch in stretches(pristine.spec(name).numel, rows):
            room = pristine.room(name)
            own = pristine.read(name, stretch.start, stretch.stop).to(room.device).double()
            vectors = {0: own}
            for k, direction in moving:
                raw = direction.raw(pristine, name, stretch.start, torch.empty_like(own))
                vectors[k] = raw.long() if isinstance(direction, RandomDirection) else raw
            for i, j in pairs:
                if i in vectors and j in vectors:
                    _add(totals[i, j], stretch, vectors[i] * vectors[j])
        return totals

    def _require_finite(self) -> None:
        def bad(i: int) -> list[str]:
            return [n for n, t in self._tensors.items() if not np.isfinite(t.product(i, i)).all()]

        if broken := bad(0):
            raise CheckpointError(
                f"the model's own weights are not finite ({listed(broken, 4)}): it has no landscape; "
                "the run that made it diverged: take an earlier checkpoint"
            )
        for k, direction in enumerate(self._directions, start=1):
            if isinstance(direction, TowardsDirection) and (broken := bad(k)):
                raise CheckpointError(
                    f"{direction.name}: weights are not finite ({listed(broken, 4)}), so nothing leads there; "
                    "take an earlier checkpoint"
                )

    def _first_axis(self) -> float:
        """Fix a for every tensor; the axis's squared length."""
        direction, total = self._directions[0], 0.0
        for name, tensor in self._tensors.items():
            raw = _within(tensor.product(1, 1), direction, self._shape(name))
            if isinstance(direction, RandomDirection):
                own = _within(tensor.product(0, 0), direction, self._shape(name))
                tensor.parts = [np.sqrt(np.divide(own, raw, out=np.zeros_like(raw), where=raw > 0))]
            else:
                tensor.parts = [np.ones(1)]
            total += float((tensor.parts[0] ** 2 * raw).sum())
        if not total:
            raise CheckpointError(_no_length(direction))
        return total

    def _second_axis(self) -> float:
        """Fix p and q for every tensor; the axis's squared length."""
        direction = self._directions[1]
        if isinstance(direction, RandomDirection):
            total = sum(self._orthogonal_within(name, direction) for name in self._tensors)
            if not total:
                raise CheckpointError(_parallel(*self._directions))
            return total
        along = sum(float((t.parts[0] * t.product(1, 2)).sum()) for t in self._tensors.values())
        square = sum(float(t.product(2, 2).sum()) for t in self._tensors.values())
        if not square:
            raise CheckpointError(_no_length(direction))
        self._shift = along / self._lengths[0]
        left = square - along * self._shift
        if left <= _PARALLEL * square:
            raise CheckpointError(_parallel(*self._directions))
        for tensor in self._tensors.values():
            tensor.parts += [-(self._shift * tensor.parts[0]), np.ones(1)]
        return left

    def _orthogonal_within(self, name: str, direction: RandomDirection) -> float:
        """Fix p and q of one tensor under a random second axis; its squared length on it."""
        tensor, shape = self._tensors[name], self._shape(name)
        a = tensor.parts[0]
        own, raw = (_within(tensor.product(i, i), direction, shape) for i in (0, 2))
        first = _within(a**2 * tensor.product(1, 1), direction, shape)
        cross = _within(a * tensor.product(1, 2), direction, shape)
        share = np.divide(cross, first, out=np.zeros_like(cross), where=first > 0)
        left = raw - share * cross
        # Where nothing is left (one element, say), the tensor does not move on this axis.
        q = np.sqrt(np.divide(own, left, out=np.zeros_like(left), where=left > _PARALLEL * raw))
        tensor.parts += [-(q * share * a), q]
        return float((q**2 * left).sum())

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._pristine.spec(name).shape


def _within(by_row: Numbers, direction: Direction, shape: tuple[int, ...]) -> Numbers:
    """By the parts of a tensor that have a length of their own on an axis."""
    return by_row if direction.rows(shape) > 1 or by_row.size == 1 else by_row.sum(keepdims=True)


def _ordered_sum(values: torch.Tensor) -> float:
    cut = values.numel() // _ORDERED * _ORDERED
    return float(values[:cut].view(-1, _ORDERED).sum(1).sum() if cut else 0) + float(values[cut:].sum())


def _add(totals: list[float], stretch: Stretch, values: torch.Tensor) -> None:
    """Integers stay integers."""
    if stretch.rows > 1:
        found = stretch.as_rows(values).sum(1).tolist()
    else:
        found = [int(values.sum()) if values.dtype == torch.int64 else _ordered_sum(values)]
    for row, value in enumerate(found, start=stretch.first):
        totals[row] += value


def _no_length(direction: Direction) -> str:
    if isinstance(direction, TowardsDirection):
        return f"the axis {direction.label} has no length: the weights there equal the model's; give another checkpoint"
    return f"the axis {direction.label} has no length: all tensors that it moves are zero; give another model"


def _parallel(first: Direction, second: Direction) -> str:
    return f"the axes {first.label} and {second.label} lie along one line: they span no plane; give another second axis"
