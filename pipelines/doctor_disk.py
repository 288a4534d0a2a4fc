"""`realign doctor`: whether a directory can be a workspace, and how fast it is."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from pathlib import Path

from components.errors import StorageError
from components.storage import storage_errors
from pipelines.doctor import Finding
from pipelines.machine import GIB

_SAMPLE_BYTES = 128 * 2**20
_FILES = 50
_SLOW_BYTES = 50 * 2**20
"""Bytes a second below which a 7B model takes five minutes to write."""
_SLOW_FILE_S = 0.05
_LITTLE_BYTES = 5 * GIB


def disk_findings(root: Path) -> list[Finding]:
    """Try in `root` what a workspace does: write, sync, rename, read back, link. What was written is gone afterwards."""
    there = root
    while not there.exists():
        there = there.parent
    where = f"{root}" if there == root else f"{root} (to be made in {there.resolve()})"
    probe = there / f".realign-doctor-{uuid.uuid4().hex}"
    try:
        with storage_errors(there):
            probe.mkdir()
            try:
                return [*_room(there, where), *_speed(probe), *_lease(probe)]
            finally:
                shutil.rmtree(probe, ignore_errors=True)
    except StorageError as error:
        return [Finding("wrong", "workspace", str(error), "give another --workspace, or rights and room there")]


def _room(there: Path, where: str) -> list[Finding]:
    usage = shutil.disk_usage(there)
    text = f"{where}: {_file_system(there)}, {usage.free / GIB:.0f} GiB free"
    if usage.free < _LITTLE_BYTES:
        remedy = "free some space: `realign plan CONFIG` says what a run writes"
        return [Finding("note", "workspace", f"{text}, which a large model fills", remedy)]
    return [Finding("ok", "workspace", text)]


def _file_system(path: Path) -> str:
    """Type of the file system that has the longest mount point above the path."""
    try:
        rows = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "file system unknown"
    full = path.resolve()
    over = [(len(row[1]), row[2]) for row in rows if full.is_relative_to(row[1].replace("\\040", " "))]
    return max(over)[1] if over else "file system unknown"


def _speed(probe: Path) -> list[Finding]:
    written, read = _stream(probe / "large", min(_SAMPLE_BYTES, shutil.disk_usage(probe).free // 4))
    each = _small(probe)
    text = f"writes {written / 2**20:,.0f} MiB/s, reads {read / 2**20:,.0f} MiB/s, {1000 * each:.1f} ms a small file"
    if written < _SLOW_BYTES or read < _SLOW_BYTES or each > _SLOW_FILE_S:
        remedy = "put the workspace on a faster disk: models are read and written whole"
        return [Finding("note", "disk speed", text, remedy)]
    return [Finding("ok", "disk speed", text)]


def _stream(path: Path, size: int) -> tuple[float, float]:
    """Bytes a second, written to the disk and read from it. Raises OSError."""
    piece = os.urandom(1 << 20)  # not zeros, which some disks do not store
    began = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(max(size >> 20, 1)):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    written = path.stat().st_size / (time.perf_counter() - began)
    began = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 20):
            pass
    return written, path.stat().st_size / (time.perf_counter() - began)


def _small(probe: Path) -> float:
    """Seconds to write a small file for good and give it its name. Raises OSError."""
    began = time.perf_counter()
    for number in range(_FILES):
        draft = probe / f"draft-{number}"
        with draft.open("w") as file:
            file.write("{}\n")
            file.flush()
            os.fsync(file.fileno())
        draft.rename(probe / f"small-{number}")
    return (time.perf_counter() - began) / _FILES


def _lease(probe: Path) -> list[Finding]:
    """A lease is a hard link that only one process can make, and its file's time goes on."""
    one, two = probe / "lease", probe / "other"
    one.write_text("")
    os.utime(one)
    try:
        os.link(one, two)
    except OSError as error:
        remedy = "put the workspace on a POSIX file system (local, NFS, CephFS, Lustre), not on a mounted object store"
        return [
            Finding("wrong", "leases", f"no hard links there ({error.strerror}): nobody could hold a lease", remedy)
        ]
    try:
        os.link(one, two)
    except FileExistsError:
        return [Finding("ok", "leases", "hard links are made once: leases hold")]
    return [Finding("wrong", "leases", "a hard link replaces what is there: leases do not hold", "use another disk")]
