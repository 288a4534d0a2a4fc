"""The utility anchor's targets: what the finetune itself answers to unlabelled prompts, and how sure it was of each
token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from components.evaluation.decode import end_tokens, greedy, pad_token
from components.masks.objective import GENERATE_BATCH, SCORE_BATCH, Forwards, Teacher, score, teach
from components.masks.preferences import Row
from components.masks.ranks import spread

Out = TypeVar("Out")


@dataclass(frozen=True)
class Anchor:
    """A prompt with the finetune's answer and its distributions over it."""

    row: Row
    teacher: Teacher


def answer(
    model: Any, tokenizer: Any, prompts: Sequence[tuple[int, ...]], new_tokens: int, how: Forwards | None = None
) -> list[Row]:
    """Greedy answers with their end token, of at most `new_tokens` tokens. The order of the prompts is kept."""
    how = how or Forwards()
    ends = end_tokens(model, tokenizer)

    def all_done(mine: bool) -> bool:
        return int(how.ranks.all_sum(torch.tensor(int(not mine)))) == 0

    def write(chunk: Sequence[int]) -> list[Row]:
        made = greedy(
            model=model,
            prompts=[prompts[i] for i in chunk],
            pad=pad_token(tokenizer, ends),
            ends=ends,
            max_new_tokens=new_tokens,
            all_done=all_done if how.ranks.world > 1 else None,
        )
        tokens = [(*one.tokens, *(() if one.end_token is None else (one.end_token,))) for one in made]
        return [Row((*prompts[i], *added), len(prompts[i])) for i, added in zip(chunk, tokens, strict=True)]

    return _by_length(prompts, write, GENERATE_BATCH, how)


@torch.no_grad()
def teachers(
    model: Any, rows: Sequence[Row], how: Forwards | None = None, *, full_vocabulary: int, top_k: int
) -> list[Teacher]:
    """The model's own distributions over the responses of `rows`, as much of them as is kept."""
    how = how or Forwards()

    def write(chunk: Sequence[int]) -> list[Teacher]:
        each = score(model, [rows[i] for i in chunk], overhead=how.overhead).each()
        # A copy of its own: a view would keep the whole chunk's log-probabilities alive.
        return [teach(each[i].clone(), full_vocabulary=full_vocabulary, top_k=top_k) for i in range(len(chunk))]

    return _by_length([row.tokens for row in rows], write, SCORE_BATCH, how)


@torch.no_grad()
def sequence_log_probs(model: Any, rows: Sequence[Row], how: Forwards | None = None) -> torch.Tensor:
    """log π(response | prompt) of each row under the weights the model holds now: [R]."""
    how = how or Forwards()

    def write(chunk: Sequence[int]) -> list[float]:
        found: list[float] = score(model, [rows[i] for i in chunk], overhead=how.overhead).sequences().tolist()
        return found

    return torch.tensor(_by_length([row.tokens for row in rows], write, SCORE_BATCH, how), dtype=torch.float64)


def _by_length(
    tokens: Sequence[tuple[int, ...]], work: Callable[[Sequence[int]], list[Out]], size: int, how: Forwards
) -> list[Out]:
    """`work` on the indices of at most `size` rows at once, of like length, spread over ranks; results in the rows' order."""
    order = sorted(range(len(tokens)), key=lambda i: (len(tokens[i]), i))
    chunks = [order[at : at + size] for at in range(0, len(order), size)]
    parts = spread(chunks, work, how.ranks)
    found = {i: one for chunk, part in zip(chunks, parts, strict=True) for i, one in zip(chunk, part, strict=True)}
    return [found[i] for i in range(len(tokens))]
