"""Prompt sets: who is asked what, and what the right answer is.

Every problem of a file is reported at once with its line (item for JSON, row for parquet). An empty set is an error: "0 %
harmful" must never mean "nobody looked".
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from components.errors import DataError, listed
from components.evaluation.attacks import attacked
from components.evaluation.conversations import Prompt, conversation
from components.evaluation.settings import SetKind, SetSettings, Split
from components.records import file_sha256
from components.rows import PROMPT_COLUMNS, DataRow, read_rows, require_readable


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one file, in file order, with what they measure. `sha256` is the file's (with that of an
    attack); `counts` as in its settings."""

    name: str
    kind: SetKind
    split: Split
    counts: bool
    path: Path
    sha256: str
    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.prompts)


def load_prompt_set(settings: SetSettings, *, root: Path | None = None) -> PromptSet:
    """Read one set; a relative path is taken from `root`. Raises DataError that lists everything wrong with it."""
    path = settings.path if root is None else root / settings.path
    rows = read_rows(path)
    require_readable(path, rows)
    prompts = _prompts(_kept(rows, settings, path), settings, path)
    if settings.attack is not None:
        prompts = attacked(prompts, settings.attack, root=root)
    if not prompts:
        some = f"no row has {settings.where}" if rows else "the file has no rows"
        raise DataError(f"prompt set {settings.name!r} is empty ({path}: {some}); nothing can be measured on it")
    return PromptSet(
        name=settings.name,
        kind=settings.kind,
        split=settings.split,
        counts=settings.counts,
        path=path,
        sha256=_identity(path, settings, root),
        prompts=prompts,
    )


def _identity(path: Path, settings: SetSettings, root: Path | None) -> str:
    """The file's SHA-256; where an attack has a file too, one of both."""
    own = file_sha256(path)
    if settings.attack is None or settings.attack.path is None:
        return own
    theirs = file_sha256((root or Path()) / settings.attack.path)
    return hashlib.sha256(f"{own} {theirs}".encode()).hexdigest()


def _kept(rows: list[DataRow], settings: SetSettings, path: Path) -> list[DataRow]:
    """Rows that `where` and `limit` leave."""
    for column in settings.where:
        if rows and not any(column in row.fields for row in rows):
            raise DataError(f"{path} has no column {column!r} to select by; it has {', '.join(rows[0].fields)}")
    chosen = [r for r in rows if all(str(r.fields.get(c)) == value for c, value in settings.where.items())]
    return chosen[: settings.limit]


def _prompts(rows: list[DataRow], settings: SetSettings, path: Path) -> tuple[Prompt, ...]:
    column = _prompt_column(rows, settings, path)
    prompts: list[Prompt] = []
    problems: list[str] = []
    for number, row in enumerate(rows, start=1):
        messages, problem = conversation(row.fields.get(column), column)
        answer = row.fields.get(settings.answer_column or "answer")
        if answer is not None and not isinstance(answer, str | int | float):
            problem = problem or f"the answer is a {type(answer).__name__}, not text"
        if answer is None and (settings.kind == "task" or settings.answer_column):
            problem = problem or f"no {settings.answer_column or 'answer'!r}: add the right answer to the row"
        identity = str(row.fields.get(settings.id_column or "id", number))
        if problem:
            problems.append(f"{row.where}: {problem}")
        else:
            prompts.append(Prompt(identity, messages, None if answer is None else str(answer)))
    twice = [name for name, n in Counter(p.id for p in prompts).items() if n > 1]
    problems += [f"id {name!r} is used more than once" for name in twice]
    if problems:
        raise DataError(f"prompt set {settings.name!r} ({path}): {listed(problems)}")
    return tuple(prompts)


def _prompt_column(rows: list[DataRow], settings: SetSettings, path: Path) -> str:
    present = set().union(*(row.fields for row in rows)) if rows else set()
    if settings.prompt_column:
        if rows and settings.prompt_column not in present:
            raise DataError(f"{path} has no column {settings.prompt_column!r}; it has {', '.join(sorted(present))}")
        return settings.prompt_column
    for column in PROMPT_COLUMNS:
        if column in present:
            return column
    if rows:
        names = ", ".join(sorted(present)) or "nothing"
        raise DataError(f"{path}: no column of {', '.join(PROMPT_COLUMNS)} (found: {names}); set its prompt_column")
    return PROMPT_COLUMNS[0]
