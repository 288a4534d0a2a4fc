"""Limits of containers, as the kernel's files say them."""

from pathlib import Path

import psutil
import pytest

from components.limits import available_cpus, available_memory

MIB = 2**20


def _files(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    "files",
    [
        {"cpu.max": "100000 100000\n"},
        {"cpu.max": "50000 100000\n"},
        {"cpu/cpu.cfs_quota_us": "20000\n", "cpu/cpu.cfs_period_us": "100000\n"},
    ],
)
def test_a_limit_of_cpus_is_kept(tmp_path: Path, files: dict[str, str]) -> None:
    assert available_cpus(_files(tmp_path, files)) == 1


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"cpu.max": "max 100000\n"},
        {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
        {"cpu.max": "99900000 100000\n"},
    ],
)
def test_without_a_limit_all_cpus_of_the_process_count(tmp_path: Path, files: dict[str, str]) -> None:
    assert available_cpus(_files(tmp_path, files)) == len(psutil.Process().cpu_affinity())


def test_part_of_a_cpu_counts_as_one_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(64))
    assert available_cpus(_files(tmp_path, {"cpu.max": "350000 100000\n"})) == 4


@pytest.mark.parametrize(
    "files",
    [
        {
            "memory.max": str(300 * MIB),
            "memory.current": str(200 * MIB),
            "memory.stat": f"file 9\ninactive_file {50 * MIB}\n",
        },
        {
            "memory/memory.limit_in_bytes": str(300 * MIB),
            "memory/memory.usage_in_bytes": str(200 * MIB),
            "memory/memory.stat": f"inactive_file 7\ntotal_inactive_file {50 * MIB}\n",
        },
    ],
)
def test_of_a_limit_of_memory_remains_what_is_not_used_or_can_be_let_go(tmp_path: Path, files: dict[str, str]) -> None:
    assert available_memory(_files(tmp_path, files)) == 150 * MIB


def test_more_than_its_limit_leaves_nothing(tmp_path: Path) -> None:
    files = {"memory.max": str(MIB), "memory.current": str(2 * MIB), "memory.stat": "inactive_file 0\n"}
    assert available_memory(_files(tmp_path, files)) == 0


def test_without_a_limit_the_memory_of_the_machine_counts(tmp_path: Path) -> None:
    found = available_memory(_files(tmp_path, {"memory.max": "max\n", "memory.current": "5\n", "memory.stat": ""}))
    assert found == pytest.approx(psutil.virtual_memory().available, rel=0.5)
