"""One thing that is wrong, where, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, order=True)
class Finding:
    """Printed as one line: document, path in it, what is wrong; remedy."""

    document: str
    """`Kind/name`."""
    path: str
    """Where in the document: `spec.template.spec.containers[0].image`."""
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.document} {self.path}: {self.problem}; {self.remedy}"


def named(document: dict[str, Any]) -> str:
    """`Kind/name` of a document, also of one that lacks either."""
    return f"{document.get('kind', '?')}/{(document.get('metadata') or {}).get('name', '?')}"
