"""One fusion from references to a published directory: what `realign fuse` does.

The model grows in `.<name>.partial` beside the directory that it will have, and gets its name by one rename when it is whole,
its record written last. A run that was cut off is taken up where it stopped.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from components.checkpoints.journal import Journal
from components.checkpoints.stream import Progress, Put, Written, part_size, stream
from components.checkpoints.writer import write_json
from components.errors import StorageError
from components.fusion.making import Fused, Making, make_part
from components.fusion.recipe import Recipe
from components.records import RECORD_FILE
from components.storage import storage_errors


def fuse(
    recipe: Recipe,
    out: Path,
    *,
    processes: int = 1,
    durable: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Fused:
    """Make the model of a recipe in the directory `out`.

    Args:
        processes: how many work side by side; the bytes are the same.
        durable: wait until the model would survive a power cut (a crash of the process it survives anyway).
        overwrite: replace another model under that name, once the new one is whole.
        progress: see `stream`.

    Raises CheckpointError (everything that does not fit at once; the tensor and index of a NaN), ConfigError, StorageError.
    """
    began = time.monotonic()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    making = Making.of(recipe)
    partial = out.parent / f".{out.name}.partial"
    there = _published(out, making, overwrite)
    if there is None:
        with storage_errors(partial), _alone(partial):
            there = _published(out, making, overwrite)  # by somebody who was there first
            if there is None:
                record = _made(making, out, partial, processes, durable, progress)
                record |= {"started": started, "seconds": round(time.monotonic() - began, 3)}
                write_json(partial / "model" / RECORD_FILE, record)
                _publish(partial / "model", out, durable)
                shutil.rmtree(partial, ignore_errors=True)
                return Fused(str(out), record, made=True)
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was cut off after it had published
    return Fused(str(out), there, made=False)


def _made(
    making: Making, out: Path, partial: Path, processes: int, durable: bool, progress: Progress | None
) -> dict[str, Any]:
    """Everything but the record, whole, in `partial`/model."""
    model = partial / "model"
    with Journal(partial / "journal.jsonl", {**making.plan, "part": part_size()}) as journal:
        if not model.is_dir():
            journal.restart()
        if not journal.done:
            shutil.rmtree(model, ignore_errors=True)
        source = making.source(processes)

        def work(name: str, start: int, stop: int, put: Put) -> dict[str, Any]:
            return {"unchanged": True} if make_part(source, name, start, stop, put) else {}

        written = stream(
            model,
            {name: source.spec(name) for name in source.names()},
            work,
            processes=processes,
            whole=source.method.whole_tensors,
            read=making.bytes_read,
            journal=journal,
            durable=durable,
            progress=progress,
            max_shard_bytes=source.settings.max_shard_bytes,
        )
    files = [*written.files, *making.side_files(source, model)]
    record = making.record(source, _unchanged(written))
    record |= {
        "bytes_read": written.bytes_read,
        "bytes_written": written.bytes_written,
        "gb_per_s": round(written.gb_per_s, 3),
    }
    files.append(making.card(record, model))
    return {**record, "outputs": {name: (model / name).stat().st_size for name in sorted(files)}}


def _unchanged(written: Written) -> list[str]:
    parts: dict[str, list[bool]] = {}
    for (name, _, _), note in written.notes.items():
        parts.setdefault(name, []).append(bool(note.get("unchanged")))
    return [name for name, same in parts.items() if all(same)]


def _published(out: Path, making: Making, overwrite: bool) -> dict[str, Any] | None:
    """The record of this very fusion if it is there; StorageError if something else is."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        record: dict[str, Any] = json.loads((out / RECORD_FILE).read_text(encoding="utf-8"))
        whole = all((out / name).stat().st_size == size for name, size in record["outputs"].items())
        if whole and record["fingerprint"] == making.fingerprint:
            return record
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    if overwrite and out.is_dir():
        return None
    raise StorageError(f"{out} holds something else; give another directory, or replace it with --overwrite")


@contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """One writer at a time."""
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(f"{partial}: another process is writing this model; wait for it, or end it") from error
        yield


def _publish(model: Path, out: Path, durable: bool) -> None:
    """Give the whole model its name; another one that stands there leaves in the same moment or stays."""
    old = model.parent / "replaced"
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    try:
        model.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    if durable:
        directory = os.open(out.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
