"""Tensors over files: pages come when they are touched and can be let go without losing anything.

What is let go leaves this process's resident memory at once and stays in the system's page cache for as long as there is
room. A tensor that lies over a file is known by its storage, so views of it are too.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import IO, Any
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch

from components.errors import StorageError

CHUNK = 1 << 34
"""Bytes of address space of a `FileRoom`'s file; what is not handed out takes no disk."""
LEAN, QUICK = 1 << 17, 1 << 24
"""From which size on freed memory goes back to the system at once (`return_freed_memory`): malloc's own first value, which
leaves no holes; and one that a step's many tensors of a megabyte or so stay below, for each page that comes back has to be
cleared again (measured on one process: a step in half the time, with 0.4 GiB more)."""
_FOLIO = 1 << 21
"""A touch maps as much of a file as the page cache keeps in one piece, up to 2 MiB (measured: half of a rank's resident file
pages were other ranks' parts), so that much around a tensor is let go of with it."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h."""


class FileMap(mmap.mmap):
    """A map of a file that knows where it begins."""

    address: int


_MAPS: WeakValueDictionary[int, FileMap] = WeakValueDictionary()
"""Where a tensor's storage begins -> the map that it lies in. An entry lives as long as its map, so no other memory can be
found under its address."""


def map_file(file: IO[bytes], *, size: int = 0, private: bool) -> FileMap:
    """The first `size` bytes of an open file (0: all). Private: writes never reach the file."""
    mapped = FileMap(file.fileno(), size, access=mmap.ACCESS_COPY if private else mmap.ACCESS_WRITE)
    mapped.address = np.frombuffer(mapped, np.uint8, 1).ctypes.data
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        # Else a touch may bring 2 MiB along: other ranks' parts of a tensor.
        mapped.madvise(mmap.MADV_NOHUGEPAGE)
    return mapped


def tensor_over(mapped: FileMap, dtype: torch.dtype, count: int, offset: int) -> torch.Tensor:
    """`count` elements from byte `offset` on, 1-D."""
    tensor = torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset)
    _MAPS[tensor.data_ptr()] = mapped
    return tensor


def array_over(
    mapped: FileMap, dtype: np.dtype[np.unsignedinteger[Any]], count: int, offset: int
) -> npt.NDArray[np.unsignedinteger[Any]]:
    """The same as an array."""
    array = np.frombuffer(mapped, dtype, count, offset)
    _MAPS[array.ctypes.data] = mapped
    return array


def over_file(tensor: torch.Tensor) -> bool:
    """Whether `drop` does something for it."""
    return tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() in _MAPS


def drop(values: torch.Tensor | npt.NDArray[Any]) -> None:
    """Let go of the pages of a contiguous tensor, or of a whole array, that lies over a file; its values stay. Nothing for
    others."""
    if isinstance(values, np.ndarray):
        storage = begin = values.ctypes.data
    elif values.device.type == "cpu":
        storage, begin = values.untyped_storage().data_ptr(), values.data_ptr()
    else:
        return
    mapped = _MAPS.get(storage)
    if mapped is None or not hasattr(mmap, "MADV_DONTNEED"):
        return
    begin -= mapped.address
    end, begin = -(-(begin + values.nbytes) // _FOLIO) * _FOLIO, begin // _FOLIO * _FOLIO
    mapped.madvise(mmap.MADV_DONTNEED, begin, min(end, len(mapped)) - begin)


def reserve(file: IO[bytes], start: int, size: int) -> None:
    """Give bytes [start, start + size) of a file their room on the disk: a write through a map that finds the disk full kills
    the process (SIGBUS), a reservation raises OSError."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), start, size)
    else:
        file.truncate(max(start + size, os.fstat(file.fileno()).st_size))


class FileRoom:
    """Tensors over files in a directory, for what does not fit in memory. The files have no names: their room on the disk is
    given back when the tensors are gone, or the process, however it ended."""

    lasting = True

    def __init__(self, directory: Path) -> None:
        self.device = torch.device("cpu")
        self._directory = directory
        self._file: IO[bytes] | None = None
        self._map: FileMap | None = None
        self._size = self._at = 0

    def zeros(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """See Room. Raises StorageError when the disk has no room."""
        if not numel:
            return torch.zeros(0, dtype=dtype)
        nbytes = numel * dtype.itemsize
        try:
            self._prepare(nbytes)
            assert self._file is not None
            assert self._map is not None
            reserve(self._file, self._at, nbytes)
        except OSError as error:
            raise StorageError(
                f"{self._directory}: {nbytes / 2**30:.1f} GiB more for offloading cannot be set aside "
                f"({error.strerror or error}); free some space, or name another disk in execution.mask.offload_dir"
            ) from error
        tensor = tensor_over(self._map, dtype, numel, self._at)
        self._at += -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        return tensor

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """See Room. What lies over a file already stays where it is."""
        if over_file(tensor) or not tensor.numel():
            return tensor
        kept = self.zeros(tensor.numel(), tensor.dtype)
        kept.copy_(tensor)
        drop(kept)
        return kept

    def _prepare(self, nbytes: int) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        if (
            shutil.disk_usage(self._directory).free < nbytes
        ):  # else everyone's last bytes would be taken before it is said
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._map is None or self._at + nbytes > self._size:
            self._open(max(nbytes, CHUNK))

    def _open(self, size: int) -> None:
        if self._file is not None:
            self._file.close()  # its map lives on
        self._file = tempfile.TemporaryFile(dir=self._directory)  # noqa: SIM115 - lives as long as the room
        self._file.truncate(size)
        self._map, self._size, self._at = map_file(self._file, private=False), size, 0


def return_freed_memory(size: int = LEAN) -> None:
    """Have blocks of at least `size` bytes go back to the system when they are freed, whatever was freed before. Changes no
    value.

    glibc raises the size from which it does so (M_MMAP_THRESHOLD, up to 32 MiB) each time such a block is freed; the next
    ones are then cut from its heaps, which keep what is freed: a rank of a 187 M-parameter model held 0.9 GiB of holes.
    """
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; not every C library has it
        if mallopt is not None:
            mallopt(_MMAP_THRESHOLD, size)
            mallopt(_TRIM_THRESHOLD, size)
