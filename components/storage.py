"""The workspace: where results live, how they are published, and how work that was cut off goes on.

    <workspace>/<stage>/<fingerprint>/            a result; its record.json was written last
    <workspace>/<stage>/.attempt-<fingerprint>-*  somebody is making it, or was killed while doing so
    <workspace>/<stage>/.state-<fingerprint>/     lease, progress, resumable state, failure.json of the last attempt
    <workspace>/.reference/                       reference log-probabilities, which finetunes of one model share

A result appears by one rename of a complete directory: first wins, a straggler of a killed run harms nothing.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from components.errors import RealignError, StorageError, error_payload, listed
from components.leases import Claim, Lease, acquire, holder_alive
from components.records import RECORD_FILE, Record

PROGRESS_SECONDS = 0.5
Progress = Callable[[dict[str, Any]], None]
"""Is told now and then how far some work is."""

_USERS_TO_MEND = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EFBIG}


@dataclass
class Attempt:
    """One try at making a result. Files written under `out` become the result; `state` survives a kill."""

    out: Path
    state: Path
    lease: Lease | Claim
    _reported: float = 0.0

    def keep_going(self) -> None:
        """Call often: raises LeaseLost when another attempt has taken over."""
        self.lease.check()

    def progress(self, values: dict[str, Any]) -> None:
        """Tell watchers (`realign status`, the driver's display) how far the attempt is; `done` of `total` is understood.

        Cheap enough to call at every step: what comes too soon after the last one is not written.
        """
        now = time.monotonic()
        if now - self._reported >= PROGRESS_SECONDS:
            self._reported = now
            write_atomic(self.state / "progress.json", json.dumps(values), durable=False)


class Workspace:
    """A directory on a shared POSIX file system."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def prepare(self) -> None:
        """Create the workspace and prove that it can be written. Raises StorageError with the reason."""
        probe = self.root / f".probe-{uuid.uuid4().hex}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"x")
            probe.unlink()
        except OSError as e:
            raise StorageError(f"cannot write {self.root}: {e.strerror}; choose a directory you can write") from e

    def result_dir(self, stage: str, fingerprint: str) -> Path:
        return self.root / stage / fingerprint

    @property
    def reference_dir(self) -> Path:
        return self.root / ".reference"

    def state_dir(self, stage: str, fingerprint: str) -> Path:
        return self.root / stage / f".state-{fingerprint}"

    def record(self, stage: str, fingerprint: str) -> Record | None:
        """The record of a published result, None when there is none.

        Raises StorageError when the record is unreadable or a listed file is missing or has another size: a result that was
        changed by hand must not be taken for the one its fingerprint names.
        """
        directory = self.result_dir(stage, fingerprint)
        path = directory / RECORD_FILE
        try:
            record = Record.model_validate_json(path.read_text())
        except FileNotFoundError:
            return None
        except (ValidationError, UnicodeDecodeError) as e:
            raise StorageError(f"{path} is not a record; remove {directory} to make it again") from e
        wrong = [
            name
            for name, file in record.outputs.items()
            if not (directory / name).is_file() or (directory / name).stat().st_size != file.bytes
        ]
        if wrong:
            raise StorageError(
                f"{directory}: files missing or of another size than recorded: {listed(wrong)}; "
                "remove the directory to make it again"
            )
        return record

    def failure(self, stage: str, fingerprint: str) -> dict[str, str] | None:
        """What the last attempt failed with, if it did."""
        try:
            answer: dict[str, str] = json.loads((self.state_dir(stage, fingerprint) / "failure.json").read_text())
        except (FileNotFoundError, ValueError):
            return None
        return answer

    def progress(self, stage: str, fingerprint: str) -> dict[str, Any] | None:
        """How far a live attempt is; None when nobody is working on it."""
        state = self.state_dir(stage, fingerprint)
        if not holder_alive(state / "lease.json"):
            return None
        try:
            values: dict[str, Any] = json.loads((state / "progress.json").read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return values

    def write_failure(self, stage: str, fingerprint: str, error: RealignError) -> None:
        state = self.state_dir(stage, fingerprint)
        with storage_errors(state):
            state.mkdir(parents=True, exist_ok=True)
            write_atomic(state / "failure.json", json.dumps(error_payload(error)))

    @contextmanager
    def attempt(self, stage: str, fingerprint: str) -> Iterator[Attempt | None]:
        """Become the one who makes a result; None when it is there (perhaps after waiting for another attempt)."""
        state = self.state_dir(stage, fingerprint)
        with storage_errors(state):
            state.mkdir(parents=True, exist_ok=True)
            lease = acquire(state / "lease.json", done=lambda: self._published(stage, fingerprint))
        if lease is None:
            yield None
            return
        with lease:
            if self._published(stage, fingerprint):
                yield None
                return
            out = self.root / stage / f".attempt-{fingerprint}-{uuid.uuid4().hex[:8]}"
            with storage_errors(out):
                # Only the lease's holder writes attempts: older ones belong to the dead.
                for dead in out.parent.glob(f".attempt-{fingerprint}-*"):
                    shutil.rmtree(dead, ignore_errors=True)
                (state / "failure.json").unlink(missing_ok=True)
                (state / "progress.json").unlink(missing_ok=True)
                out.mkdir(parents=True)
            try:
                yield Attempt(out=out, state=state, lease=lease)
            finally:
                shutil.rmtree(out, ignore_errors=True)

    def publish(self, attempt: Attempt, record: Record) -> Record:
        """Give a complete attempt its final name, record last. Returns the record that is there (the first one wins)."""
        final = self.result_dir(record.stage, record.fingerprint)
        with storage_errors(final):
            for name in record.outputs:
                sync(attempt.out / name)
            write_atomic(attempt.out / RECORD_FILE, record.to_json())
            sync(attempt.out)
            attempt.keep_going()
            try:
                attempt.out.rename(final)
            except OSError as e:
                if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            sync(final.parent)
        published = self.record(record.stage, record.fingerprint)
        if published is None:
            raise StorageError(f"{final} exists but holds no record; remove it to make it again")
        return published

    def forget_state(self, stage: str, fingerprint: str) -> None:
        """Drop lease and resumable state of a published result."""
        shutil.rmtree(self.state_dir(stage, fingerprint), ignore_errors=True)

    def _published(self, stage: str, fingerprint: str) -> bool:
        return (self.result_dir(stage, fingerprint) / RECORD_FILE).is_file()


@contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Turn the operating system's 'no' (full, read-only, not permitted) into a StorageError with a remedy."""
    try:
        yield
    except OSError as e:
        if e.errno not in _USERS_TO_MEND and not isinstance(e, FileExistsError | NotADirectoryError):
            raise
        path = e.filename or where
        said = os.strerror(e.errno or 0)
        if Path(path).exists() and not os.access(path, os.R_OK):
            raise StorageError(f"cannot read {path}: {said}; make it readable") from e
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "choose a directory you can write"
        raise StorageError(f"cannot write {path}: {said}; {remedy}") from e


def write_atomic(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a file whole or not at all, text as UTF-8; `durable` waits until it would survive a power cut."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with draft.open("wb") as f:
            f.write(content if isinstance(content, bytes) else content.encode())
            if durable:
                f.flush()
                os.fsync(f.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or a directory's names, would survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
