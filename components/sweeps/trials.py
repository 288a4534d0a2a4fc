"""What became of a candidate: a line of `trials.jsonl`. Needs no model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from components.errors import StorageError
from components.records import canonical_json
from components.sweeps.settings import Objective, Value

Candidate = dict[str, Value]
"""Flat key -> value, as `{"method": "masked", "form": "soft", "scale": 0.9}`; {} is the run's own settings. Its order is that
in which patterns of `layers` are looked through."""

TRIALS_FILE = "trials.jsonl"
_CHARS = 12


@dataclass(frozen=True)
class Scored:
    """A candidate and what it did on the prompts that it was asked."""

    candidate: Candidate
    hits: Mapping[str, str]
    """`Objective.name` -> a character for each prompt asked, in the sweep's fixed order: 1 where the metric counts it. All
    candidates' strings begin with the same prompts."""
    stopped: str | None = None
    """Why it was asked no further; None of one that was asked everything."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """`fuse` and `score`."""

    def rate(self, objective: Objective) -> float:
        """Share of hits so far. Raises ZeroDivisionError where nothing was asked."""
        hits = self.hits[objective.name]
        return hits.count("1") / len(hits)

    def losses(self, objectives: Sequence[Objective]) -> tuple[float, ...]:
        """`Objective.loss` of each: less is better."""
        return tuple(one.loss(self.rate(one)) for one in objectives)

    def is_full(self, prompts: Mapping[str, int]) -> bool:
        """Whether it was asked everything. `prompts`: `Objective.name` -> how many there are."""
        return all(len(self.hits.get(name, "")) == count for name, count in prompts.items())

    def to_json(self) -> str:
        """One line, without its end. Keys keep their order."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False)

    @classmethod
    def of_json(cls, line: str | bytes) -> Self:
        """Raises ValueError, KeyError or TypeError for what is no such line."""
        return cls(**json.loads(line))


def candidate_key(candidate: Candidate) -> str:
    """One text for one candidate, by which it is found again."""
    return canonical_json([[key, value] for key, value in candidate.items()])


def candidate_id(candidate: Candidate) -> str:
    """A short name for one candidate, the same wherever it stands among others."""
    return _digest(candidate_key(candidate))


def models_identity(parents: Mapping[str, str]) -> str:
    """Of the models and masks that are fused: role -> fingerprint of its record."""
    return _digest(dict(parents))


def study_identity(models: str, asked: Mapping[str, Any]) -> str:
    """Directory of a target's trials: `<models>-<what was asked>`, so that other studies of the same models are found by the
    beginning. `asked`: plain JSON of all that decides hits but the candidate (evaluation settings, questions and their
    order)."""
    return f"{models}-{_digest(dict(asked))}"


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:_CHARS]


def append_trial(path: Path, scored: Scored) -> None:
    """Add a line, in place of one that a killed process left unfinished. One process at a time. Raises OSError when the disk is
    full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(f"{scored.to_json()}\n".encode())


def read_trials(path: Path) -> list[Scored]:
    """Every candidate that was written, the last of what was written twice, in the order of the first. A last line that a
    killed process left unfinished is left out. Raises StorageError naming the line that is none."""
    if not path.exists():
        return []
    *lines, _unfinished = path.read_bytes().split(b"\n")
    found: dict[str, Scored] = {}
    for number, line in enumerate(lines, start=1):
        try:
            scored = Scored.of_json(line)
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{path}:{number}: not a trial ({error}); remove the line or the file") from error
        found[candidate_key(scored.candidate)] = scored
    return list(found.values())
