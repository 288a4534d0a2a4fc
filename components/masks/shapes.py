"""The shapes that preference data comes in, each turned into the one `Preference`.

A shape is recognised by its columns: prompt, chosen and rejected, each a text or chat messages; two responses with safety
flags, as PKU-SafeRLHF (arXiv 2406.15513) has them; `{"prompt", "response": [safer, unsafer]}`, the records of the official
SOMF code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from components.rows import PROMPT_COLUMNS

Messages = list[dict[str, str]]
T = TypeVar("T")

LeftOut = Literal["both_safe", "neither_safe", "contradictory", "identical"]
"""Why a flagged row, right in itself, is no pair: nothing in it is unsafe; nothing is safe; `safer_response_id` names the
response that the flags call unsafe; both responses are the same text."""


@dataclass(frozen=True)
class Preference:
    """The same prompt answered in a safe (`chosen`) and in an unsafe way (`rejected`)."""

    line: int
    """Number of its row in the data."""
    prompt: str | Messages
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Prompt:
    """One row of an anchor file; an answer in it is ignored."""

    line: int
    prompt: str | Messages


@dataclass(frozen=True)
class Shape:
    """`parse` makes a row into a pair, or says why it is left out; it raises ValueError for a row that is not in order."""

    columns: tuple[str, ...]
    marks: tuple[str, ...]
    """Columns of which one is enough to know the shape."""
    parse: Callable[[int, Mapping[str, Any]], Preference | LeftOut]


def shape_of(columns: set[str]) -> Shape | None:
    """The shape of data with these columns."""
    return next((shape for shape in SHAPES if columns & set(shape.marks)), None)


def parse_prompt(line: int, row: Mapping[str, Any]) -> Prompt:
    """A prompt without an answer: text, or messages that end with a user's turn (an assistant's last turn is dropped)."""
    column = next((c for c in PROMPT_COLUMNS if row.get(c) is not None), None)
    if column is None:
        raise ValueError(f"no {', '.join(map(repr, PROMPT_COLUMNS))}")
    value = row[column]
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{column} is empty")
        return Prompt(line, value)
    messages = _messages(value, column)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        raise ValueError(f"{column} do not end with a user's turn")
    return Prompt(line, messages)


def as_messages(prompt: str | Messages) -> Messages:
    """A text is one user's turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


class _Problems(list[str]):
    """What is wrong with one row: all of it, not the first only."""

    def unless(self, work: Callable[..., T], *arguments: Any) -> T | None:
        """What `work` returns; None, and a problem more, when it finds one."""
        try:
            return work(*arguments)
        except ValueError as error:
            self.append(str(error))
            return None

    def told(self) -> ValueError:
        return ValueError(", ".join(self))


def _pair(line: int, row: Mapping[str, Any]) -> Preference:
    """Messages of `chosen` and `rejected` may repeat the prompt, which may then be left out."""
    problems = _Problems()
    prompt = problems.unless(_given_prompt, row)
    texts: dict[str, str] = {}
    for key in ("chosen", "rejected"):
        found = problems.unless(_response, row, key)
        if found is None:
            continue
        texts[key], before = found
        prompt = prompt if prompt is not None or problems else before or None
        if before and prompt is not None and before != as_messages(prompt):
            problems.append(f"the messages of {key} before its answer are not the prompt")
    if prompt is None and not problems:
        problems.append("no 'prompt'")
    if len(texts) == 2 and texts["chosen"] == texts["rejected"]:
        problems.append("chosen and rejected are identical")
    if problems or prompt is None:
        raise problems.told()
    return Preference(line, prompt, texts["chosen"], texts["rejected"])


def _flagged(line: int, row: Mapping[str, Any]) -> Preference | LeftOut:
    """A pair if exactly one of the two responses is safe."""
    problems = _Problems()
    prompt = problems.unless(_required_prompt, row)
    responses = [problems.unless(_text, row, f"response_{i}") for i in (0, 1)]
    safe = [problems.unless(_flag, row, f"is_response_{i}_safe") for i in (0, 1)]
    safer = problems.unless(_safer, row)
    first, second = responses
    if problems or prompt is None or first is None or second is None:
        raise problems.told()
    if first == second:
        return "identical"
    if safe[0] == safe[1]:
        return "both_safe" if safe[0] else "neither_safe"
    if safer is not None and not safe[safer]:
        return "contradictory"
    return Preference(line, prompt, *((first, second) if safe[0] else (second, first)))


def _ordered(line: int, row: Mapping[str, Any]) -> Preference:
    problems = _Problems()
    prompt = problems.unless(_required_prompt, row)
    responses = row.get("response")
    if not isinstance(responses, list) or len(responses) != 2 or not all(isinstance(r, str) for r in responses):
        problems.append("response is not a list of two texts, the safer one first")
    else:
        problems += ["a response is empty"] if not all(r.strip() for r in responses) else []
        problems += ["the two responses are identical"] if responses[0] == responses[1] else []
    if problems or prompt is None:
        raise problems.told()
    assert isinstance(responses, list)
    return Preference(line, prompt, responses[0], responses[1])


SHAPES: Sequence[Shape] = (
    Shape(("prompt", "chosen", "rejected"), ("chosen", "rejected"), _pair),
    Shape(
        ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe"),
        ("response_0", "response_1"),
        _flagged,
    ),
    Shape(("prompt", "response"), ("response",), _ordered),
)


def _messages(value: Any, key: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key} is neither text nor a list of messages")
    for message in value:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"{key} holds a message without a text role and content")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _response(row: Mapping[str, Any], key: str) -> tuple[str, Messages]:
    """The response text and the messages before it."""
    if isinstance(row.get(key), str) or row.get(key) is None:
        return _text(row, key), []
    *before, last = _messages(row[key], key)
    if last["role"] != "assistant":
        raise ValueError(f"{key} does not end with an assistant message")
    return _text({key: last["content"]}, key), before


def _given_prompt(row: Mapping[str, Any]) -> str | Messages | None:
    value = row.get("prompt")
    if value is None:
        return None
    return _text(row, "prompt") if isinstance(value, str) else _messages(value, "prompt")


def _required_prompt(row: Mapping[str, Any]) -> str | Messages:
    prompt = _given_prompt(row)
    if prompt is None:
        raise ValueError("no 'prompt'")
    return prompt


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        raise ValueError(f"no {key!r}")
    if not isinstance(value, str):
        raise ValueError(f"{key} is not text but {type(value).__name__}")  # noqa: TRY004 - one kind of problem
    if not value.strip():
        raise ValueError(f"{key} is empty")
    return value


def _flag(row: Mapping[str, Any], key: str) -> bool:
    """True or false, as JSON and parquet have it or as CSV writes it."""
    value = row.get(key)
    if value is None:
        raise ValueError(f"no {key!r}")
    known = {"true": True, "1": True, "false": False, "0": False}
    if str(value).strip().lower() not in known:
        raise ValueError(f"{key} is {value!r}, neither true nor false")
    return known[str(value).strip().lower()]


def _safer(row: Mapping[str, Any]) -> int | None:
    """Which response the row calls the safer one, where it does."""
    value = row.get("safer_response_id")
    if value is None:
        return None
    if str(value).strip() not in ("0", "1"):
        raise ValueError(f"safer_response_id is {value!r}, neither 0 nor 1")
    return int(value)
