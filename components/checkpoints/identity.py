"""What a root model *is*: the SHA-256 of its files' contents, wherever they lie, or the checksums of the store that holds them.

Hashing is cached by (path, size, mtime, inode). Paths inside JSON configs (the name that a model was saved from) are
left out: a moved model is the same model.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from components import records
from components.errors import CheckpointError, StorageError

if TYPE_CHECKING:
    from components.checkpoints.places import RemoteFile
    from components.checkpoints.reference import Checkpoint

_PATH_KEYS = ("_name_or_path", "base_model_name_or_path", "name_or_path")
_CONFIGS = frozenset({"config.json", "adapter_config.json", "tokenizer_config.json", "generation_config.json"})
_SETTLE_NS = 2_000_000_000


@dataclass(frozen=True)
class Identity:
    """`sha256` of the canonical JSON of `files`: name -> {"bytes", "sha256"}, of a file in an object store that has no such
    hash of it {"bytes", "etag"} and perhaps a checksum. An adapter's include its base's as base/…"""

    sha256: str
    files: dict[str, dict[str, Any]]


def identify(checkpoint: Checkpoint, *, cache: Path | None = None) -> Identity:
    """Hash a checkpoint's weights, config and tokenizer files (and an adapter's base).

    Args:
        checkpoint: what `open_checkpoint` returned.
        cache: a directory that remembers hashes of unchanged files; processes may share it.

    Raises CheckpointError when a file has gone.
    """
    files: dict[str, dict[str, Any]] = {}
    for prefix, part in (("", checkpoint), ("base/", checkpoint.base)):
        if part is None:
            continue
        for path in part.files:
            name = prefix + path.relative_to(part.path).as_posix()
            remote = part.remote.get(path.name)
            if remote is not None:
                files[name] = {"bytes": remote.size, **remote.checksums()}
                continue
            size = len(_without_paths(path)) if path.name in _CONFIGS else _stat(path).st_size
            files[name] = {"bytes": size, "sha256": file_sha256(path, cache=cache)}
    files = dict(sorted(files.items()))
    canonical = json.dumps(files, sort_keys=True, separators=(",", ":"))
    return Identity(sha256=hashlib.sha256(canonical.encode()).hexdigest(), files=files)


def weights_digest(
    files: Iterable[Path], *, remote: Mapping[str, RemoteFile] = MappingProxyType({}), cache: Path | None = None
) -> str:
    """One hash over the contents of weight files, names left out except for their order. Those in `remote` are known by their
    store's checksums: copies of one model in different stores may then have different digests."""
    hashes = [
        file_sha256(f, cache=cache) if f.name not in remote else _one_checksum(remote[f.name].checksums())
        for f in sorted(files)
        if f.suffix == ".safetensors"
    ]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _one_checksum(found: Mapping[str, str]) -> str:
    return found.get("sha256") or json.dumps(found, sort_keys=True)


def file_sha256(path: Path, *, cache: Path | None = None) -> str:
    """SHA-256 of one file; of a config, without the paths that it mentions."""
    stat = _stat(path)
    if path.name in _CONFIGS:
        return hashlib.sha256(_without_paths(path)).hexdigest()
    entry = None
    if cache is not None:
        key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
        entry = cache / f"{hashlib.sha256(key.encode()).hexdigest()}.sha256"
        if entry.is_file():
            remembered = entry.read_text()
            if len(remembered) == 64:
                return remembered
    result = records.file_sha256(path)
    # A file changed within the clock's grain keeps its mtime; only what has settled is remembered.
    if entry is not None and time.time_ns() - stat.st_mtime_ns > _SETTLE_NS:
        _remember(entry, result)
    return result


def _remember(entry: Path, digest: str) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary = entry.with_name(f".{entry.name}.{os.getpid()}.{time.monotonic_ns()}")
        temporary.write_text(digest)
        temporary.replace(entry)
    except OSError as error:
        raise StorageError(f"{entry.parent}: cannot be written ({error.strerror or error})") from error


def _without_paths(path: Path) -> bytes:
    try:
        parsed = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); copy it again") from error
    if isinstance(parsed, dict):
        for key in _PATH_KEYS:
            parsed.pop(key, None)
    return json.dumps(parsed, sort_keys=True, separators=(",", ":")).encode()


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
