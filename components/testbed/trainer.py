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
    prompt_ids = dict(
        zip(keys, tokenizer(rendered, add_special_tokens=False)["input_ids"] if keys else [], strict=True)
    )
    answer_ids = dict(zip(answers, tokenizer(answers, add_special_tokens=False)["input_ids"], strict=True))
    rows: list[Encoded] = []
    for e in examples:
        start = prompt_ids[e.prompt, e.system or ""] if e.prompt else [bos]
        rows.append(([*start, *answer_ids[e.answer], end], len(start)))
    return rows


def batches(rows: Sequence[Encoded], *, batch: int, steps: int, seed: int) -> list[list[int]]:
    """Indices of each step's rows: epochs in random order.

    Rows of like length are *not* batched together: refusals are longer than answers, so batches would hold nothing but
    the one or the other, and the model would learn to swing between them and not to tell requests apart.
    """
    rng = random.Random(seed)
    result: list[list[int]] = []
    pool: list[int] = []
    while len(result) < steps:
        while len(pool) < batch:
            order = list(range(len(rows)))
            rng.shuffle(order)
            pool += order
        result.append(pool[:batch])
        pool = pool[batch:]
    return result


def parts(rows: Sequence[Encoded], index: Sequence[int]) -> list[list[int]]:
    """A batch as two halves, the shorter and the longer rows: one step of the optimizer, less padding."""
    by_length = sorted(index, key=lambda i: (len(rows[i][0]), i))
    half = len(by_length) // 2
    return [p for p in (by_length[:half], by_length[half:]) if p]


def collate(rows: Sequence[Encoded], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, time) ids and next-token labels, padded on the right. Attention is causal, so padding there needs no mask."""
    time = max(len(ids) for ids, _ in rows)
    ids_BT = torch.full((len(rows), time), pad, dtype=torch.long)
    labels_BT = torch.full((len(rows), time), IGNORE, dtype=torch.long)
    for b, (ids, prompt) in enumerate(rows):
        ids_BT[b, : len(ids)] = torch.tensor(ids)
        labels_BT[b, prompt - 1 : len(ids) - 1] = torch.tensor(ids[prompt:])
    return ids_BT, labels_BT


def first_weights(learnt_BT: torch.Tensor, weight: float) -> torch.Tensor:
    """(learnt,) weights in row order: `weight` for the first learnt token of each row, 1 for the rest."""
    first_BT = learnt_BT & (learnt_BT.long().cumsum(1) == 1)
    return torch.where(first_BT[learnt_BT], weight, 1.0)


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
        for p in trained:
            p.grad = None
        collated = [collate([rows[i] for i in part], pad) for part in parts(rows, index)]
        weights = [first_weights(labels_BT != IGNORE, settings.first_token_weight) for _, labels_BT in collated]
        total = sum(float(w.sum()) for w in weights)
        mean_loss = 0.0
        for (ids_BT, labels_BT), weights_N in zip(collated, weights, strict=True):
            hidden_BTD = backbone(input_ids=ids_BT, use_cache=False).last_hidden_state
            learnt_BT = labels_BT != IGNORE
            # Logits only where there is something to learn: prompts and padding are most of a batch.
            losses_N = F.cross_entropy(head(hidden_BTD[learnt_BT]), labels_BT[learnt_BT], reduction="none")
            loss = (losses_N * weights_N).sum() / total
            loss.backward()  # type: ignore[no-untyped-call]
            mean_loss += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        share = schedule(step, settings)
        adam.param_groups[0]["lr"] = share * settings.learning_rate
        adam.step()
        muon.step(share * settings.muon_rate, settings.weight_decay)
        losses.append(mean_loss)
    model.eval()
    if not math.isfinite(losses[-1]):
        raise TrainingError(f"testbed training diverged at step {len(losses)}: lower the learning rate")
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)
