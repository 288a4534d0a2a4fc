"""What a direction adds to a tensor: noise, or the way to another checkpoint, block by block and never whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from components.checkpoints.compare import compare_tensors
from components.checkpoints.source import TensorSource
from components.errors import CheckpointError, listed
from components.landscape.blocks import Stretch
from components.landscape.directions import gaussian_into
from components.mapped import drop

if TYPE_CHECKING:
    from components.landscape.moving import Pristine


@dataclass(frozen=True)
class RandomDirection:
    """Counted noise as long as each tensor (layer) or each row (filter)."""

    seed: int
    stream: int
    """The axis's place, 0 or 1, so that one seed gives two directions."""
    norm: Literal["layer", "filter"] = "layer"

    @property
    def label(self) -> str:
        """For messages."""
        return f"of random numbers (seed {self.seed})"

    def moves(self, name: str) -> bool:
        return "norm" not in name.lower()

    def rows(self, shape: Sequence[int]) -> int:
        """How many parts of a tensor have a length of their own."""
        return shape[0] if self.norm == "filter" and len(shape) > 1 else 1

    def raw(self, pristine: Pristine, name: str, start: int, out: torch.Tensor) -> torch.Tensor:
        """Elements start … start + len(out) − 1 of the tensor's raw vector, into `out` (fp64, where the tensor lies)."""
        indices = pristine.room(name).indices(out.numel())
        return gaussian_into(out, indices, seed=self.seed, stream=self.stream, name=name, start=start)


@dataclass(frozen=True)
class TowardsDirection:
    """The way to another checkpoint of the same architecture."""

    source: TensorSource
    name: str

    @property
    def label(self) -> str:
        """For messages."""
        return f"towards {self.name}"

    def moves(self, name: str) -> bool:
        del name
        return True

    def rows(self, shape: Sequence[int]) -> int:
        del shape
        return 1

    def raw(self, pristine: Pristine, name: str, start: int, out: torch.Tensor) -> torch.Tensor:
        """See RandomDirection."""
        stop = start + out.numel()
        values = self.source.read(name, start, stop)
        out.copy_(values)
        drop(values)
        return out.sub_(pristine.read(name, start, stop).to(out.device))


Direction = RandomDirection | TowardsDirection


def require_same_tensors(pristine: Pristine, source: TensorSource, name: str) -> None:
    """Raise CheckpointError that lists every way in which a checkpoint is of another architecture; from headers alone."""
    problems = compare_tensors(pristine, source)
    if problems:
        count = f"{len(problems)} difference{'s' if len(problems) > 1 else ''}"
        raise CheckpointError(
            f"{name} is of another architecture than the model whose landscape is drawn ({count}): {listed(problems, 12)}; "
            "give a checkpoint of the same one, or, where only names differ (some models have others in memory than in their "
            "files), draw the model alone and by random axes"
        )


Steps = Sequence[tuple[Direction, torch.Tensor]]
"""Raw vectors that are added to a tensor, and how often: [1] or [rows] fp64 on its device."""


def add_steps(pristine: Pristine, name: str, stretch: Stretch, steps: Steps) -> torch.Tensor:
    """Add a stretch's raw vectors, as often as `steps` say, to the `sum` of the tensor's room, and give that back. A product is
    rounded before it is added."""
    room, count = pristine.room(name), stretch.stop - stretch.start
    total = room.sum(count)
    for direction, times in steps:
        term = direction.raw(pristine, name, stretch.start, room.term(count))
        stretch.as_rows(term).mul_(stretch.share(times))
        total.add_(term)
    return total
