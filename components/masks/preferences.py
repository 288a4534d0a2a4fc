"""Preference pairs and anchor prompts as tokens, by the model's own chat template, and the order in which steps take them."""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from components.errors import DataError
from components.masks.shapes import Messages, Preference, as_messages


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


def prompt_text(tokenizer: Any, prompt: str | Messages) -> str:
    """The prompt as the model sees it, up to where its answer begins. Without a chat template only plain text will do.
    Raises DataError for a prompt that the template refuses."""
    if tokenizer.chat_template is None:
        if isinstance(prompt, str):
            return prompt
        raise DataError(f"{tokenizer.name_or_path}: the tokenizer has no chat template, so prompts must be plain text")
    return _templated(tokenizer, as_messages(prompt), add_generation_prompt=True)


def _templated(tokenizer: Any, messages: Messages, *, add_generation_prompt: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except TemplateError as error:
        shown = textwrap.shorten(str(messages[-1]["content"]), 60, placeholder=" …")
        raise DataError(
            f"{tokenizer.name_or_path}: the chat template refuses the conversation that ends in {shown!r}: {error}"
        ) from error


def encode_prompt(tokenizer: Any, prompt: str | Messages) -> tuple[int, ...]:
    """Token ids of `prompt_text`."""
    return tuple(tokenizer(prompt_text(tokenizer, prompt), add_special_tokens=False)["input_ids"])


def encode_row(tokenizer: Any, prompt: str | Messages, response: str) -> Row:
    """Prompt and response as the model would read and write them: the response ends with the end-of-turn token."""
    before = encode_prompt(tokenizer, prompt)
    text, ended = response, False
    if tokenizer.chat_template is not None:
        turns = [*as_messages(prompt), {"role": "assistant", "content": response}]
        whole = _templated(tokenizer, turns, add_generation_prompt=False)
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


def encode_pairs(tokenizer: Any, rows: Sequence[Preference], max_length: int, where: object) -> tuple[list[Pair], int]:
    """Tokenised pairs, and how many were left out because a side is longer than `max_length` tokens."""
    pairs = [
        Pair(r.line, encode_row(tokenizer, r.prompt, r.chosen), encode_row(tokenizer, r.prompt, r.rejected))
        for r in rows
    ]
    kept = [p for p in pairs if max(len(p.chosen.tokens), len(p.rejected.tokens)) <= max_length]
    if not kept:
        raise DataError(f"{where}: every pair is longer than mask.max_length = {max_length} tokens; raise it")
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
