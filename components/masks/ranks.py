"""The processes that train one mask together: what they add up, and how they share work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch

In = TypeVar("In")
Out = TypeVar("Out")


class Ranks(Protocol):
    """One of `world` processes. Every call but the attributes is a collective: all ranks make it, in the same order."""

    rank: int
    world: int

    def all_sum(self, values: torch.Tensor) -> torch.Tensor:
        """The elementwise sum over ranks, where and as wide as `values` is."""
        ...

    def gather(self, mine: Any) -> list[Any]:
        """Every rank's object, by rank."""
        ...

    def barrier(self) -> None:
        """Wait for the others."""
        ...


class Alone:
    """One process: nothing to add, nobody to wait for."""

    rank, world = 0, 1

    def all_sum(self, values: torch.Tensor) -> torch.Tensor:
        """See Ranks."""
        return values

    def gather(self, mine: Any) -> list[Any]:
        """See Ranks."""
        return [mine]

    def barrier(self) -> None:
        """See Ranks."""


ALONE = Alone()


class TorchRanks:
    """The default process group of torch.distributed, which its owner has opened. `device` is where its backend works."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._device = torch.device(device)

    def all_sum(self, values: torch.Tensor) -> torch.Tensor:
        """See Ranks."""
        total = values.to(self._device, copy=True)
        torch.distributed.all_reduce(total)
        return total.to(values.device)

    def gather(self, mine: Any) -> list[Any]:
        """See Ranks."""
        found: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(found, mine)
        return found

    def barrier(self) -> None:
        """See Ranks."""
        torch.distributed.barrier()


def spread(items: Sequence[In], work: Callable[[In], Out], ranks: Ranks) -> list[Out]:
    """`work` on every item, spread over ranks; all results on every rank, in the items' order.

    Every rank calls `work` equally often (it may be a collective: a forward of a sharded model gathers weights), so the last
    round may repeat an item whose result is thrown away.
    """
    mine: dict[int, Out] = {}
    for first in range(0, len(items), ranks.world):
        i = first + ranks.rank
        result = work(items[min(i, len(items) - 1)])
        if i < len(items):
            mine[i] = result
    found = {i: result for part in ranks.gather(mine) for i, result in part.items()}
    return [found[i] for i in range(len(items))]
