"""A model whose weights are set to points of a plane, always from pristine copies, so that nothing drifts.

A point is computed in fp64 block by block and rounded once, to the parameter's dtype (as torch casts: to 16 bits by way of
fp32). Memory: one pristine and one working copy of the weights, and a few megabytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from components.checkpoints.source import TensorSpec
from components.errors import CheckpointError, listed
from components.landscape.blocks import Room, stretches
from components.landscape.plane import Plane
from components.landscape.points import Where
from components.landscape.vectors import Steps, TowardsDirection, add_steps

_LEFT_FREE = 0.2
"""Of a GPU's memory, for what a model needs to answer: pristine weights lie on the host where they would leave less."""


class Pristine:
    """A model's parameters as they were loaded, and the model that they are put back into. A TensorSource of the former.

    A tied parameter is one tensor under its first name. Of a model over several GPUs each tensor is worked on where it lies.
    Raises CheckpointError for a model whose parameters are not all in memory, or are codes.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._parameters: dict[str, torch.nn.Parameter] = dict(model.named_parameters())
        first = {id(parameter): name for name, parameter in self._parameters.items()}
        every = model.named_parameters(remove_duplicate=False)
        self._aliases = {name: first[id(p)] for name, p in every if first[id(p)] != name}
        self._require_movable()
        self._rooms: dict[torch.device, Room] = {}
        self._kept: dict[str, torch.Tensor] = {}
        for name, parameter in self._parameters.items():
            if not parameter.is_contiguous():
                parameter.data = parameter.data.contiguous()
            on_host = parameter.device.type == "cuda" and not _has_room(parameter)
            kept = parameter.detach().cpu() if on_host else parameter.detach().clone()
            self._kept[name] = kept.view(-1)

    def names(self) -> list[str]:
        """See TensorSource."""
        return sorted(self._parameters)

    def spec(self, name: str) -> TensorSpec:
        """See TensorSource."""
        return TensorSpec.of(self._parameters[name])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """See TensorSource; where the copy lies. Never write into it."""
        return self._kept[name][start:stop]

    def aliases(self) -> Mapping[str, str]:
        """See TensorSource."""
        return self._aliases

    def room(self, name: str) -> Room:
        """Buffers where a tensor is worked on."""
        device = self._parameters[name].device
        if device not in self._rooms:
            self._rooms[device] = Room(device)
        return self._rooms[device]

    @torch.no_grad()
    def move(self, plane: Plane, at: Where) -> bool:
        """Put θ₀ + α d₁ (+ β d₂) into the model; True where all weights are finite.

        A tensor that a point leaves alone, as (0, 0) does all of them, has its pristine bits; where an axis leads to another
        checkpoint, one that arrives there has that checkpoint's.
        """
        for name in self._parameters:
            steps = plane.steps(name, at)
            if not steps:
                self._live(name).copy_(self._kept[name])
            elif (there := _arrived(steps)) is not None:
                for stretch in stretches(self.spec(name).numel, 1):
                    found = there.source.read(name, stretch.start, stretch.stop)
                    self._live(name)[stretch.start : stretch.stop].copy_(found)
            else:
                self._write(plane.rows(name), name, steps)
        return self._finite()

    @torch.no_grad()
    def restore(self) -> None:
        """Put every pristine bit back."""
        for name, kept in self._kept.items():
            self._live(name).copy_(kept)

    def _write(self, rows: int, name: str, steps: Steps) -> None:
        live, kept, room = self._live(name), self._kept[name], self.room(name)
        for stretch in stretches(live.numel(), rows, room.size):
            some = slice(stretch.start, stretch.stop)
            room.sum(stretch.stop - stretch.start).copy_(kept[some])
            live[some].copy_(add_steps(self, name, stretch, steps))

    def _finite(self) -> bool:
        # Both ends are NaN where anything is.
        ends = [torch.stack(self._live(name).aminmax()) for name in self._parameters if self._kept[name].numel()]
        return all(bool(pair.isfinite().all()) for pair in ends)

    def _live(self, name: str) -> torch.Tensor:
        return self._parameters[name].data.view(-1)

    def _require_movable(self) -> None:
        away = [name for name, p in self._parameters.items() if p.device.type == "meta"]
        if away:
            raise CheckpointError(
                f"{len(away)} weights are not in memory ({listed(away, 3)}): the model was given too little room; "
                "give it more GPUs, or a CPU"
            )
        codes = [name for name, p in self._parameters.items() if not p.is_floating_point()]
        if codes:
            raise CheckpointError(f"weights are quantised ({listed(codes, 3)}): codes cannot be moved; load it in bf16")


def _arrived(steps: Steps) -> TowardsDirection | None:
    """The direction whose checkpoint a tensor has reached, where it is moved by nothing else."""
    direction, times = steps[0]
    if len(steps) == 1 and isinstance(direction, TowardsDirection) and bool((times == 1).all()):
        return direction
    return None


def _has_room(parameter: torch.Tensor) -> bool:
    free, total = torch.cuda.mem_get_info(parameter.device)
    return bool(free - parameter.nbytes > _LEFT_FREE * total)
