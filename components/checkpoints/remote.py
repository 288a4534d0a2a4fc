"""A model by its reference, wherever it lies: what is small comes here, weights in an object store stay there.

The small files of a prefix lie under `<cache>/remote/<key>/<name>/`, where the key is a hash of the URL and of the store's
tags: a directory is never changed, a model that changed in the store has another one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from components.checkpoints.adapter_parsing import ADAPTER_WEIGHTS
from components.checkpoints.hub import SMALL, hub_snapshot
from components.checkpoints.places import HubId, Located, RemoteFile, parse_reference, tag_of
from components.checkpoints.source import blocks
from components.checkpoints.stores import ask, filesystem
from components.checkpoints.writer import TEMPLATE_DIRECTORY
from components.errors import CheckpointError, StorageError
from components.records import RECORD_FILE

UNFINISHED = ".unfinished"
"""Folder beside a model that is being uploaded: what was uploaded so far. Gone when the record is there."""
FETCHED = SMALL | {ADAPTER_WEIGHTS}
"""What is fetched whole."""
_CHUNK = 8 << 20


def default_cache() -> Path:
    """REALIGN_CACHE, or ~/.cache/safety-realign."""
    given = os.environ.get("REALIGN_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "safety-realign"


def locate(reference: Path | str, *, cache: Path | None = None) -> Located:
    """Find a model by its path, its URL (`s3://bucket/prefix`) or its hub id (`owner/name@revision`).

    Args:
        reference: see `parse_reference`; a path is taken as it is, whether something lies there or not.
        cache: keeps the small files of models in object stores; processes may share it.

    Raises CheckpointError when it is not there or cannot be read, StorageError when the cache cannot be written.
    """
    parsed = parse_reference(reference)
    if isinstance(parsed, HubId):
        return hub_snapshot(parsed)
    if isinstance(parsed, Path):
        return Located(parsed, str(parsed))
    return _mirror(parsed, cache or default_cache())


def list_files(url: str) -> dict[str, RemoteFile]:
    """Relative name -> file, of what lies under a URL and in those of its folders that belong to a model. Raises
    CheckpointError when nothing is there, or the store does not say what distinguishes contents."""
    fs, path = filesystem(url)
    entries = ask(url, "read", lambda: _listing(fs, path))
    if [str(entry["name"]).rstrip("/") for entry in entries] == [path.rstrip("/")] and entries[0]["type"] == "file":
        raise CheckpointError(f"{url}: is a file, not a model directory")
    found: dict[str, RemoteFile] = {}
    for entry in entries:
        name = str(entry["name"]).rstrip("/").rsplit("/", 1)[1]
        if entry["type"] == "file":
            found[name] = RemoteFile(f"{url}/{name}", int(entry["size"]), tag_of(entry))
        elif name in (TEMPLATE_DIRECTORY, UNFINISHED):
            found |= {f"{name}/{inner}": file for inner, file in list_files(f"{url}/{name}").items()}
    if not all(file.etag for file in found.values()):
        raise CheckpointError(
            f"{url}: this kind of store gives no checksums, so that a change would go unseen; copy it here"
        )
    return found


def _listing(fs: Any, path: str) -> list[dict[str, Any]]:
    fs.invalidate_cache()
    entries: list[dict[str, Any]] = fs.ls(path, detail=True)
    # Some tools leave an empty object where the folder would be.
    entries = [
        e for e in entries if str(e["name"]).rstrip("/") != path.rstrip("/") or (e["type"] == "file" and e["size"])
    ]
    if not entries:
        raise FileNotFoundError(path)
    return entries


def _mirror(url: str, cache: Path) -> Located:
    files = list_files(url)
    unfinished = {name for name in files if name.startswith(f"{UNFINISHED}/")}
    if unfinished and RECORD_FILE not in files:
        raise CheckpointError(f"{url}: is still being uploaded, or its upload was cut off; run the upload again")
    small = {name: file for name, file in files.items() if name in FETCHED or name.startswith(f"{TEMPLATE_DIRECTORY}/")}
    key = json.dumps([url, *((name, f.size, f.etag) for name, f in sorted(small.items()))])
    place = cache / "remote" / hashlib.sha256(key.encode()).hexdigest()[:32]
    directory = place / url.rsplit("/", 1)[1]
    if not directory.is_dir():
        try:
            _fetch(small, place, directory.name)
        except OSError as error:
            raise StorageError(
                f"{place.parent}: cannot be written ({error.strerror or error}); name another directory in REALIGN_CACHE"
            ) from error
    left = {name: file for name, file in files.items() if name not in small and name not in unfinished}
    return Located(directory, url, left)


def _fetch(small: Mapping[str, RemoteFile], place: Path, name: str) -> None:
    """Fill `place`/`name`, which appears complete by one rename; who comes second finds it there."""
    draft = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}")

    def one(item: tuple[str, RemoteFile]) -> None:
        target = draft / name / item[0]
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as out:
            for start, stop in blocks(item[1].size, _CHUNK):
                out.write(item[1].read(start, stop))

    try:
        (draft / name).mkdir(parents=True)
        with ThreadPoolExecutor(max_workers=8) as pool:
            list(pool.map(one, small.items()))
        if not place.is_dir():
            try:
                draft.rename(place)
            except OSError:
                if not place.is_dir():
                    raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
