"""Resumable training state in safetensors of our own: each rank writes the slices that it owns, and any number of ranks
reads them again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from components.errors import StorageError, listed

PATTERN = "engine-*-of-*.safetensors"


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
    """Write one rank's slices: `<kind>/<tensor name>` -> (which elements, 1-D values). Raises StorageError."""
    ranges = {key: [part.start, part.stop, part.numel] for key, (part, _) in tensors.items()}
    try:
        save_file(
            {key: values.detach().to("cpu", copy=True) for key, (_, values) in tensors.items()},
            path,
            metadata={"updates": str(updates), "ranges": json.dumps(ranges)},
        )
    except (SafetensorError, OSError) as error:  # the former is what it raises when the disk is full
        raise StorageError(
            f"{path}: training state cannot be written ({error}); free some space or choose another workspace"
        ) from error


class SavedState:
    """The state that all ranks of a run left in a directory, read by range. Use as a context manager."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = ExitStack()
        self._files: list[tuple[Path, Any, dict[str, Slice]]] = []
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
                opened = self._stack.enter_context(safe_open(path, framework="pt"))
                metadata = opened.metadata()
                ranges = {key: Slice(*found) for key, found in json.loads(metadata["ranges"]).items()}
                self.updates = int(metadata["updates"])
            except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
                self._stack.close()
                raise StorageError(
                    f"{path}: training state cannot be read ({error}); delete it to start anew"
                ) from None
            self._files.append((path, opened, ranges))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def numels(self) -> dict[str, int]:
        """Key -> elements of the whole tensor."""
        return {key: part.numel for _, _, ranges in self._files for key, part in ranges.items()}

    def pieces(self, key: str, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """(position, values) of every saved run of elements of `key` within [start, stop), no element twice."""
        for path, opened, ranges in self._files:
            part = ranges.get(key)
            if part is None:
                continue
            low, high = max(start, part.start), min(part.numel if stop is None else stop, part.stop)
            if low >= high:
                continue
            try:
                values = opened.get_slice(key)[low - part.start : high - part.start]
            except (SafetensorError, OSError) as error:
                raise StorageError(
                    f"{path}: training state cannot be read ({error}); delete it to start anew"
                ) from error
            yield low, values

    def read_into(self, key: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with elements [start, start + len(out)). Raises StorageError where some were never saved."""
        filled = 0
        for at, values in self.pieces(key, start, start + out.numel()):
            out[at - start : at - start + values.numel()].copy_(values)
            filled += values.numel()
        if filled != out.numel():
            raise StorageError(f"{self._directory}: training state lacks elements of {key}; delete it to start anew")
