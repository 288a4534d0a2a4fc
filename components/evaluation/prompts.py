"""Prompt sets: who is asked what, and what the right answer is.

Reads JSONL (one object per line), JSON (a list of objects, or a tree `category -> topic -> [prompt, …]` as CatQA's
Chinese file) and CSV with a header line. Every problem of a file is reported at once with its line (item for JSON). An
empty set is an error: "0 % harmful" must never mean "nobody looked".
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.errors import DataError, listed
from components.evaluation.settings import SetKind, SetSettings, Split

PROMPT_COLUMNS = ("messages", "prompt", "goal", "question", "instruction")
ROLES = ("system", "user", "assistant", "tool")

Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """One conversation to be continued. `messages` end with what the model must answer; `answer` is the exact answer
    that is expected, where there is one."""

    id: str
    messages: tuple[Message, ...]
    answer: str | None = None

    @property
    def text(self) -> str:
        """The last message: what tables and reports show."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one file, in file order, with what they measure. `sha256` is the file's; `counts` as in
    its settings."""

    name: str
    kind: SetKind
    split: Split
    counts: bool
    path: Path
    sha256: str
    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class _Row:
    where: str
    fields: dict[str, Any]


def load_prompt_set(settings: SetSettings, *, root: Path | None = None) -> PromptSet:
    """Read one set; a relative path is taken from `root`. Raises DataError that lists everything wrong with it."""
    path = settings.path if root is None else root / settings.path
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"prompt set {settings.name!r}: cannot read {path} ({error.strerror}); correct the path"
        ) from None
    try:
        rows = list(_rows(path, raw.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); convert it") from error
    prompts = _prompts(_kept(rows, settings, path), settings, path)
    if not prompts:
        some = f"no row has {settings.where}" if rows else "the file has no rows"
        raise DataError(f"prompt set {settings.name!r} is empty ({path}: {some}); nothing can be measured on it")
    return PromptSet(
        name=settings.name,
        kind=settings.kind,
        split=settings.split,
        counts=settings.counts,
        path=path,
        sha256=hashlib.sha256(raw).hexdigest(),
        prompts=prompts,
    )


def _rows(path: Path, text: str) -> Iterator[_Row]:
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        yield from _jsonl_rows(path, text)
    elif suffix == ".json":
        yield from _json_rows(path, text)
    elif suffix in (".csv", ".tsv"):
        yield from _csv_rows(path, text, "\t" if suffix == ".tsv" else ",")
    else:
        raise DataError(
            f"{path}: prompts are read from .jsonl, .json, .csv or .tsv, not {suffix or 'a file without suffix'}"
        )


def _jsonl_rows(path: Path, text: str) -> Iterator[_Row]:
    problems = []
    # Not splitlines(): JSON strings may hold U+2028 and the like, which are no line ends of JSONL.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            problems.append(f"line {number}: {error}")
            continue
        if isinstance(fields, dict):
            yield _Row(f"line {number}", fields)
        else:
            problems.append(f"line {number}: an object was expected, found {type(fields).__name__}")
    if problems:
        raise DataError(f"{path} is not JSONL: {listed(problems)}")


def _json_rows(path: Path, text: str) -> Iterator[_Row]:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error} (one object per line? name it .jsonl)") from error
    if isinstance(data, dict):
        yield from _tree_rows(path, data, ())
        return
    if not isinstance(data, list):
        raise DataError(f"{path}: a list of objects or a tree of lists was expected, found {type(data).__name__}")
    problems = []
    for number, item in enumerate(data, start=1):
        if isinstance(item, dict):
            yield _Row(f"item {number}", item)
        elif isinstance(item, str):
            yield _Row(f"item {number}", {"prompt": item})
        else:
            problems.append(f"item {number}: an object or a string was expected, found {type(item).__name__}")
    if problems:
        raise DataError(f"{path}: {listed(problems)}")


def _tree_rows(path: Path, tree: dict[str, Any], trail: tuple[str, ...]) -> Iterator[_Row]:
    for key, value in tree.items():
        here = (*trail, key.strip().rstrip(":"))
        if isinstance(value, dict):
            yield from _tree_rows(path, value, here)
        elif isinstance(value, list):
            for number, item in enumerate(value, start=1):
                name = "/".join((*here, str(number)))
                yield _Row(name, {"prompt": item, "id": name, "category": here[0], "topic": here[-1]})
        else:
            raise DataError(f"{path}: {'/'.join(here)}: a list of prompts was expected, found {type(value).__name__}")


def _csv_rows(path: Path, text: str, delimiter: str) -> Iterator[_Row]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    problems = []
    try:
        header = next(reader, [])
        before = reader.line_num
        for values in reader:
            where, before = f"line {before + 1}", reader.line_num
            if len(values) == len(header):
                yield _Row(where, dict(zip(header, values, strict=True)))
            elif values:
                problems.append(f"{where}: {len(values)} fields, the header has {len(header)}")
    except csv.Error as error:
        problems.append(f"line {reader.line_num}: {error}")
    if problems:
        raise DataError(f"{path} is not CSV with a header line: {listed(problems)}")


def _kept(rows: list[_Row], settings: SetSettings, path: Path) -> list[_Row]:
    """Rows that `where` and `limit` leave."""
    for column in settings.where:
        if rows and not any(column in row.fields for row in rows):
            raise DataError(f"{path} has no column {column!r} to select by; it has {', '.join(rows[0].fields)}")
    chosen = [r for r in rows if all(str(r.fields.get(c)) == value for c, value in settings.where.items())]
    return chosen[: settings.limit]


def _prompts(rows: list[_Row], settings: SetSettings, path: Path) -> tuple[Prompt, ...]:
    column = _prompt_column(rows, settings, path)
    prompts: list[Prompt] = []
    problems: list[str] = []
    for number, row in enumerate(rows, start=1):
        messages, problem = _messages(row.fields.get(column), column)
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


def _prompt_column(rows: list[_Row], settings: SetSettings, path: Path) -> str:
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


def _messages(value: Any, column: str) -> tuple[tuple[Message, ...], str | None]:
    """(messages, None), or ((), what is wrong)."""
    if isinstance(value, str):
        return (({"role": "user", "content": value},), None) if value.strip() else ((), f"{column!r} is empty")
    if value is None:
        return (), f"no {column!r}"
    if not isinstance(value, list) or not value:
        return (), f"{column!r} must be text or a list of messages"
    for message in value:
        fits = isinstance(message, dict) and isinstance(message.get("content"), str) and message.get("role") in ROLES
        if not fits:
            return (), f"every message of {column!r} needs a role ({', '.join(ROLES)}) and a text content"
    if value[-1]["role"] == "assistant":
        return (), f"{column!r} ends with the assistant's turn: there is nothing left to answer"
    return tuple({"role": m["role"], "content": m["content"]} for m in value), None
