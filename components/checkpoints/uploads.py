"""One file on its way to an object store: written from its beginning to its end, there when it is whole."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from components.checkpoints.places import tag_of
from components.checkpoints.stores import ask, filesystem
from components.errors import StorageError

PART_BYTES = 16 << 20
LEAST_PART = 5 << 20
"""S3 takes no smaller part, but for the last one."""
_MOST_PARTS = 9_000  # S3 takes 10,000


@dataclass(frozen=True)
class Written:
    """A file that is in the store, whole."""

    bytes: int
    sha256: str
    etag: str
    """The store's tag."""


class FileUpload:
    """A file of a known size. One part is sent while the next is gathered; nobody sees the file before `close`, and `discard`
    (or leaving the `with` block without `close`) leaves nothing behind.

    Args:
        url: where it will be.
        size: bytes that will be written.
        part_bytes: of one request, unless the file needs larger ones; at most about four parts are in memory.
        finished: told what was written, when it is there.

    Every method raises StorageError when the store refuses.
    """

    def __init__(
        self, url: str, size: int, *, part_bytes: int = PART_BYTES, finished: Callable[[Written], None] | None = None
    ) -> None:
        self.url = url
        self.size = size
        self._part = max(part_bytes, LEAST_PART, math.ceil(size / _MOST_PARTS))
        self._finished = finished
        self._fs, self._path = filesystem(url)
        self._taken = 0
        self._buffer = bytearray()
        self._digest = hashlib.sha256()
        self._pending: Future[None] | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._handle: Any = None
        if size > self._part:
            # Not committed by closing it: else an error would publish what there is of it.
            self._handle = self._once(
                lambda: self._fs.open(self._path, "wb", block_size=self._part, autocommit=False),
            )
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload")

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """The next bytes of the file."""
        view = memoryview(data).cast("B")
        self._taken += view.nbytes
        assert self._taken <= self.size, (self.url, self._taken, self.size)
        while view.nbytes:
            room = self._part - len(self._buffer)
            self._buffer += view[:room]
            view = view[room:]
            if len(self._buffer) == self._part and self._handle is not None:
                self._send()

    def close(self) -> Written:
        """Have the file appear under its name. Every byte must have been written."""
        assert self._taken == self.size, (self.url, self._taken, self.size)
        if self._handle is None:
            self._digest.update(self._buffer)
            data = bytes(self._buffer)
            ask(self.url, "write", lambda: self._fs.pipe_file(self._path, data))
        else:
            self._send()
            self._wait()
            self._once(self._handle.close)  # sends what is left
            self._once(self._handle.commit)
            self._handle = None
        self._buffer = bytearray()
        self._fs.invalidate_cache()
        info = ask(self.url, "write", lambda: self._fs.info(self._path))
        if info["size"] != self.size:
            raise StorageError(f"{self.url}: {self.size} bytes were written, the store has {info['size']}; run again")
        written = Written(self.size, self._digest.hexdigest(), tag_of(info))
        if self._finished is not None:
            self._finished(written)
        return written

    def discard(self) -> None:
        """Give the upload up. Nothing when the file is whole."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)  # a part that arrived after the end would stay
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.closed = True  # else it would be sent when it is collected
            with contextlib.suppress(StorageError):  # what went wrong before is what the user must hear of
                self._once(handle.discard)

    def __enter__(self) -> FileUpload:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def _send(self) -> None:
        self._wait()
        part, self._buffer = self._buffer, bytearray()
        assert self._pool is not None
        self._pending = self._pool.submit(self._upload, part)

    def _upload(self, part: bytearray) -> None:
        self._digest.update(part)
        self._once(lambda: self._handle.write(part))

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _once(self, call: Callable[[], Any]) -> Any:
        """The store's library tries a part again by itself; a second call would send it twice."""
        return ask(self.url, "write", call, attempts=1)
