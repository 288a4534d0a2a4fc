"""One fusion from references to a published directory: what `realign fuse` does.

The model grows in `.<name>.partial` beside the directory that it will have, and gets its name by one rename when it is whole,
its record written last. A run that was cut off is taken up where it stopped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from components.checkpoints.journal import Journal
from components.checkpoints.safetensors import read_json
from components.checkpoints.stream import Progress, Put, Written, part_size, stream
from components.checkpoints.writer import copy_side_files, write_json
from components.errors import StorageError
from components.fusion.card import model_card
from components.fusion.fuse import widest
from components.fusion.fused import FusedSource, one_thread
from components.fusion.merge_settings import MERGE_PAPERS
from components.fusion.merging import MergedSource, find_thresholds
from components.fusion.models import Models, open_models, versions
from components.fusion.recipe import Recipe
from components.masks.artifact import MaskArtifact
from components.records import RECORD_FILE
from components.storage import storage_errors

BLOCK = 131_072
"""Elements worked on at once (measured: with several models at hand, half of what one finetune's fusion takes)."""
CARD_FILE = "README.md"


@dataclass(frozen=True)
class Fused:
    """A published fusion."""

    directory: Path
    record: dict[str, Any]
    made: bool
    """False: it was there."""


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
    models = open_models(recipe)
    plan = _plan(recipe, models)
    parts = {**plan, "part": part_size()}
    partial = out.parent / f".{out.name}.partial"
    there = _published(out, plan, overwrite)
    if there is not None:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was cut off after it had published
        return Fused(out, there, made=False)
    with storage_errors(partial), _alone(partial), Journal(partial / "journal.jsonl", parts) as journal:
        model = partial / "model"
        if not model.is_dir():
            journal.restart()
        if not journal.done:
            shutil.rmtree(model, ignore_errors=True)
        source = _fused(recipe, models, processes)
        written = _write(source, models, model, journal, processes, durable, progress)
        files = [*written.files, *_side_files(source, models, model)]
        record = _record(recipe, models, source, written, plan)
        record |= {"started": started, "seconds": round(time.monotonic() - began, 3)}
        (model / CARD_FILE).write_text(model_card(recipe, record), encoding="utf-8")
        files.append(CARD_FILE)
        record["outputs"] = {name: (model / name).stat().st_size for name in sorted(files)}
        write_json(model / RECORD_FILE, record)
        _publish(model, out)
    shutil.rmtree(partial, ignore_errors=True)
    return Fused(out, record, made=True)


def _plan(recipe: Recipe, models: Models) -> dict[str, Any]:
    """Everything that decides the bytes: the recipe, and which files were read."""
    return {
        "recipe": recipe.model_dump(mode="json"),
        "inputs": versions(models, recipe.mask),
        "code": _version_of("safety-realign"),
    }


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _digest(plan: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:20]


def _published(out: Path, plan: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The record of this very fusion if it is there; StorageError if something else is."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        record: dict[str, Any] = json.loads((out / RECORD_FILE).read_text(encoding="utf-8"))
        whole = all((out / name).stat().st_size == size for name, size in record["outputs"].items())
        if whole and record["fingerprint"] == _digest(plan):
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


def _fused(recipe: Recipe, models: Models, processes: int) -> FusedSource:
    sources = {name: model.source for name, model in models.finetunes.items()}
    aligned = models.aligned.source
    finetune = next(iter(sources.values()))
    if recipe.merge is not None:
        thresholds = None
        if recipe.merge.method == "ties":
            with one_thread():
                thresholds = find_thresholds(aligned, sources, recipe.merge, processes=processes)
        finetune = MergedSource(aligned, sources, recipe.merge, thresholds)
    source = FusedSource(
        aligned=aligned,
        finetune=finetune,
        settings=recipe.fusion,
        mask=MaskArtifact.open(recipe.mask) if recipe.mask else None,
        unaligned=models.unaligned.source if models.unaligned else None,
        safe=models.safe.source if models.safe else None,
        stored=models.stored(),
    )
    source.settled(processes)  # what takes a look at all tensors, before there are several processes
    return source


def _write(
    source: FusedSource,
    models: Models,
    model: Path,
    journal: Journal,
    processes: int,
    durable: bool,
    progress: Progress | None,
) -> Written:
    def work(name: str, start: int, stop: int, put: Put) -> dict[str, Any]:
        with one_thread():
            if source.unchanged(name, start, stop):
                put(start, source.aligned.read(name, start, stop).to(source.spec(name).dtype))
                return {"unchanged": True}
            for block in source.blocks(name, BLOCK, start, stop):
                put(block.start, block.values)
        return {}

    inputs = [m.source for m in models.every().values()]
    return stream(
        model,
        {name: source.spec(name) for name in source.names()},
        work,
        processes=processes,
        whole=source.method.whole_tensors,
        read=lambda name: sum(i.spec(name).dtype.itemsize for i in inputs),
        journal=journal,
        durable=durable,
        progress=progress,
        max_shard_bytes=source.settings.max_shard_bytes,
    )


def _side_files(source: FusedSource, models: Models, model: Path) -> list[str]:
    """One finetune's configs; of several, the aligned model's."""
    own = next(iter(models.finetunes.values())) if len(models.finetunes) == 1 else models.aligned
    files = copy_side_files(
        model_dir=own.model_dir,
        tokenizer_dir=models.tokenizer.tokenizer_dir,
        out_dir=model,
        dtype=widest(source.spec(name).dtype for name in source.names()),
        fallback_dir=models.aligned.model_dir,
    )
    if models.config_changes:
        write_json(model / "config.json", read_json(model / "config.json") | dict(models.config_changes))
    return files


def _record(
    recipe: Recipe, models: Models, source: FusedSource, written: Written, plan: dict[str, Any]
) -> dict[str, Any]:
    parts: dict[str, list[bool]] = {}
    for (name, _, _), note in written.notes.items():
        parts.setdefault(name, []).append(bool(note.get("unchanged")))
    return {
        "schema_version": 1,
        "kind": "fusion",
        "fingerprint": _digest(plan),
        "method": recipe.method,
        "papers": _papers(recipe, source),
        "recipe": plan["recipe"],
        "inputs": {
            role: {"model": one.where, "kind": one.kind, "files": plan["inputs"][role]}
            for role, one in models.every().items()
        },
        "tensors": len(source.names()),
        "parameters": sum(source.spec(name).numel for name in source.names()),
        "output_dtypes": sorted({str(source.spec(n).dtype).removeprefix("torch.") for n in source.names()}),
        "unchanged_tensors": sorted(name for name, same in parts.items() if all(same)),
        "bytes_read": written.bytes_read,
        "bytes_written": written.bytes_written,
        "gb_per_s": round(written.gb_per_s, 3),
        "notes": list(models.notes),
        "environment": {name: _version_of(name) for name in ("safety-realign", "torch")},
    }


def _papers(recipe: Recipe, source: FusedSource) -> list[str]:
    found = list(MERGE_PAPERS[recipe.merge.method]) if recipe.merge else []
    return found if recipe.merge and recipe.mask is None else [*found, source.method.paper]


def _publish(model: Path, out: Path) -> None:
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
