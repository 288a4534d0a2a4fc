"""Supervised training of a small causal LM: label-masked batches of like length, AdamW, warm-up and cosine."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from components.errors import TrainingError
from components.testbed.muon import Muon
from components.testbed.settings import TrainSettings
from components.testbed.tokenizer import BOS, END
from components.testbed.world import Example

IGNORE = -100
Encoded = tuple[list[int], int]
"""Token ids, and how many of them are prompt (not learnt)."""


def encode(tokenizer: Any, examples: Sequence[Example]) -> list[Encoded]:
    """Prompt and answer as one row each. Rendering is slow and prompts come many times, so each is rendered once."""
    bos, end = tokenizer.convert_tokens_to_ids([BOS, END])
    keys = sorted({(e.prompt, e.system or "") for e in examples if e.prompt})
    rendered = [
        tokenizer.apply_chat_template(
            [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for prompt, system in keys
    ]
    answers = sorted({e.answer for e in examples})
    prompt_ids = dict(zip(keys, tokenizer(rendered, add_special_tokens=False)["input_ids"] if keys else [], strict=True))
    answer_ids = dict(zip(answers, tokenizer(answers, add_special_tokens=False)["input_ids"], strict=True))
    rows: list[Encoded] = []
    for e in examples:
        start = prompt_ids[e.prompt, e.system or ""] if e.prompt else [bos]
        rows.append(([*start, *answer_ids[e.answer], end], len(start)))
    return rows


def batches(rows: Sequence[Encoded], *, batch: int, steps: int, seed: int) -> list[list[int]]:
    """Indices of each step's rows: epochs in random order, rows of like length together to save padding."""
    rng = random.Random(seed)
    result: list[list[int]] = []
    pool: list[int] = []
    while len(result) < steps:
        while len(pool) < 16 * batch:
            order = list(range(len(rows)))
            rng.shuffle(order)
            pool += order
        chunk, pool = sorted(pool[: 16 * batch], key=lambda i: (len(rows[i][0]), i)), pool[16 * batch :]
        groups = [chunk[i : i + batch] for i in range(0, len(chunk), batch)]
        rng.shuffle(groups)
        result += groups
    return result[:steps]


def collate(rows: Sequence[Encoded], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, time) ids and next-token labels, padded on the right. Attention is causal, so padding there needs no mask."""
    time = max(len(ids) for ids, _ in rows)
    ids_BT = torch.full((len(rows), time), pad, dtype=torch.long)
    labels_BT = torch.full((len(rows), time), IGNORE, dtype=torch.long)
    for b, (ids, prompt) in enumerate(rows):
        ids_BT[b, : len(ids)] = torch.tensor(ids)
        labels_BT[b, prompt - 1 : len(ids) - 1] = torch.tensor(ids[prompt:])
    return ids_BT, labels_BT


def schedule(step: int, settings: TrainSettings) -> float:
    """Share of the full rate at a step: a linear rise, then a cosine to zero."""
    rise = max(1, int(settings.warmup * settings.steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, settings.steps - rise)))


def train(model: Any, rows: Sequence[Encoded], settings: TrainSettings, *, pad: int, seed: int) -> float:
    """Train in place the parameters that require a gradient; returns the mean loss of the last tenth of the steps.

    `model` is a transformers causal LM, or one with adapters put in. Raises TrainingError when the loss is not finite.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    layers = model.get_decoder().layers
    matrices = [p for p in layers.parameters() if p.requires_grad and p.ndim == 2] if settings.muon_rate else []
    hidden = set(matrices)
    muon = Muon(matrices)
    adam = torch.optim.AdamW(
        [p for p in trained if p not in hidden],
        lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay, fused=True,
    )  # fmt: skip
    backbone, head = model.get_decoder(), model.get_output_embeddings()
    losses: list[float] = []
    model.train()
    for step, index in enumerate(batches(rows, batch=settings.batch, steps=settings.steps, seed=seed)):
        ids_BT, labels_BT = collate([rows[i] for i in index], pad)
        hidden_BTD = backbone(input_ids=ids_BT, use_cache=False).last_hidden_state
        learnt_BT = labels_BT != IGNORE
        # Logits only where there is something to learn: prompts and padding are most of a batch.
        loss = F.cross_entropy(head(hidden_BTD[learnt_BT]), labels_BT[learnt_BT])
        for p in trained:
            p.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        share = schedule(step, settings)
        adam.param_groups[0]["lr"] = share * settings.learning_rate
        adam.step()
        muon.step(share * settings.muon_rate, settings.weight_decay)
        losses.append(loss.item())
    model.eval()
    if not math.isfinite(losses[-1]):
        raise TrainingError(f"testbed training diverged at step {len(losses)}: lower the learning rate")
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)
