"""The utility anchor's targets: what the finetune itself answers to unlabelled prompts, and how sure it was of each
token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from components.evaluation.decode import end_tokens, greedy, pad_token
from components.masks.objective import Teacher, score, teach
from components.masks.preferences import Row

GENERATE_BATCH = 64
"""Prompts answered at once."""
SCORE_BATCH = 64
"""Rows scored at once outside training."""


@dataclass(frozen=True)
class Anchor:
    """A prompt with the finetune's answer and its distributions over it."""

    row: Row
    teacher: Teacher


def answer(model: Any, tokenizer: Any, prompts: Sequence[tuple[int, ...]], new_tokens: int) -> list[Row]:
    """Greedy answers with their end token, of at most `new_tokens` tokens. The order of the prompts is kept."""
    ends = end_tokens(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    rows: dict[int, Row] = {}
    for at in range(0, len(order), GENERATE_BATCH):
        chunk = order[at : at + GENERATE_BATCH]
        made = greedy(
            model=model,
            prompts=[prompts[i] for i in chunk],
            pad=pad_token(tokenizer, ends),
            ends=ends,
            max_new_tokens=new_tokens,
        )
        for i, one in zip(chunk, made, strict=True):
            end = () if one.end_token is None else (one.end_token,)
            rows[i] = Row((*prompts[i], *one.tokens, *end), len(prompts[i]))
    return [rows[i] for i in range(len(prompts))]


@torch.no_grad()
def teachers(model: Any, rows: Sequence[Row], *, full_vocabulary: int, top_k: int) -> list[Teacher]:
    """The model's own distributions over the responses of `rows`, as much of them as is kept."""
    kept: dict[int, Teacher] = {}
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].tokens), i))
    for at in range(0, len(order), SCORE_BATCH):
        chunk = order[at : at + SCORE_BATCH]
        each = score(model, [rows[i] for i in chunk]).each()
        for place, i in enumerate(chunk):
            # A copy of its own: a view would keep the whole chunk's log-probabilities alive.
            kept[i] = teach(each[place].clone(), full_vocabulary=full_vocabulary, top_k=top_k)
    return [kept[i] for i in range(len(rows))]


@torch.no_grad()
def sequence_log_probs(model: Any, rows: Sequence[Row]) -> torch.Tensor:
    """log π(response | prompt) of each row under the weights the model holds now: [R]."""
    found = torch.zeros(len(rows), dtype=torch.float64)
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].tokens), i))
    for at in range(0, len(order), SCORE_BATCH):
        chunk = order[at : at + SCORE_BATCH]
        found[chunk] = score(model, [rows[i] for i in chunk]).sequences().double().cpu()
    return found
