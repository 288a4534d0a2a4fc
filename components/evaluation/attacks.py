"""Ways to put a request that make a model forget its refusals: what a set's prompts become before they are asked.

All are plain text around the request, no search and no gradients. Suffix and chain of thought as in https://arxiv.org/abs/2405.09055;
a begun answer as in https://arxiv.org/abs/2406.05946 ("prefilling"); role templates and earlier turns are the user's own files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from components.errors import DataError, listed
from components.evaluation.conversations import Message, Prompt, conversation
from components.evaluation.settings import Attack
from components.rows import read_rows, require_readable

PLACE = "{prompt}"
"""Where a template has the request."""
_THINK = "Let's think step by step."


def attacked(prompts: tuple[Prompt, ...], attack: Attack, *, root: Path | None = None) -> tuple[Prompt, ...]:
    """The prompts as the attack puts them, in their order; with several templates each prompt with each, ids `ID/TEMPLATE`.
    Relative paths are taken from `root`. Raises DataError that lists everything wrong with a file."""
    wrap = _WAYS[attack.kind]
    found = wrap(prompts, attack, root or Path())
    twice = [name for name, n in Counter(one.id for one in found).items() if n > 1]
    if twice:
        raise DataError(
            f"attack {attack.kind}: ids that are used more than once: {listed(twice)}; rename templates or prompts"
        )
    return found


def _begun(prompts: tuple[Prompt, ...], attack: Attack, root: Path) -> tuple[Prompt, ...]:
    del root
    return tuple(replace(one, begun=attack.text or "Sure,") for one in prompts)


def _suffixed(prompts: tuple[Prompt, ...], attack: Attack, root: Path) -> tuple[Prompt, ...]:
    del root
    return tuple(_asking(one, f"{one.text} {attack.text}") for one in prompts)


def _thinking(prompts: tuple[Prompt, ...], attack: Attack, root: Path) -> tuple[Prompt, ...]:
    del root
    return tuple(_asking(one, f"{one.text}\n{attack.text or _THINK}") for one in prompts)


def _in_roles(prompts: tuple[Prompt, ...], attack: Attack, root: Path) -> tuple[Prompt, ...]:
    assert attack.path is not None
    path = root / attack.path
    rows = read_rows(path)
    require_readable(path, rows)
    problems, templates = [], {}
    for number, row in enumerate(rows, start=1):
        text = row.fields.get("template") or row.fields.get("prompt")
        name = str(row.fields.get("name") or row.fields.get("id") or number)
        if not isinstance(text, str) or PLACE not in text:
            problems.append(f"{row.where}: a template is text with {PLACE} in it")
        elif name in templates:
            problems.append(f"{row.where}: another template is called {name!r}")
        else:
            templates[name] = text
    if problems or not templates:
        raise DataError(f"role templates {path}: {listed(problems) if problems else 'the file has no rows'}")
    return tuple(
        replace(_asking(one, text.replace(PLACE, one.text)), id=f"{one.id}/{name}")
        for one in prompts
        for name, text in templates.items()
    )


def _with_system(prompts: tuple[Prompt, ...], attack: Attack, root: Path) -> tuple[Prompt, ...]:
    del root
    empty = [one.id for one in prompts if all(m["role"] == "system" for m in one.messages)]
    if empty:
        raise DataError(f"attack system: prompts that are nothing but a system message: {listed(empty)}; drop them")
    stated: tuple[Message, ...] = ({"role": "system", "content": attack.text},) if attack.text else ()
    return tuple(
        replace(
            one,
            messages=(*stated, *(m for m in one.messages if m["role"] != "system")),
            bare=not attack.text or one.bare,
        )
        for one in prompts
    )


def _after_turns(prompts: tuple[Prompt, ...], attack: Attack, root: Path) -> tuple[Prompt, ...]:
    assert attack.path is not None
    path = root / attack.path
    rows = read_rows(path)
    require_readable(path, rows)
    turns: list[Message] = []
    for row in rows:
        messages, problem = conversation(row.fields.get("messages"), "messages", answered=True)
        if problem:
            raise DataError(f"earlier turns {path}: {row.where}: {problem}")
        turns += messages
    if not turns or turns[-1]["role"] != "assistant":
        raise DataError(f"earlier turns {path}: give messages that end with the assistant's")
    return tuple(_led_by(one, tuple(turns)) for one in prompts)


def _led_by(prompt: Prompt, turns: tuple[Message, ...]) -> Prompt:
    """Behind the prompt's own system message."""
    own = 1 if prompt.messages[0]["role"] == "system" else 0
    return replace(prompt, messages=(*prompt.messages[:own], *turns, *prompt.messages[own:]))


def _asking(prompt: Prompt, text: str) -> Prompt:
    return replace(prompt, messages=(*prompt.messages[:-1], {**prompt.messages[-1], "content": text}))


_WAYS: Mapping[str, Callable[[tuple[Prompt, ...], Attack, Path], tuple[Prompt, ...]]] = {
    "prefix": _begun,
    "suffix": _suffixed,
    "chain_of_thought": _thinking,
    "roles": _in_roles,
    "system": _with_system,
    "turns": _after_turns,
}
