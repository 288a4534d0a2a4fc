"""What the published code of the safety landscape does at a line, written anew: the other side of `benchmarks.landscape`.

Three fp32 copies of the weights on the CPU beside the model (origin, walked weights, direction); the weights walk by repeated
additions of a step; `load_state_dict` at every point; `generate` in batches of 4, padded on the left, every answer to its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch

BATCH = 4
"""As its configuration has it."""


def walk(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    direction: dict[str, torch.Tensor],
    *,
    points: int,
    new_tokens: int,
) -> Iterator[list[str]]:
    """The answers at each point from −0.5 to 0.5 of a direction; the model is left at the last."""
    origin = deepcopy(model.state_dict())
    weights, steps = deepcopy(origin), {name: d / (points - 1) for name, d in direction.items()}
    for name, step in steps.items():
        weights[name] -= step * (points - 1) / 2
    for k in range(points):
        model.load_state_dict(weights)
        yield _answers(model, tokenizer, texts, new_tokens)
        if k < points - 1:
            for name, step in steps.items():
                weights[name] += step


@torch.no_grad()
def _answers(model: Any, tokenizer: Any, texts: Sequence[str], new_tokens: int) -> list[str]:
    answers: list[str] = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(
            list(texts[start : start + BATCH]),
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        )
        found = model.generate(
            **batch, max_new_tokens=new_tokens, do_sample=False, use_cache=True, pad_token_id=tokenizer.eos_token_id
        )
        own = found[:, batch["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(own, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return answers
