"""The utility anchor's targets: what the finetune itself answers to unlabelled prompts, and how sure it was of each
token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

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


def _eos_ids(model: Any, tokenizer: Any) -> set[int]:
    declared = getattr(model.generation_config, "eos_token_id", None)
    ids = set(declared if isinstance(declared, list) else [declared]) | {tokenizer.eos_token_id}
    return {int(i) for i in ids if i is not None}


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompts: Sequence[tuple[int, ...]], new_tokens: int) -> list[Row]:
    """Greedy answers, ended by an end-of-turn token or after `new_tokens`. The order of the prompts is kept."""
    from transformers import GenerationConfig

    ends = _eos_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    plan = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=sorted(ends) or None, use_cache=True
    )
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    rows: dict[int, Row] = {}
    for at in range(0, len(order), GENERATE_BATCH):
        chunk = order[at : at + GENERATE_BATCH]
        longest = max(len(prompts[i]) for i in chunk)
        ids = torch.tensor([[pad] * (longest - len(prompts[i])) + list(prompts[i]) for i in chunk], device=device)
        real = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in chunk], device=device)
        out = model.generate(input_ids=ids, attention_mask=real, generation_config=plan)
        for i, tokens in zip(chunk, out[:, longest:].tolist(), strict=True):
            stop = next((n + 1 for n, token in enumerate(tokens) if token in ends), len(tokens))
            rows[i] = Row((*prompts[i], *tokens[:stop]), len(prompts[i]))
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
