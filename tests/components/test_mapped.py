"""Tensors over files keep their values when their pages are let go of, and leave the memory and the disk when they should."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from components.errors import StorageError
from components.mapped import FileRoom, drop, map_file, over_file, tensor_over

MIB = 1 << 20


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_dropped_pages_leave_the_memory_and_come_back_with_their_values(tmp_path: Path) -> None:
    room = FileRoom(tmp_path)
    first, second = room.zeros(12_345, torch.bfloat16), room.zeros(64 * MIB // 4, torch.float32)
    assert not first.any()
    assert not second.any()
    wanted = torch.arange(second.numel(), dtype=torch.float32)
    first.fill_(3)
    second.copy_(wanted)
    before = resident()
    drop(second[: second.numel() // 2])
    drop(second[second.numel() // 2 :])
    assert before - resident() > 60 * MIB
    assert torch.equal(second, wanted)
    assert first.eq(3).all()
    assert over_file(second[7:9])


def test_files_have_no_names_and_their_disk_is_given_back(tmp_path: Path) -> None:
    def used() -> int:
        stat = os.statvfs(tmp_path)
        return (stat.f_blocks - stat.f_bfree) * stat.f_frsize

    before = used()
    room = FileRoom(tmp_path / "new")
    tensor = room.zeros(400 * MIB, torch.uint8)
    assert used() - before > 300 * MIB
    assert list((tmp_path / "new").iterdir()) == []
    del tensor, room
    assert used() - before < 100 * MIB


def test_what_lies_in_memory_is_left_alone(tmp_path: Path) -> None:
    tensor = torch.arange(MIB)
    drop(tensor)
    assert torch.equal(tensor, torch.arange(MIB))
    assert not over_file(tensor)
    assert FileRoom(tmp_path).zeros(0, torch.float32).tolist() == []


def test_a_room_copies_what_does_not_lie_over_a_file(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(torch.arange(1000, dtype=torch.int32).numpy().tobytes())
    with path.open("rb") as file:
        stored = tensor_over(map_file(file, private=True), torch.int32, 990, 40)
    room = FileRoom(tmp_path)
    assert room.keep(stored).data_ptr() == stored.data_ptr()
    copied = room.keep(stored.clone())
    assert over_file(copied)
    drop(stored)
    assert copied.tolist() == stored.tolist() == list(range(10, 1000))


def test_a_disk_without_room_is_said(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"4096.0 GiB more for offloading .*No space left.*offload_dir"):
        FileRoom(tmp_path).zeros(1 << 42, torch.uint8)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, limit[1]))
    try:
        with pytest.raises(StorageError, match="File too large"):
            FileRoom(tmp_path).zeros(2 * MIB, torch.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


HOLES = """
import sys
import torch
from components.mapped import return_freed_memory
from tests.components.test_mapped import resident
if sys.argv[1] == "returned":
    return_freed_memory()
del (large := [torch.ones(7 << 20)])[:]  # from now on malloc cuts what is smaller from its heap
before = resident()
kept, tensors = [], []
for _ in range(64):
    tensors.append(torch.ones(1 << 20))
    kept.append(bytearray(2000))
del tensors
print((resident() - before) >> 20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="is about glibc's malloc")
def test_freed_memory_goes_back_to_the_system() -> None:
    def held(how: str) -> int:
        command = [sys.executable, "-c", HOLES, how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert held("kept") > 200
    assert held("returned") < 20
