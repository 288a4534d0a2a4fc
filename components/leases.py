"""A lease says who may write one result's resumable state: a file with an owner, kept alive by a heartbeat.

After a `kill -9` of a driver its Ray workers write on for seconds; a cluster may start the same stage twice. The lease makes
the second one wait, and a holder that lost its lease stop. It needs nothing but a POSIX directory (NFS too: no flock).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEARTBEAT_SECONDS = 2.0
TTL_SECONDS = 30.0


class LeaseLost(Exception):  # noqa: N818 - a transient condition, named as such, retried by whoever called
    """Another attempt took the lease over (this process was silent for too long)."""


class Lease:
    """Hold `path` while the `with` block runs. Create through `acquire`."""

    def __init__(self, path: Path, owner: str) -> None:
        self.path = path
        self.owner = owner
        self._lost = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise LeaseLost when somebody else holds the lease now."""
        if self._lost.is_set() or _owner(self.path) != self.owner:
            self._lost.set()
            raise LeaseLost(f"{self.path} was taken over by another attempt")

    def release(self) -> None:
        """Stop the heartbeat and give the lease back, if it is still ours."""
        self._stop.set()
        self._thread.join()
        if _owner(self.path) == self.owner:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            if _owner(self.path) != self.owner:
                self._lost.set()
                return
            try:
                os.utime(self.path)
            except FileNotFoundError:
                self._lost.set()
                return


@dataclass(frozen=True)
class Claim:
    """A lease as another process of the same attempt sees it: its holder started that process and keeps the heartbeat."""

    path: Path
    owner: str

    def check(self) -> None:
        """Raise LeaseLost when somebody else holds the lease now, or nobody."""
        if _owner(self.path) != self.owner:
            raise LeaseLost(f"{self.path} was taken over by another attempt")


def acquire(path: Path, *, done: Callable[[], bool], poll_seconds: float = 0.2) -> Lease | None:
    """Wait for the lease at `path`. Returns None when `done()` turns true first (somebody else finished the work)."""
    while True:
        if done():
            return None
        lease = try_acquire(path)
        if lease is not None:
            return lease
        time.sleep(poll_seconds)


def try_acquire(path: Path) -> Lease | None:
    """Take the lease if it is free or its holder is dead; None when somebody alive holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not _break_if_dead(path):
        return None
    owner = uuid.uuid4().hex
    draft = path.with_name(f"{path.name}.{owner}")
    try:
        with draft.open("w") as file:
            file.write(json.dumps({"owner": owner, **_me()}))
            file.flush()
            os.fsync(file.fileno())  # the name must not outlive a power cut without the content
        os.link(draft, path)  # atomic: fails when another one was faster
    except FileExistsError:
        return None
    finally:
        draft.unlink(missing_ok=True)
    return Lease(path, owner)


def holder_alive(path: Path) -> bool:
    """Whether a live process holds the lease at `path`, or may: one that cannot be read counts until it has grown old."""
    content = _content(path)
    try:
        beat = path.stat().st_mtime
    except FileNotFoundError:
        return False
    if _now(path.parent) - beat > TTL_SECONDS:
        return False
    me = _me()
    if content is None or (content.get("host"), content.get("pid_namespace")) != (me["host"], me["pid_namespace"]):
        return True
    return bool(_start_time(int(content["pid"])) == content["started"])


def _break_if_dead(path: Path) -> bool:
    """Remove a dead holder's lease. True when the path is free afterwards."""
    before = _owner(path)  # None: cannot be read (a power cut can leave it empty), or is gone by now
    if holder_alive(path):
        return False
    # A second name for the dead lease, exclusive for its owner: whoever makes it is the one who may remove the lease, so
    # nobody removes the lease that a faster one has taken since. All unreadable ones share a name: a lease that is being
    # taken is never unreadable, it gets its final name whole.
    marker = path.with_name(f"{path.name}.dead-{before or 'unreadable'}")
    try:
        os.link(path, marker)
    except FileNotFoundError:
        return True
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):
            if _now(path.parent) - marker.stat().st_ctime > TTL_SECONDS:
                marker.unlink()  # its maker died in between
        return False
    is_dead_one = _same_file(path, marker) and _owner(marker) == before and not holder_alive(marker)
    if is_dead_one:
        path.unlink(missing_ok=True)
    marker.unlink(missing_ok=True)
    return is_dead_one


def _same_file(path: Path, marker: Path) -> bool:
    try:
        return path.samefile(marker)
    except FileNotFoundError:
        return False


def _owner(path: Path) -> str | None:
    content = _content(path)
    return None if content is None else str(content["owner"])


def _content(path: Path) -> dict[str, Any] | None:
    """What a lease says; None when it is gone, or not what `try_acquire` writes."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return content if isinstance(content, dict) and {"owner", "pid", "started"} <= content.keys() else None


def _me() -> dict[str, object]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "pid_namespace": _pid_namespace(), "started": _start_time(pid)}


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return "unknown"


def _start_time(pid: int) -> str | None:
    """A process's start in clock ticks since boot: a pid alone may have been given to another process since."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return "alive" if _signal_reaches(pid) else None
    return None if stat[0] == "Z" else stat[19]


def _signal_reaches(pid: int) -> bool:
    if Path("/proc/self/stat").exists():
        return False  # /proc works and has no such process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _now(directory: Path) -> float:
    """The file system's own clock: a shared volume's server may disagree with this machine."""
    probe = directory / f".clock-{uuid.uuid4().hex}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()  # somebody who may only read is looking
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
