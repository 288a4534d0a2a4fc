"""Leases: one holder at a time, whoever dies when, also those that a power cut left empty or cut off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from components import leases
from components.leases import Lease, LeaseLost, acquire, holder_alive, try_acquire

DEAD = json.dumps({"owner": "dead", "host": "elsewhere", "pid": 1, "started": "0"})
UNREADABLE = ["", "{", "\x00\x00\x00", "null", "[]", '{"owner": "a"}']


def grow_old(path: Path) -> None:
    os.utime(path, (time.time() - 2 * leases.TTL_SECONDS,) * 2)


HOLDER = """
import sys, time
from pathlib import Path
from components.leases import try_acquire
lease = try_acquire(Path(sys.argv[1]))
print("held" if lease else "refused", flush=True)
time.sleep(60)
"""


def test_a_killed_holders_lease_is_free_at_once_and_a_live_ones_is_not(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert leases.holder_alive(path)
        assert try_acquire(path) is None
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    lease = try_acquire(path)
    assert lease is not None
    with lease:
        lease.check()
    assert not path.exists()


def test_a_silent_holder_on_another_machine_is_overtaken_and_learns_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lease.json"
    first = try_acquire(path)
    assert first is not None
    first._stop.set()  # its heartbeat hangs
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "host": "elsewhere"}))
    assert try_acquire(path) is None  # silent for too short a time
    grow_old(path)
    second = try_acquire(path)
    assert second is not None
    with second, pytest.raises(LeaseLost):
        first.check()
    first.release()


@pytest.mark.parametrize("content", UNREADABLE)
def test_an_unreadable_lease_is_held_while_young_and_dead_when_old(tmp_path: Path, content: str) -> None:
    path = tmp_path / "lease.json"
    path.write_text(content)
    assert holder_alive(path)
    assert try_acquire(path) is None
    assert path.read_text() == content
    grow_old(path)
    assert not holder_alive(path)
    begun = time.monotonic()
    lease = acquire(path, done=lambda: time.monotonic() - begun > 10)
    assert lease is not None
    with lease:
        lease.check()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [DEAD, ""], ids=["dead", "unreadable"])
def test_one_of_many_takes_a_lease(tmp_path: Path, content: str) -> None:
    path = tmp_path / "lease.json"
    for _ in range(50):
        path.write_text(content)
        os.utime(path, (0, 0))
        got: list[Lease] = []
        start = threading.Barrier(8)

        def take(start: threading.Barrier = start, got: list[Lease] = got) -> None:
            start.wait()
            lease = try_acquire(path)
            if lease:
                got.append(lease)

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        got = got or [lease for lease in [try_acquire(path)] if lease]  # all may have given way to one another once
        assert len(got) == 1
        got[0].check()
        got[0].release()
        assert list(tmp_path.iterdir()) == []


def test_a_slow_one_does_not_remove_the_lease_that_replaced_an_unreadable_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lease.json"
    path.write_text("")
    grow_old(path)
    link, faster = os.link, list[Lease]()

    def slow_link(source: Path, target: Path) -> None:
        """Between what the slow one saw and its claim, a faster one takes the lease."""
        monkeypatch.setattr(os, "link", link)
        lease = try_acquire(path)
        assert lease is not None
        faster.append(lease)
        link(source, target)

    monkeypatch.setattr(os, "link", slow_link)
    assert try_acquire(path) is None
    faster[0].check()
    assert [p.name for p in tmp_path.iterdir()] == ["lease.json"]
    faster[0].release()


def test_a_lease_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    sync, link = os.fsync, os.link

    def fsync(fd: int) -> None:
        seen.append(f"sync {os.fstat(fd).st_size > 0}")
        sync(fd)

    def linked(*names: Any) -> None:
        seen.append("link")
        link(*names)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", linked)
    lease = try_acquire(tmp_path / "lease.json")
    assert lease is not None
    lease.release()
    assert seen == ["sync True", "link"]
