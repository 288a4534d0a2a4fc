"""Reading files of an object store by range, a bounded number of windows at a time, with the next ones under way.

A request to a store costs tens of milliseconds whatever its size, and one connection gives some tens of MB/s: so neighbouring
reads share a request, and several requests run at once. Read-ahead stays inside the tensor until tensors were read one after
the other, as they lie: who picks single tensors does not fetch what lies between them.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from components.checkpoints.dtypes import Bits
from components.checkpoints.headers import Header
from components.checkpoints.places import RemoteFile

WINDOW = 8 << 20
AHEAD = 3
HELD = 6
_SURE = 2


@dataclass
class _Window:
    begin: int
    end: int
    data: Future[bytes]


@dataclass
class _Stream:
    """How a file is being read."""

    reached: int = -1
    """Where the last read ended."""
    limit: int = -1
    """Where the tensor of the last read ends."""
    run: int = 0
    """Tensors that were read one after the other as they lie."""


class _State:
    """What belongs to one process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.held: OrderedDict[tuple[RemoteFile, int], _Window] = OrderedDict()
        self.streams: dict[RemoteFile, _Stream] = {}
        self.pool = ThreadPoolExecutor(max_workers=AHEAD + 1, thread_name_prefix="windows")


@dataclass
class Windows:
    """A buffer over files of a store that several files share, so that memory does not grow with their number.

    At most `held` windows of `window` bytes are in memory, of which `ahead` may be under way. Threads may share it; forked and
    spawned processes begin with nothing.
    """

    window: int = WINDOW
    """Bytes of one request."""
    ahead: int = AHEAD
    """Windows asked for beyond the one that is read."""
    held: int = HELD
    """At least ahead + 2: those under way must not push out the one that is read."""
    _states: dict[int, _State] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert self.window > 0, self.window
        assert self.held >= self.ahead + 2, (self.held, self.ahead)

    def __getstate__(self) -> dict[str, Any]:
        return {"window": self.window, "ahead": self.ahead, "held": self.held, "_states": {}}

    def read(self, file: RemoteFile, start: int, stop: int, *, limit: int) -> bytearray:
        """Bytes [start, stop) of a file; `limit`, at least stop, is where what belongs together ends. The result is the
        caller's. Raises CheckpointError when the store refuses."""
        state = self._states.setdefault(os.getpid(), _State())
        out = bytearray(stop - start)
        position = start
        while position < stop:
            with state.lock:
                window = self._at(state, file, position, self._horizon(state, file, position, stop, limit))
            try:
                data = window.data.result()
            except CancelledError:
                continue  # another thread's windows pushed it out before it was asked for
            except BaseException:
                with state.lock:
                    state.held.pop((file, window.begin), None)  # the next reader asks again
                raise
            end = min(stop, window.end)
            out[position - start : end - start] = memoryview(data)[position - window.begin : end - window.begin]
            position = end
        with state.lock:
            stream = state.streams.setdefault(file, _Stream())
            stream.reached, stream.limit = stop, limit
        return out

    def _horizon(self, state: _State, file: RemoteFile, position: int, stop: int, limit: int) -> int:
        """How far it is worth reading ahead."""
        stream = state.streams.setdefault(file, _Stream())
        if stream.limit != limit:  # another tensor
            stream.run = stream.run + 1 if 0 <= position - stream.reached < 64 else 0
            stream.limit = limit
        return file.size if stream.run >= _SURE else max(stop, limit)

    def _at(self, state: _State, file: RemoteFile, position: int, horizon: int) -> _Window:
        """The window that holds a byte, and those after it under way."""
        found = self._find(state, file, position) or self._ask(state, file, position, horizon)
        state.held.move_to_end((file, found.begin))  # not to be pushed out by those that follow
        end = found.end
        for _ in range(self.ahead):
            if end >= horizon:
                break
            following = self._find(state, file, end) or self._ask(state, file, end, horizon)
            end = following.end
        return found

    def _find(self, state: _State, file: RemoteFile, position: int) -> _Window | None:
        for (other, begin), window in state.held.items():
            if other == file and begin <= position < window.end:
                return window
        return None

    def _ask(self, state: _State, file: RemoteFile, begin: int, horizon: int) -> _Window:
        end = min(begin + self.window, horizon)
        window = _Window(begin, end, state.pool.submit(file.read, begin, end))
        state.held[file, begin] = window
        while len(state.held) > self.held:
            _, oldest = state.held.popitem(last=False)
            oldest.data.cancel()
        return window


class WindowedFile:
    """The tensors of a safetensors file in a store."""

    def __init__(self, header: Header, file: RemoteFile, windows: Windows) -> None:
        self.header = header
        self._file = file
        self._windows = windows

    def bits(self, name: str, start: int, stop: int) -> Bits:
        """Elements [start, stop) of a tensor, in memory of their own."""
        placed = self.header.tensors[name]
        dtype = placed.spec.kind.bits
        if start == stop:
            return np.empty(0, dtype)
        begin, end = (placed.offset + i * dtype.itemsize for i in (start, stop))
        raw = self._windows.read(self._file, begin, end, limit=placed.offset + placed.spec.nbytes)
        return np.frombuffer(raw, dtype)
