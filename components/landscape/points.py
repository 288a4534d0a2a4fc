"""What is asked of a point of a landscape, and what was found there. Needs no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Where = tuple[float, ...]
"""Coordinates on a scan's axes."""


@dataclass(frozen=True, order=True)
class Ask:
    """A point to measure."""

    scan: str
    direction: int
    """Which of the scan's directions, from 0."""
    at: Where


@dataclass(frozen=True)
class Point:
    """What became of every prompt at a point."""

    scan: str
    direction: int
    at: Where
    hits: dict[str, dict[str, str]]
    """set -> metric of `outcomes.hits` -> a character for each prompt, in the set's order: 1 where the metric counts it."""
    finite: bool = True
    """Whether all weights are numbers there; where they are not, nothing was asked and every answer counts as incoherent."""
    seconds: float = 0.0

    @property
    def ask(self) -> Ask:
        return Ask(self.scan, self.direction, self.at)

    def share(self, chosen: str, metric: str) -> float:
        """The rate of a metric over a set, in [0, 1]."""
        found = self.hits[chosen][metric]
        return found.count("1") / len(found)

    def pooled(self, chosen: Sequence[str], metric: str) -> float:
        """The rate over the prompts of several sets together, in [0, 1]."""
        found = "".join(self.hits[one][metric] for one in chosen)
        return found.count("1") / len(found)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @staticmethod
    def of_json(plain: dict[str, Any]) -> Point:
        return Point(**{**plain, "at": tuple(plain["at"])})


def points_text(points: Sequence[Point]) -> str:
    """One line a point, in the order of scan, direction and place."""
    return "".join(json.dumps(p.to_json()) + "\n" for p in sorted(points, key=lambda p: p.ask))


def write_points(path: Path, points: Sequence[Point]) -> None:
    """A points file; see `points_text`."""
    path.write_text(points_text(points))


def read_points(path: Path) -> list[Point]:
    """The lines of a points file; a last one that was cut off is left out."""
    lines = path.read_text().split("\n") if path.is_file() else []
    return [Point.of_json(json.loads(line)) for line in lines[:-1]]


def unscored_notes(points: Sequence[Point]) -> list[str]:
    """A line for each set with answers that nobody could score, counted over all points."""
    found: dict[str, tuple[int, int]] = {}
    for point in points:
        for name, by_metric in point.hits.items():
            unscored, asked = found.get(name, (0, 0))
            prompts = max((len(hit) for hit in by_metric.values()), default=0)
            found[name] = unscored + by_metric.get("unscored", "").count("1"), asked + prompts
    return [
        f"{name}: {unscored} of {asked} answers at all points together unscored, which never count as safe"
        for name, (unscored, asked) in found.items()
        if unscored
    ]
