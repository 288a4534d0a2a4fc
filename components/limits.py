"""What this process may take of its machine: in a container what its limits leave (cgroups, version 2 and 1)."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
_MEMORY_2 = ("memory.max", "memory.current", "inactive_file")
_MEMORY_1 = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file")


def available_cpus(cgroups: Path = CGROUPS) -> int:
    """CPUs that this process may keep busy; of a limit in between two numbers the larger."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = (_cpus_2(cgroups), _cpus_1(cgroups))
    return min([there, *(limit for limit in limits if limit is not None)])


def _cpus_2(cgroups: Path) -> int | None:
    try:
        quota, period = map(int, (cgroups / "cpu.max").read_text().split())
    except (OSError, ValueError):  # no container, or no limit ("max")
        return None
    return math.ceil(quota / period)


def _cpus_1(cgroups: Path) -> int | None:
    try:
        quota, period = (int((cgroups / f"cpu/cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    except (OSError, ValueError):
        return None
    return math.ceil(quota / period) if quota > 0 else None  # -1: no limit


def available_memory(cgroups: Path = CGROUPS) -> int:
    """Bytes that can be taken without swapping."""
    import psutil

    free = int(psutil.virtual_memory().available)
    limits = [_memory(cgroups, *names) for names in (_MEMORY_2, _MEMORY_1)]
    return min([free, *(limit for limit in limits if limit is not None)])


def _memory(cgroups: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """What a container may still take: its limit less what it has, file pages that can be let go of left out."""
    try:
        most, used = int((cgroups / limit).read_text()), int((cgroups / usage).read_text())
        lines = (cgroups / limit).with_name("memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no container, or no limit ("max")
        return None
    cached = sum(int(line.split()[1]) for line in lines if line.split()[0] == reclaimable)
    return max(0, most - used + cached)
