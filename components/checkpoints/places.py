"""Where a model lies: a directory here, a prefix of an object store, a repository of the hub; and a file that is not here.

A model that lies elsewhere has a directory here too, with its small files. Its weights are read where they are: each has the
path that it would have in that directory, and a `RemoteFile` that stands for its bytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote, urlsplit

from components.checkpoints.stores import ask, check_url, filesystem
from components.errors import CheckpointError

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?")
_WHOLE_OBJECT = "FULL_OBJECT"
_CHECKSUMS = ("ChecksumCRC64NVME", "ChecksumCRC32C", "ChecksumCRC32", "ChecksumSHA1")
_TAGS = ("ETag", "md5Hash", "crc32c", "etag")  # of contents before of versions
_handles: dict[tuple[int, RemoteFile], Any] = {}
"""(process, file) -> what fsspec opened: none survives a fork."""


@dataclass(frozen=True)
class HubId:
    """A repository of the Hugging Face hub; without a revision, its main branch."""

    repo: str
    revision: str | None


def parse_reference(reference: Path | str) -> Path | HubId | str:
    """A directory's path, a hub id, or a URL of an object store, from what a user writes.

    `hf://owner/name@revision` and bare `owner/name@revision` (where no such path exists) are hub ids, `file://…` and everything
    without a scheme paths. Raises CheckpointError for a URL that cannot name a model.
    """
    if isinstance(reference, Path):
        return reference
    scheme, _, rest = reference.partition("://")
    if not rest:
        bare = _HUB_ID.fullmatch(reference)
        if bare and bare["revision"] and not Path(reference).exists():
            return HubId(bare["repo"], bare["revision"])
        return Path(reference)
    if scheme == "file":
        return Path(unquote(urlsplit(reference).path))
    if scheme == "hf":
        match = _HUB_ID.fullmatch(rest.rstrip("/"))
        if match is None:
            raise CheckpointError(f"{reference}: is no model of the hub; write hf://owner/name@revision")
        return HubId(match["repo"], match["revision"])
    return check_url(reference)


@dataclass(frozen=True)
class RemoteFile:
    """One object of a store as it was when it was listed. Equal objects are one; may be sent to other processes."""

    url: str
    size: int
    """Bytes."""
    etag: str
    """The store's tag of the object's contents."""

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rsplit("/", 1)[1]

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), in one request. Raises CheckpointError when the store refuses, or the object has changed."""
        assert 0 <= start <= stop <= self.size, (start, stop, self.size)
        return ask(self.url, "read", lambda: self._fetch(start, stop)) if start < stop else b""

    def checksums(self) -> dict[str, str]:
        """What the store says of the contents: `sha256` (hex) alone where it has that of the whole object, else `etag` and,
        where it has one of the whole object, a shorter checksum, as the store writes them."""
        fs, path = filesystem(self.url)
        if not hasattr(fs, "call_s3"):
            return {"etag": self.etag}
        bucket, key, _ = fs.split_path(path)
        head = ask(
            self.url,
            "read",
            lambda: fs.call_s3("head_object", Bucket=bucket, Key=key, IfMatch=f'"{self.etag}"', ChecksumMode="ENABLED"),
        )
        # A multipart upload's may be a checksum of its parts' checksums, which says nothing of other uploads.
        whole = head.get("ChecksumType", _WHOLE_OBJECT) == _WHOLE_OBJECT
        if whole and "-" not in head.get("ChecksumSHA256", "-"):
            import base64

            return {"sha256": base64.b64decode(head["ChecksumSHA256"]).hex()}
        found = {
            n.removeprefix("Checksum").lower(): head[n] for n in _CHECKSUMS if whole and "-" not in head.get(n, "-")
        }
        return {"etag": self.etag, **found}

    def _fetch(self, start: int, stop: int) -> bytes:
        data = self._handle().cache.fetcher(start, stop)  # not seek and read: threads share the handle
        if len(data) != stop - start:
            raise ConnectionError(f"{len(data)} bytes came of {stop - start}")
        return bytes(data)

    def _handle(self) -> Any:
        """The open file; one of S3 asks for the contents with this tag alone."""
        key = (os.getpid(), self)
        if key not in _handles:
            fs, path = filesystem(self.url)
            fs.invalidate_cache()
            handle = fs.open(path, "rb", cache_type="none")
            details = handle.details
            if (details["size"], tag_of(details)) != (self.size, self.etag):
                raise CheckpointError(
                    f"{self.url}: has changed since it was opened ({details['size']} bytes, {self.size} before); "
                    "run again when nobody writes there"
                )
            _handles[key] = handle
        return _handles[key]


def tag_of(info: Mapping[str, Any]) -> str:
    """The store's tag of an object's contents, from a listing's entry; empty when it has none."""
    return next((str(info[key]).strip('"') for key in _TAGS if info.get(key)), "")


@dataclass(frozen=True)
class Located:
    """A model's directory here, wherever the model itself lies."""

    path: Path
    where: str
    """What messages and records call it: the path, the URL, or `hf://owner/name@commit`."""
    files: Mapping[str, RemoteFile] = field(default_factory=lambda: MappingProxyType({}))
    """Name -> file, of what is not in the directory."""
    notes: tuple[str, ...] = ()
    """What a record says of it."""

    def has(self, name: str) -> bool:
        """Whether the model has a file of that name, here or elsewhere."""
        return name in self.files or (self.path / name).is_file()

    def names(self, *suffixes: str) -> list[str]:
        """Names of the files with one of the suffixes, sorted."""
        here = [path.name for path in self.path.iterdir()] if self.path.is_dir() else []
        return sorted(name for name in {*here, *self.files} if name.endswith(suffixes))

    @contextmanager
    def in_messages(self) -> Iterator[None]:
        """Have what is wrong with the model name the place that the user gave."""
        try:
            yield
        except CheckpointError as error:
            if self.where == str(self.path) or str(self.path) not in str(error):
                raise
            raise CheckpointError(str(error).replace(str(self.path), self.where)) from error
