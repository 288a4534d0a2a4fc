"""A mask whose state, gradients and weights are spread over ranks with torch.distributed.

Every parameter of N elements is cut into `world` equal runs (the last ones shorter); rank r owns run r of the aligned and
the finetuned weights, the logits and Adam's moments. What else is spread is ZeRO's (arXiv 1910.02054) choice: nothing more
(1), gradients as they come (2), weights too (3, in ray_jobs/deepspeed_engine.py). Stage 0 spreads the batch alone. Gradients
cross ranks, and are added, in fp32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from components.checkpoints.source import blocks
from components.mapped import drop
from components.masks.engine import TorchEngine
from components.masks.masked_model import MaskedModel
from components.masks.objective import Forwards
from components.masks.ranks import Ranks
from components.masks.rooms import MemoryRoom, Room
from components.masks.slices import WholeParameter, narrow
from components.masks.state import save_state, state_file

SCATTERED = 1 << 22
"""Elements of a gradient, all ranks' together, that cross them at once: the copies that this takes are 16 MiB each."""


class ReplicatedParameter(WholeParameter):
    """A parameter that every rank has whole, mask and all (ZeRO 0)."""

    def finish(self) -> None:
        """The batch's gradient, from every rank's share."""
        gradient = self.gradient()
        if gradient is not None:
            dist.all_reduce(gradient)

    def publish(self) -> None:
        """Every rank has written the same."""


class ShardedParameter(ABC):
    """What parameters spread over ranks have in common: which run is this rank's, and its gradient, in fp32, in `room`.
    `eager`: gradients are scattered as soon as they are there; so are narrow ones, which cannot be added up whole."""

    def __init__(
        self,
        parameter: torch.nn.Parameter,
        shape: tuple[int, ...],
        ranks: Ranks,
        *,
        eager: bool,
        room: Room | None = None,
    ) -> None:
        self.parameter, self.shape, self._eager = parameter, shape, eager or narrow(parameter)
        self._numel = torch.Size(shape).numel()
        self.run = -(-self._numel // ranks.world)
        """Elements of a rank's run, padding included."""
        self._world = ranks.world
        self.start = min(ranks.rank * self.run, self._numel)
        self.stop = min(self.start + self.run, self._numel)
        self.weights = self.place
        self._room = room or MemoryRoom(self.weights.device)
        self._local: torch.Tensor | None = None
        self._arrived = False
        if self._eager:
            parameter.register_post_accumulate_grad_hook(self._scatter)  # type: ignore[no-untyped-call]

    @property
    @abstractmethod
    def place(self) -> torch.Tensor:
        """This rank's run where the model reads it: 1-D, without padding."""

    def gradient(self) -> torch.Tensor | None:
        """See Home."""
        return self._local if self._arrived else None

    def forget_gradient(self) -> None:
        """See Home. Its place is kept where places are dear."""
        self._arrived = False
        if not self._room.lasting:
            self._local = None

    def move(self, weights: torch.Tensor) -> None:
        """See Home. The model goes on reading its own place; `publish` takes the values there."""
        self.weights = weights

    def finish(self) -> None:
        """See ReplicatedParameter."""
        if not self._eager and self.parameter.grad is not None:
            self._scatter(self.parameter)

    def publish(self) -> None:
        """Let the model read what was written."""
        if self.weights.data_ptr() != self.place.data_ptr():
            self.place.copy_(self.weights)
            drop(self.place)

    def _scatter(self, parameter: torch.nn.Parameter) -> None:
        """Take the whole gradient away and add the sum over ranks of this rank's run to its own."""
        whole = parameter.grad
        assert whole is not None
        parameter.grad = None
        flat, size = whole.reshape(-1), self.stop - self.start
        if self._local is None:
            self._local = self._room.zeros(size, torch.float32)
        for low, high in blocks(self.run, max(1, SCATTERED // self._world)):
            mine = self._sum(flat, low, high)[: max(0, size - low)]
            kept = self._local[low : low + mine.numel()]
            if self._arrived:
                kept.add_(mine.to(kept.device))
            else:
                kept.copy_(mine)
            drop(kept)
        self._arrived = True

    def _sum(self, flat: torch.Tensor, low: int, high: int) -> torch.Tensor:
        """Elements [low, high) of this rank's run of a whole tensor, added over ranks."""
        parts = flat.new_zeros(self._world, high - low, dtype=torch.float32)
        for rank, part in enumerate(parts):
            found = flat[min(rank * self.run + low, self._numel) : min(rank * self.run + high, self._numel)]
            part[: found.numel()].copy_(found)
        mine = parts.new_empty(high - low)
        dist.reduce_scatter_single(mine, parts.view(-1))
        return mine


class SplitParameter(ShardedParameter):
    """A parameter whose weights every rank holds, and whose gradient only its owner keeps (ZeRO 1: reduced once a step; 2: as
    soon as it is there)."""

    def __init__(self, parameter: torch.nn.Parameter, ranks: Ranks, *, eager: bool) -> None:
        shape, numel = tuple(parameter.shape), parameter.numel()
        run = -(-numel // ranks.world)
        self._storage = torch.zeros(run * ranks.world, dtype=parameter.dtype, device=parameter.device)
        self._storage[:numel].copy_(parameter.detach().reshape(-1))
        parameter.data = self._storage[:numel].view(shape)
        self._rank = ranks.rank
        super().__init__(parameter, shape, ranks, eager=eager)

    @property
    def place(self) -> torch.Tensor:
        """See ShardedParameter."""
        return self._storage[self.start : self.stop]

    def publish(self) -> None:
        """See ShardedParameter."""
        super().publish()
        mine = self._storage[self._rank * self.run : (self._rank + 1) * self.run]
        dist.all_gather_single(self._storage, mine.clone())


class ShardedEngine(TorchEngine):
    """TorchEngine on one of several ranks: what differs is where gradients cross them. `release` is called when a batch's
    share has gone through the model."""

    def __init__(
        self,
        masked: MaskedModel,
        homes: Sequence[Any],
        *,
        forwards: Forwards,
        accumulate: int = 1,
        release: Callable[[], None] | None = None,
        layers: Sequence[torch.nn.Module] = (),
    ) -> None:
        super().__init__(masked, accumulate=accumulate, forwards=forwards, layers=layers)
        self._homes, self._release = homes, release

    def save(self, directory: Path) -> None:
        """See TorchEngine. What every rank has whole, the first alone writes."""
        whole = any(isinstance(home, WholeParameter) for home in self._homes)
        if whole and self.ranks.rank:
            save_state(state_file(directory, self.ranks.rank, self.ranks.world), {}, updates=self._updates)
        else:
            super().save(directory)

    def _reduce(self, *, last: bool) -> None:
        if self._release is not None:
            self._release()
        if last:
            for home in self._homes:
                home.finish()
