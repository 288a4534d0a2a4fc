"""What of a model is on the disk already: lines that a writer appends, and that let the next one go on.

The first line says what is being written. A line follows each part that has been handed to the system. What the system has
not put on the disk is lost with the machine's power, not with a process: a journal of another boot is therefore not believed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from components.errors import StorageError

Part = tuple[str, int, int]
"""(tensor, start, stop): elements."""

_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Journal:
    """Parts that are written, with what is known of each.

    Args:
        path: the file; made anew unless its first line equals `plan`.
        plan: everything that decides what the bytes are, as plain JSON.

    Raises StorageError when it cannot be written.
    """

    def __init__(self, path: Path, plan: Mapping[str, Any]) -> None:
        self._path = path
        self._first = json.dumps({"plan": plan, "boot": _boot()}, sort_keys=True)
        self.done: dict[Part, dict[str, Any]] = self._read()
        """Part -> its note."""
        try:
            self._file: IO[str] = path.open("r+" if self.done else "w", encoding="utf-8")
            if self.done:
                self._file.seek(self._whole)
                self._file.truncate()  # a line that was cut off
            else:
                self._line(self._first)
        except OSError as error:
            raise StorageError(f"{path}: cannot be written ({error.strerror or error})") from error

    def add(self, part: Part, note: Mapping[str, Any]) -> None:
        """Say that a part is written."""
        try:
            self._line(json.dumps([*part, note]))
        except OSError as error:
            raise StorageError(f"{self._path}: cannot be written ({error.strerror or error})") from error

    def restart(self) -> None:
        """Take nothing as written."""
        self.done = {}
        self._file.seek(0)
        self._file.truncate()
        self._line(self._first)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _line(self, text: str) -> None:
        self._file.write(text + "\n")
        self._file.flush()

    def _read(self) -> dict[Part, dict[str, Any]]:
        self._whole = 0
        try:
            raw = self._path.read_bytes()
        except OSError:
            return {}
        if not _boot():
            return {}  # nobody knows whether the machine has been off
        first, *lines = raw[: raw.rfind(b"\n") + 1].splitlines() or [b""]
        if first.decode(errors="replace") != self._first:
            return {}
        self._whole = raw.rfind(b"\n") + 1
        parts = [json.loads(line) for line in lines]
        return {(name, start, stop): note for name, start, stop, note in parts}


def _boot() -> str:
    return _BOOT.read_text().strip() if _BOOT.is_file() else ""
