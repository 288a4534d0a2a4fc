"""YAML that remembers on which line each key stands, so that an error can point at it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from components.errors import ConfigError, listed

Location = tuple[str | int, ...]


class LocatedYaml:
    """A YAML document as plain data, and the line of each key."""

    def __init__(self, path: Path, *, meant: str, text: str | None = None) -> None:
        """`meant` says what the document should be (`a run config is a mapping of …`), for the message where it is none.
        `text`: what stands there, where it is known and `path` is but its name.

        Raises ConfigError for a file that cannot be read, is not YAML, is no mapping or has a key twice."""
        self.path = path
        try:
            text = path.read_text() if text is None else text
        except (OSError, UnicodeDecodeError) as e:
            reason = e.strerror if isinstance(e, OSError) else "not UTF-8 text"
            raise ConfigError(f"{path}: cannot be read: {reason}") from e
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            self.data: Any = yaml.safe_load(text)
        except yaml.YAMLError as e:
            mark = getattr(e, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            raise ConfigError(
                f"{path}{line}: not YAML: {getattr(e, 'problem', None) or e}; look at the line before it too"
            ) from e
        self.lines: dict[Location, int] = {}
        self._twice: list[str] = []
        if node is not None:
            self._walk(node, ())
        if self._twice:
            raise ConfigError(f"{path}: keys given twice: {listed(self._twice)}; keep one of each")
        if not isinstance(self.data, dict):
            raise ConfigError(f"{path}: {meant}")

    def line(self, location: Location) -> int:
        """Line of the key at `location`, or of the nearest key above it that stands in the file."""
        while location not in self.lines and location:
            location = location[:-1]
        return self.lines.get(location, 1)

    def _walk(self, node: yaml.Node, location: Location) -> None:
        self.lines.setdefault(location, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                self._walk(item, (*location, i))
        elif isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                here = (*location, str(key.value))
                if here in seen:
                    self._twice.append(f"'{key.value}' (line {key.start_mark.line + 1})")
                seen.add(here)
                self.lines[here] = key.start_mark.line + 1
                self._walk(value, here)
