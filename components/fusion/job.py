"""One fusion from references to a published directory: what `realign fuse` does.

The model grows in `.<name>.partial` beside the directory that it will have, and gets its name by one rename when it is whole,
its record written last. A run that was cut off is taken up where it stopped.
"""

from __future__ import annotations

import contextlib
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

from components.checkpoints.dtypes import named
from components.checkpoints.journal import Journal
from components.checkpoints.stream import Put, Written, part_size, stream
from components.checkpoints.writer import write_json
from components.errors import CheckpointError, ConfigError, StorageError
from components.fusion.making import Fused, Making, code_fingerprint, make_part
from components.fusion.recipe import Recipe
from components.records import RECORD_FILE
from components.storage import Progress, storage_errors, sync

_JOURNAL, _LOCK, _REPLACED = "journal.jsonl", "lock", "replaced"
_ORPHANS_S = 3.0


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
    out = Path(os.path.realpath(out) if out.is_symlink() else os.path.abspath(out))  # noqa: PTH100 - a parent stays a link
    _require_place(out, making)
    partial = out.parent / f".{out.name}.partial"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{out.parent}: cannot be made ({error.strerror}); choose a directory you can write"
        ) from error
    there = _published(out, making, overwrite)
    if there is not None and not partial.exists():
        return Fused(str(out), there, made=False)
    with storage_errors(partial), _alone(partial), _cleared(partial):
        _bring_back(partial, out)
        there = _published(out, making, overwrite)  # perhaps by somebody who was there first
        if there is None:
            record = _made(making, partial, processes, durable, progress)
            making.require_unchanged()
            record |= {"started": started, "seconds": round(time.monotonic() - began, 3)}
            write_json(partial / "model" / RECORD_FILE, record)
            _published(
                out, making, overwrite
            )  # what came there meanwhile is no more to be replaced than what was there
            _publish(partial / "model", out, durable)
        _clear(partial)
    return Fused(str(out), record if there is None else there, made=there is None)


def _require_place(out: Path, making: Making) -> None:
    """Raise StorageError where a model must not be put: over, around or inside what it is made of, or where no rename goes."""
    parts = [part for one in making.models.every().values() for part in (one, one.base) if part is not None]
    inputs = [part.path.resolve() for part in parts] + ([making.recipe.mask.resolve()] if making.recipe.mask else [])
    real = out.resolve()
    for one in inputs:
        if real == one or real in one.parents or one in real.parents:
            raise StorageError(f"{out}: lies over, around or inside the input {one}; give another directory")
    if real in (Path.cwd(), *Path.cwd().parents) or os.path.ismount(out):
        raise StorageError(f"{out}: cannot be replaced by a rename (it is in use or a mount point); give one inside it")
    if out.exists() and not out.is_dir():
        raise StorageError(f"{out}: is a file; give another name")


def _made(making: Making, partial: Path, processes: int, durable: bool, progress: Progress | None) -> dict[str, Any]:
    """Everything but the record, whole, in `partial`/model."""
    model = partial / "model"
    plan = {**making.plan, "part": part_size(), "code": code_fingerprint()}
    with Journal(partial / _JOURNAL, plan) as journal:
        if not model.is_dir():
            journal.restart()
        if not journal.done:
            shutil.rmtree(model, ignore_errors=True)
        _require_room(making, partial, model)
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


def _require_room(making: Making, partial: Path, model: Path) -> None:
    """The disk, before models are read for thresholds and the like. The writer looks again, at exact sizes."""
    aligned, wanted = making.models.aligned.source, making.recipe.fusion.output_dtype
    width = named(wanted).itemsize if wanted else 0
    specs = [aligned.spec(name) for name in aligned.names()]
    need = sum(spec.numel * (width or spec.kind.itemsize) for spec in specs)
    there = sum(file.stat().st_blocks * 512 for file in model.glob("*.safetensors")) if model.is_dir() else 0
    free = shutil.disk_usage(partial).free
    if free + there < need:
        raise StorageError(
            f"{partial.parent}: the disk has {free / 1e9:.3g} GB left, the model needs {need / 1e9:.3g} GB"
        )


def _published(out: Path, making: Making, overwrite: bool) -> dict[str, Any] | None:
    """The record of this very fusion if it is there; StorageError if something else is that must not be replaced."""
    if not out.exists() or not any(out.iterdir()):
        return None
    record: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        record = json.loads((out / RECORD_FILE).read_text(encoding="utf-8"))
    ours = isinstance(record, dict) and record.get("kind") == "fusion"
    if ours and record["fingerprint"] == making.fingerprint and _is_whole(out, record):
        return record
    if not ours:
        raise StorageError(f"{out} holds something that `realign fuse` did not make; give another directory")
    if overwrite:
        return None
    raise StorageError(f"{out} holds something else; give another directory, or replace it with --overwrite")


def _is_whole(out: Path, record: dict[str, Any]) -> bool:
    sizes = record["outputs"].items()
    return all((out / name).is_file() and (out / name).stat().st_size == size for name, size in sizes)


@contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """One writer at a time. Workers of one that was killed hold its lock for the moment that they live on."""
    deadline = time.monotonic() + _ORPHANS_S
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        with (partial / _LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise StorageError(
                        f"{partial}: another process is writing this model; wait for it, or end it"
                    ) from error
                time.sleep(0.1)
                continue
            with contextlib.suppress(FileNotFoundError):
                if (partial / _LOCK).stat().st_ino == os.fstat(file.fileno()).st_ino:
                    yield
                    return
            # Whoever was here before took the directory away in the meantime.


@contextmanager
def _cleared(partial: Path) -> Iterator[None]:
    """What can never become this model is not left behind: other inputs, or another recipe, begin anew."""
    try:
        yield
    except (CheckpointError, ConfigError):
        if not (partial / _REPLACED).exists():
            _clear(partial)
        raise


def _bring_back(partial: Path, out: Path) -> None:
    """A model that was to be replaced by a run that was killed between two renames."""
    if (partial / _REPLACED).is_dir() and not out.exists():
        (partial / _REPLACED).rename(out)


def _clear(partial: Path) -> None:
    """First what a later run would believe, last what keeps others out."""
    (partial / _JOURNAL).unlink(missing_ok=True)
    for name in ("model", _REPLACED):
        shutil.rmtree(partial / name, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)


def _publish(model: Path, out: Path, durable: bool) -> None:
    """Give the whole model its name; what stood there goes in the same run, or comes back in the next."""
    if durable:
        for path in (*model.rglob("*"), model):
            sync(path)
    if out.exists() and any(out.iterdir()):
        shutil.rmtree(model.parent / _REPLACED, ignore_errors=True)
        out.rename(model.parent / _REPLACED)
    model.rename(out)  # over an empty directory, too
    if durable:
        sync(out.parent)
