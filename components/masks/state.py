"""Resumable training state in safetensors of our own: each rank writes the slices that it owns, and any number of ranks
reads them again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from components.checkpoints.headers import layout, read_header
from components.checkpoints.safetensors import MappedFile
from components.checkpoints.source import TensorSpec, blocks
from components.errors import CheckpointError, StorageError, listed
from components.mapped import drop

PATTERN = "engine-*-of-*.safetensors"
PIECE = 1 << 22
"""Elements that are copied at once."""


@dataclass(frozen=True)
class Slice:
    """Elements [start, stop) of a tensor of `numel` elements."""

    start: int
    stop: int
    numel: int


def state_file(directory: Path, rank: int, world: int) -> Path:
    """Where a rank's part of the state goes."""
    return directory / f"engine-{rank:05d}-of-{world:05d}.safetensors"


def save_state(path: Path, tensors: Mapping[str, tuple[Slice, torch.Tensor]], *, updates: int) -> None:
    """Write one rank's slices piece by piece: `<kind>/<tensor name>` -> (which elements, 1-D values). Raises StorageError."""
    ranges = {key: [part.start, part.stop, part.numel] for key, (part, _) in tensors.items()}
    specs = {key: TensorSpec.of(values) for key, (_, values) in tensors.items()}
    raw, header = layout(specs, {"updates": str(updates), "ranges": json.dumps(ranges)})
    try:
        with path.open("wb") as file:
            file.write(raw)
            for key in header.tensors:  # in the order of their places
                _, values = tensors[key]
                for low, high in blocks(values.numel(), PIECE):
                    piece = values[low:high].detach()
                    file.write(piece.cpu().view(torch.uint8).numpy().data)
                    drop(piece)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise StorageError(
            f"{path}: training state cannot be written ({error}); free some space or choose another workspace"
        ) from error


class SavedState:
    """The state that all ranks of a run left in a directory, read by range. Use as a context manager."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: list[tuple[MappedFile, dict[str, Slice]]] = []
        self.updates = 0

    def __enter__(self) -> Self:
        paths = sorted(self._directory.glob(PATTERN))
        worlds = {path.stem.rsplit("-", 1)[-1] for path in paths}
        if len(worlds) != 1 or len(paths) != int(next(iter(worlds))):
            found = listed([p.name for p in paths], 4) or "nothing"
            raise StorageError(
                f"{self._directory}: training state is not complete (found {found}); delete it to start anew"
            )
        for path in paths:
            try:
                header = read_header(path)
                ranges = {key: Slice(*found) for key, found in json.loads(header.metadata["ranges"]).items()}
                self.updates = int(header.metadata["updates"])
            except (CheckpointError, KeyError, TypeError, ValueError) as error:
                raise StorageError(
                    f"{path}: training state cannot be read ({error}); delete it to start anew"
                ) from None
            if any(header.tensors[key].spec.numel != part.stop - part.start for key, part in ranges.items()):
                raise StorageError(f"{path}: training state is not what it says; delete it to start anew")
            self._files.append((MappedFile(header), ranges))
        return self

    def __exit__(self, *_: object) -> None:
        self._files = []

    def numels(self) -> dict[str, int]:
        """Key -> elements of the whole tensor."""
        return {key: part.numel for _, ranges in self._files for key, part in ranges.items()}

    def pieces(self, key: str, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """(position, values) of every saved run of elements of `key` within [start, stop), no element twice. Values lie over
        the file and are let go of when the next ones are asked for."""
        for file, ranges in self._files:
            part = ranges.get(key)
            if part is None:
                continue
            low, high = max(start, part.start), min(part.numel if stop is None else stop, part.stop)
            if low >= high:
                continue
            for begin, end in blocks(high - low, PIECE):
                values = file.read(key, low + begin - part.start, low + end - part.start)
                yield low + begin, values
                drop(values)

    def read_into(self, key: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with elements [start, start + len(out)). Raises StorageError where some were never saved."""
        filled = 0
        for at, values in self.pieces(key, start, start + out.numel()):
            place = out[at - start : at - start + values.numel()]
            place.copy_(values)
            drop(place)
            filled += values.numel()
        if filled != out.numel():
            raise StorageError(f"{self._directory}: training state lacks elements of {key}; delete it to start anew")
