"""Where the tensors that a mask's training keeps from step to step live: in memory or over files."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from components.mapped import FileRoom
from components.masks.zero import Offload


class Room(Protocol):
    """Gives tensors a place. `device` is where they are worked on; `lasting`: a place is better used again than given back."""

    device: torch.device
    lasting: bool

    def zeros(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A new 1-D tensor."""
        ...

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """The values of a 1-D tensor that nobody writes into, here: itself, where it is here already."""
        ...


class MemoryRoom:
    """A device's memory; `pinned`: the host's, which a GPU copies from and to directly."""

    def __init__(self, device: torch.device | str = "cpu", *, pinned: bool = False) -> None:
        self.device, self.lasting = torch.device(device), pinned

    def zeros(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """See Room."""
        return torch.zeros(numel, dtype=dtype, device=self.device, pin_memory=self.lasting)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """See Room. Files that are mapped into the host's memory are there."""
        return tensor.to(self.device)


def room_for(where: Offload, device: torch.device | str, directory: Path | None, *, pinned: bool = False) -> Room:
    """The room that an offload setting means for a model on `device`."""
    if where == "none":
        return MemoryRoom(device)
    if where == "nvme":
        assert directory is not None, "offload_dir: its default is the caller's to name"
        return FileRoom(directory)
    assert torch.device(device).type != "cpu", "what is on the CPU cannot be offloaded to it"
    return MemoryRoom("cpu", pinned=pinned)
