"""Publishing and takeovers: nothing half-made under a final name, whoever dies when."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest

from components.errors import DataError, StorageError
from components.records import Record, hash_outputs
from components.storage import Attempt, Workspace, storage_errors, write_atomic


def record_of(attempt: Attempt, fingerprint: str = "f0") -> Record:
    return Record(
        stage="fuse", stage_version=1, fingerprint=fingerprint, semantics={}, execution={}, parents={},
        outputs=hash_outputs(attempt.out), metrics={}, code={}, environment={}, started="", seconds=0.0,
    )  # fmt: skip


def publish_one(workspace: Workspace, text: str) -> Record:
    with workspace.attempt("fuse", "f0") as attempt:
        assert attempt is not None
        (attempt.out / "a.txt").write_text(text)
        return workspace.publish(attempt, record_of(attempt))


def break_off(workspace: Workspace) -> None:
    with workspace.attempt("fuse", "f0") as attempt:
        assert attempt is not None
        (attempt.out / "half.txt").write_text("half")
        raise DataError("broken")


def test_a_result_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    with pytest.raises(DataError):
        break_off(workspace)
    assert workspace.record("fuse", "f0") is None
    assert not list((tmp_path / "fuse").glob("*f0-*"))
    published = publish_one(workspace, "whole")
    assert workspace.record("fuse", "f0") == published
    assert (tmp_path / "fuse" / "f0" / "a.txt").read_text() == "whole"
    with workspace.attempt("fuse", "f0") as attempt:
        assert attempt is None


def test_the_first_publisher_wins(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    with workspace.attempt("fuse", "f0") as attempt:
        assert attempt is not None
        (attempt.out / "a.txt").write_text("late")
        # A straggler of a killed run got there first, past its lease.
        straggler = tmp_path / "fuse" / "f0"
        straggler.mkdir()
        (straggler / "a.txt").write_text("early")
        early = record_of(Attempt(out=straggler, state=attempt.state, lease=attempt.lease))
        (straggler / "record.json").write_text(early.to_json())
        assert workspace.publish(attempt, record_of(attempt)) == early
    assert (tmp_path / "fuse" / "f0" / "a.txt").read_text() == "early"


def test_a_changed_result_is_not_taken_for_the_recorded_one(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    publish_one(workspace, "whole")
    (tmp_path / "fuse" / "f0" / "a.txt").write_text("who")
    with pytest.raises(StorageError, match=r"a\.txt; remove the directory"):
        workspace.record("fuse", "f0")
    (tmp_path / "fuse" / "f0" / "record.json").write_text("{}")
    with pytest.raises(StorageError, match="is not a record"):
        workspace.record("fuse", "f0")


def test_a_second_attempt_waits_and_then_finds_the_result(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    seen: list[object] = []

    def second() -> None:
        with workspace.attempt("fuse", "f0") as attempt:
            seen.append(attempt)

    with workspace.attempt("fuse", "f0") as attempt:
        assert attempt is not None
        waiter = threading.Thread(target=second)
        waiter.start()
        time.sleep(0.5)
        assert seen == []
        (attempt.out / "a.txt").write_text("x")
        workspace.publish(attempt, record_of(attempt))
    waiter.join(10)
    assert seen == [None]


def test_the_dead_leave_no_attempts_and_failures_are_remembered_until_the_next(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    dead = tmp_path / "fuse" / ".attempt-f0-deadbeef"
    dead.mkdir(parents=True)
    workspace.write_failure("fuse", "f0", DataError("no rows"))
    assert workspace.failure("fuse", "f0") == {"type": "DataError", "message": "no rows"}
    with workspace.attempt("fuse", "f0") as attempt:
        assert attempt is not None
        assert not dead.exists()
        assert workspace.failure("fuse", "f0") is None
        attempt.progress({"done": 1, "total": 2})
        assert workspace.progress("fuse", "f0") == {"done": 1, "total": 2}
    assert workspace.progress("fuse", "f0") is None


@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "choose a directory")])
def test_the_systems_no_becomes_a_storage_error_with_a_remedy(tmp_path: Path, number: int, remedy: str) -> None:
    with pytest.raises(StorageError, match=remedy), storage_errors(tmp_path):
        raise OSError(number, os.strerror(number), "some/file")
    with pytest.raises(TimeoutError), storage_errors(tmp_path):
        raise TimeoutError(errno.ETIMEDOUT, "slow")


def test_an_unwritable_workspace_is_said_before_any_work(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*choose a directory you can write"):
        Workspace(blocker / "workspace").prepare()


def test_atomic_writes_leave_no_drafts(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.json", "1")
    write_atomic(tmp_path / "a.json", "2")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "2"
