"""Preference pairs and anchor prompts: JSONL files, checked whole, and their tokenisation with the model's own chat
template. No torch here: a run config's data files are checked before anything heavy is imported."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from components.errors import DataError, listed

Messages = list[dict[str, str]]
T = TypeVar("T")


@dataclass(frozen=True)
class Preference:
    """One row of a preference file: the same prompt answered in a safe (`chosen`) and in an unsafe way (`rejected`)."""

    line: int
    prompt: str | Messages
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Prompt:
    """One row of an anchor file; an answer in it is ignored."""

    line: int
    prompt: str | Messages


@dataclass(frozen=True)
class Row:
    """A tokenised prompt and response; `prompt` tokens come first, only the response is scored."""

    tokens: tuple[int, ...]
    prompt: int

    @property
    def response(self) -> int:
        """Tokens that are scored."""
        return len(self.tokens) - self.prompt


@dataclass(frozen=True)
class Pair:
    """A tokenised preference."""

    line: int
    chosen: Row
    rejected: Row


def load_preferences(path: Path) -> list[Preference]:
    """Rows `{"prompt", "chosen", "rejected"}`, each a text or chat messages; messages of `chosen` and `rejected` may
    repeat the prompt, which may then be left out. Raises DataError that lists every bad line."""
    return _load(path, _preference, "preference pair")


def load_prompts(path: Path) -> list[Prompt]:
    """Rows `{"messages": [...]}` that end with a user's turn (an assistant's last turn is dropped), or
    `{"prompt": text}`. Raises DataError that lists every bad line."""
    return _load(path, _prompt, "prompt")


def _load(path: Path, parse: Callable[[int, dict[str, Any]], T], what: str) -> list[T]:
    rows: list[T] = []
    problems: list[str] = []
    for line, row in _json_rows(path):
        try:
            rows.append(parse(line, row if isinstance(row, dict) else _raise(row)))
        except ValueError as error:
            problems.append(f"line {line}: {error}")
    if problems:
        raise DataError(f"{path}: {listed(problems)}")
    if not rows:
        raise DataError(f"{path}: the file is empty; write one JSON object per line, each a {what}")
    return rows


def _raise(problem: str) -> NoReturn:
    raise ValueError(problem)


def _json_rows(path: Path) -> list[tuple[int, dict[str, Any] | str]]:
    """(line, object, or what is wrong with it) of every line that is not blank."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text at byte {error.start}") from None
    rows: list[tuple[int, dict[str, Any] | str]] = []
    # Not splitlines(): U+2028 and its like are ordinary characters inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            rows.append((number, f"not JSON ({error.msg}, column {error.colno})"))
            continue
        rows.append((number, row if isinstance(row, dict) else "not a JSON object"))
    return rows


def _messages(value: Any, key: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key} is neither text nor a list of messages")
    for message in value:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"{key} holds a message without a text role and content")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _response(row: Mapping[str, Any], key: str) -> tuple[str, Messages]:
    """The response text and the messages before it."""
    if key not in row:
        raise ValueError(f"no {key!r}")
    value = row[key]
    before: Messages = []
    if not isinstance(value, str):
        *before, last = _messages(value, key)
        if last["role"] != "assistant":
            raise ValueError(f"{key} does not end with an assistant message")
        value = last["content"]
    if not value.strip():
        raise ValueError(f"{key} is empty")
    return value, before


def _preference(line: int, row: Mapping[str, Any]) -> Preference:
    problems: list[str] = []
    texts: dict[str, str] = {}
    prompt: str | Messages | None = None
    try:
        prompt = _given_prompt(row)
    except ValueError as error:
        problems.append(str(error))
    for key in ("chosen", "rejected"):
        try:
            texts[key], before = _response(row, key)
        except ValueError as error:
            problems.append(str(error))
            continue
        prompt = prompt if prompt is not None or problems else before or None
        if before and prompt is not None and before != _as_messages(prompt):
            problems.append(f"the messages of {key} before its answer are not the prompt")
    if prompt is None and not problems:
        problems.append("no 'prompt'")
    if len(texts) == 2 and texts["chosen"] == texts["rejected"]:
        problems.append("chosen and rejected are identical")
    if problems or prompt is None:
        raise ValueError(", ".join(problems))
    return Preference(line, prompt, texts["chosen"], texts["rejected"])


def _given_prompt(row: Mapping[str, Any]) -> str | Messages | None:
    value = row.get("prompt")
    if value is None:
        return None
    if isinstance(value, str):
        if not value.strip():
            raise ValueError("prompt is empty")
        return value
    return _messages(value, "prompt")


def _as_messages(prompt: str | Messages) -> Messages:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _prompt(line: int, row: Mapping[str, Any]) -> Prompt:
    if isinstance(row.get("prompt"), str) and "messages" not in row:
        if not row["prompt"].strip():
            raise ValueError("prompt is empty")
        return Prompt(line, row["prompt"])
    if "messages" not in row:
        raise ValueError("no 'messages'")
    messages = _messages(row["messages"], "messages")
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("messages do not end with a user's turn")
    return Prompt(line, messages)


def prompt_text(tokenizer: Any, prompt: str | Messages) -> str:
    """The prompt as the model sees it, up to where its answer begins. Without a chat template only plain text will
    do."""
    if tokenizer.chat_template is None:
        if isinstance(prompt, str):
            return prompt
        raise DataError(f"{tokenizer.name_or_path}: the tokenizer has no chat template, so prompts must be plain text")
    return str(tokenizer.apply_chat_template(_as_messages(prompt), tokenize=False, add_generation_prompt=True))


def encode_prompt(tokenizer: Any, prompt: str | Messages) -> tuple[int, ...]:
    """Token ids of `prompt_text`."""
    return tuple(tokenizer(prompt_text(tokenizer, prompt), add_special_tokens=False)["input_ids"])


def encode_row(tokenizer: Any, prompt: str | Messages, response: str) -> Row:
    """Prompt and response as the model would read and write them: the response ends with the end-of-turn token."""
    before = encode_prompt(tokenizer, prompt)
    text, ended = response, False
    if tokenizer.chat_template is not None:
        turns = [*_as_messages(prompt), {"role": "assistant", "content": response}]
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        lead = prompt_text(tokenizer, prompt)
        if whole.startswith(lead):
            text, ended = whole[len(lead) :], True
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    eos = tokenizer.eos_token_id
    if eos is not None and eos in ids:  # templates often put a line break after it that no model is asked to write
        ids = ids[: ids.index(eos) + 1]
    elif eos is not None and not ended:
        ids = (*ids, eos)
    return Row((*before, *ids), len(before))


def encode_pairs(tokenizer: Any, rows: Sequence[Preference], max_length: int, path: Path) -> tuple[list[Pair], int]:
    """Tokenised pairs, and how many were left out because a side is longer than `max_length` tokens."""
    pairs = [
        Pair(r.line, encode_row(tokenizer, r.prompt, r.chosen), encode_row(tokenizer, r.prompt, r.rejected))
        for r in rows
    ]
    kept = [p for p in pairs if max(len(p.chosen.tokens), len(p.rejected.tokens)) <= max_length]
    if not kept:
        raise DataError(f"{path}: every pair is longer than mask.max_length = {max_length} tokens; raise it")
    return kept, len(pairs) - len(kept)


def _rank(seed: int, what: str, epoch: int, index: int) -> bytes:
    return hashlib.blake2b(f"{seed}\0{what}\0{epoch}\0{index}".encode(), digest_size=8).digest()


class Schedule:
    """Which examples each step takes: epochs, each a permutation by hash of (seed, epoch, index). A function of the
    step alone, so it is the same at every number of workers and after every resume."""

    def __init__(self, examples: int, batch_size: int, *, seed: int, what: str) -> None:
        assert examples > 0
        self._examples, self._batch_size, self._seed, self._what = examples, batch_size, seed, what
        self._orders: dict[int, list[int]] = {}

    def batch(self, step: int) -> list[int]:
        """Indices of the `batch_size` examples of one step."""
        first = step * self._batch_size
        return [self._at(position) for position in range(first, first + self._batch_size)]

    def used(self, steps: int) -> list[int]:
        """Indices, in order, of every example that some step looks at."""
        if steps * self._batch_size >= self._examples:
            return list(range(self._examples))
        return sorted({i for step in range(steps) for i in self.batch(step)})

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self._examples)
        if epoch not in self._orders:
            everyone = range(self._examples)
            self._orders = {epoch: sorted(everyone, key=lambda i: _rank(self._seed, self._what, epoch, i))}
        return self._orders[epoch][place]
