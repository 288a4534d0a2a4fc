"""Records and fingerprints: what a stage leaves behind, and the identity under which it is found again.

A fingerprint hashes what decides a result (stage, stage version, the config's semantics, the parents' fingerprints) and
nothing that does not (paths, workers, devices, dates). A moved model or a renamed bucket changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FINGERPRINT_CHARS = 20
RECORD_FILE = "record.json"


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, finite numbers only.

    Raises TypeError for anything that is not plain JSON (paths, tensors, objects): silently hashing their `repr` would
    make fingerprints depend on the machine.
    """
    _refuse_non_json(value, "$")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _refuse_non_json(value: Any, where: str) -> None:
    if value is None or isinstance(value, bool | int | str):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"cannot hash {value!r} at {where}")
        return
    if isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _refuse_non_json(item, f"{where}[{i}]")
        return
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"cannot hash key {key!r} at {where}")
            _refuse_non_json(item, f"{where}.{key}")
        return
    raise TypeError(f"cannot hash a {type(value).__name__} at {where}")


def fingerprint(*, stage: str, version: int, semantics: dict[str, Any], parents: dict[str, str]) -> str:
    """The identity of a stage's result.

    `semantics` is the part of the config that changes the result, `parents` maps roles to fingerprints. Returns the first
    20 hex digits of a SHA-256 (80 bits: a collision among a billion results has odds of one in a million).
    """
    text = canonical_json({"stage": stage, "version": version, "semantics": semantics, "parents": parents})
    return hashlib.sha256(text.encode()).hexdigest()[:FINGERPRINT_CHARS]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, streamed."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class OutputFile(BaseModel):
    """One file of a result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    sha256: str


class Record(BaseModel):
    """What a finished stage leaves. Everything later stages and people may know of it stands here."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    stage: str
    stage_version: int
    fingerprint: str
    semantics: dict[str, Any]
    """The hashed part of the config."""
    execution: dict[str, Any]
    """How it was run: paths, threads, device. Not hashed."""
    parents: dict[str, str]
    """role -> `<stage>/<fingerprint>`."""
    outputs: dict[str, OutputFile]
    """Relative path -> size and hash. Every file beside the record is listed but for the model card, which runs write."""
    metrics: dict[str, Any]
    notes: list[str] = []
    """What a reader must know: what was left out, what was rounded."""
    code: dict[str, str]
    environment: dict[str, str]
    started: str
    """UTC, ISO 8601."""
    seconds: float

    @property
    def reference(self) -> str:
        """How a child names this record as its parent."""
        return f"{self.stage}/{self.fingerprint}"

    def to_json(self) -> str:
        return json.dumps(self.model_dump(), indent=1, sort_keys=True, allow_nan=False) + "\n"


def parent_fingerprint(reference: str) -> str:
    """`<stage>/<fingerprint>` -> fingerprint."""
    return reference.rsplit("/", 1)[1]


def hash_outputs(directory: Path) -> dict[str, OutputFile]:
    """Size and SHA-256 of every file under `directory`, by POSIX relative path."""
    return {
        path.relative_to(directory).as_posix(): OutputFile(bytes=path.stat().st_size, sha256=file_sha256(path))
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.relative_to(directory).as_posix() != RECORD_FILE
    }
