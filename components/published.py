"""The files of a published model: their hash as one, and whether they are still what was recorded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from components.records import OutputFile, Record, canonical_json, file_sha256
from components.storage import storage_errors

MODEL = "model"
"""Directory of the weights within a result."""
_DOCUMENTS = {".md", ".html", ".svg", ".png"}
"""What may lie beside weights without being recorded: nobody serves it."""
_READERS = 4


def model_files(record: Record) -> dict[str, OutputFile]:
    """The files of a record's model, by their path within it."""
    prefix = f"{MODEL}/"
    return {name.removeprefix(prefix): file for name, file in record.outputs.items() if name.startswith(prefix)}


def weights_sha256(files: Mapping[str, OutputFile]) -> str:
    """One SHA-256 for a model: over the canonical JSON of its files' paths in the result and their hashes."""
    hashes = {f"{MODEL}/{name}": file.sha256 for name, file in files.items()}
    return hashlib.sha256(canonical_json(hashes).encode()).hexdigest()


def evaluation_sha256(record: Record) -> str:
    """One SHA-256 for an evaluation: over what was asked and how, and the hashes of its files."""
    hashes = {name: file.sha256 for name, file in record.outputs.items()}
    return hashlib.sha256(canonical_json({"semantics": record.semantics, "outputs": hashes}).encode()).hexdigest()


def altered(directory: Path, recorded: Mapping[str, OutputFile]) -> list[str]:
    """Which recorded files are not as they were, as `name is missing` or `name has changed`. Every one is read whole.

    Raises StorageError for files that cannot be read.
    """
    names = sorted(recorded)
    with storage_errors(directory), ThreadPoolExecutor(_READERS) as pool:
        same = list(pool.map(lambda name: _is(directory / name, recorded[name]), names))
    wrong = [name for name, unchanged in zip(names, same, strict=True) if not unchanged]
    return [f"{name} {'has changed' if (directory / name).is_file() else 'is missing'}" for name in wrong]


def changed_files(directory: Path, recorded: Mapping[str, OutputFile]) -> list[str]:
    """What of a model's directory is not as it was recorded: as `altered`, or `name was not there`.

    Documents and pictures that were added do not count; anything else that a loader may find does, also a link to a directory,
    whatever lies in there.
    """
    wrong = altered(directory, recorded)
    with storage_errors(directory):
        there = [path for path in directory.rglob("*") if not path.is_dir() or path.is_symlink()]
        names = {path.relative_to(directory).as_posix(): path.is_file() for path in there}
    added = sorted(
        name
        for name in names.keys() - recorded.keys()
        if not names[name] or Path(name).suffix.lower() not in _DOCUMENTS
    )
    return wrong + [f"{name} was not there" for name in added]


def _is(path: Path, recorded: OutputFile) -> bool:
    return path.is_file() and path.stat().st_size == recorded.bytes and file_sha256(path) == recorded.sha256
