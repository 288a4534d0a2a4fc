"""What a mask is trained on: sigmoid DPO against cached reference log-probabilities, and a KL anchor to the finetune.

Shapes: R rows (sequences), N response tokens of all rows together, V vocabulary, K = k kept teacher tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F

from components.masks.preferences import Row
from components.masks.ranks import ALONE, Ranks
from components.masks.settings import PreferenceLoss

GROUP_OVERHEAD = 200
"""Padding tokens worth saving by one more forward call when rows are grouped by length."""
GENERATE_BATCH = 64
"""Prompts answered at once."""
SCORE_BATCH = 64
"""Rows scored at once outside training."""
EVALUATE_BATCH = 32
"""Pairs scored at once in an evaluation."""


@dataclass(frozen=True)
class Forwards:
    """How a model's forwards are made: by which ranks, and what one more is worth (see `length_groups`). Where a forward is a
    collective, every rank must make as many: one for each batch, padded as it is."""

    ranks: Ranks = ALONE
    overhead: int = GROUP_OVERHEAD


ONE = 1 << 40
"""An overhead at which rows are never grouped."""


@dataclass(frozen=True)
class Teacher:
    """The finetune's distribution at each of a row's n response tokens. Whole vocabulary: `log_probs` [n, V] and no
    `indices`; otherwise the top k, `log_probs` and `indices` [n, K], and the rest as one more outcome, `tail` [n] (log
    of its mass)."""

    log_probs: torch.Tensor
    indices: torch.Tensor | None = None
    tail: torch.Tensor | None = None


def length_groups(lengths: Sequence[int], overhead: int = GROUP_OVERHEAD) -> list[list[int]]:
    """Split rows into groups of similar length: least padded tokens + `overhead` per group (dynamic programme over the
    rows in order of length). Deterministic; every row appears once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    best: list[tuple[int, int]] = [(0, 0)]
    for end in range(1, len(order) + 1):
        best.append(min((best[b][0] + overhead + lengths[order[b]] * (end - b), b) for b in range(end)))
    groups, end = [], len(order)
    while end:
        start = best[end][1]
        groups.append(order[start:end])
        end = start
    return groups[::-1]


@contextmanager
def _only_positions(head: torch.nn.Module | None, row: torch.Tensor, column: torch.Tensor) -> Iterator[None]:
    """While open, the output head sees the hidden states at (row, column) only, as one sequence: [B, T, D] -> [1, N,
    D]. What a model does to logits afterwards (scaling, soft-capping) is by element and does not notice."""
    if head is None:
        yield
        return

    def select(_module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][row, column].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def _group_log_probs(model: Any, rows: Sequence[Row]) -> torch.Tensor:
    """log π over the vocabulary at each response token of the rows, in their order: [N, V] fp32 (or wider)."""
    longest = max(len(r.tokens) for r in rows) - 1  # the last token predicts nothing that is scored
    device = next(model.parameters()).device
    # Padded on the right: no real token attends to a pad, so no attention mask is needed and pads may be any token.
    ids = torch.tensor(
        [[*r.tokens[:-1], *([r.tokens[0]] * (longest + 1 - len(r.tokens)))] for r in rows], device=device
    )
    row = torch.tensor([i for i, r in enumerate(rows) for _ in range(r.response)], device=device)
    column = torch.tensor([c for r in rows for c in range(r.prompt - 1, len(r.tokens) - 1)], device=device)
    with _only_positions(model.get_output_embeddings(), row, column):
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    chosen = logits[0] if logits.shape[:2] == (1, len(row)) else logits[row, column]
    return torch.log_softmax(chosen.float() if chosen.dtype.itemsize < 4 else chosen, dim=-1)


@dataclass(frozen=True)
class Scored:
    """Response tokens of R rows, row after row in the order `order`: `log_probs` [N, V], `row` and `target` [N]."""

    log_probs: torch.Tensor
    row: torch.Tensor
    target: torch.Tensor
    order: tuple[int, ...]

    def sequences(self) -> torch.Tensor:
        """log π(response | prompt) of each row, in the rows' own order: [R]."""
        picked = self.log_probs.gather(1, self.target[:, None])[:, 0]
        return picked.new_zeros(len(self.order)).index_add(0, self.row, picked)

    def each(self) -> dict[int, torch.Tensor]:
        """The [n, V] log-probabilities of each row, by its index."""
        sizes = torch.bincount(self.row)[list(self.order)].tolist()
        parts = torch.split(self.log_probs, sizes)
        return dict(zip(self.order, parts, strict=True))


def score(model: Any, rows: Sequence[Row], *, overhead: int = GROUP_OVERHEAD) -> Scored:
    """log π over the vocabulary at every response token. Rows of similar length share a forward call."""
    groups = length_groups([len(r.tokens) for r in rows], overhead)
    log_probs = torch.cat([_group_log_probs(model, [rows[i] for i in group]) for group in groups])
    order = [i for group in groups for i in group]
    row = torch.tensor([i for i in order for _ in range(rows[i].response)], device=log_probs.device)
    target = torch.tensor([t for i in order for t in rows[i].tokens[rows[i].prompt :]], device=log_probs.device)
    return Scored(log_probs, row, target, tuple(order))


def preference_losses(
    policy: torch.Tensor, reference: torch.Tensor, *, loss: PreferenceLoss, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and reward margins [P] from log-probabilities [P, 2] of (chosen, rejected).

    With h the difference of the two log-ratios: sigmoid −log σ(βh) (DPO, arXiv 2305.18290, eq. 7), hinge max(0, 1 − βh)
    (SLiC, arXiv 2305.10425), ipo (h − 1/(2β))² (arXiv 2310.12036, eq. 17; h summed over tokens, as written there).
    """
    ratio = policy - reference
    difference = ratio[:, 0] - ratio[:, 1]
    margins = beta * difference
    if loss == "ipo":
        return (difference - 1 / (2 * beta)).square(), margins
    return (-F.logsigmoid(margins) if loss == "sigmoid" else F.relu(1 - margins)), margins


def teach(log_probs: torch.Tensor, *, full_vocabulary: int, top_k: int) -> Teacher:
    """What is kept of a teacher's [n, V] log-probabilities."""
    vocabulary = log_probs.shape[-1]
    if vocabulary <= max(full_vocabulary, top_k):
        return Teacher(log_probs)
    values, indices = log_probs.topk(top_k, dim=-1)
    return Teacher(values, indices, _log_rest(values))


def _log_rest(log_probs: torch.Tensor) -> torch.Tensor:
    """log(1 − Σ p) over the last axis, kept finite when nothing is left."""
    tiny = torch.finfo(log_probs.dtype).eps
    return torch.log((1.0 - log_probs.exp().sum(dim=-1)).clamp_min(tiny))


def anchor_kl(scored: Scored, teachers: Mapping[int, Teacher]) -> torch.Tensor:
    """Σ over tokens of KL(teacher ‖ model) in nats, over the rows that have a teacher. With a top-k teacher the
    tokens outside count as one outcome."""
    rows = [i for i in scored.order if i in teachers]
    his = torch.cat([teachers[i].log_probs for i in rows])
    taught = torch.zeros(len(scored.order), dtype=torch.bool, device=scored.row.device)
    taught[rows] = True
    mine = scored.log_probs[taught[scored.row]]
    if teachers[rows[0]].indices is not None:
        top = mine.gather(-1, torch.cat([cast(torch.Tensor, teachers[i].indices) for i in rows]))
        mine = torch.cat((top, _log_rest(top)[:, None]), dim=-1)
        his = torch.cat((his, torch.cat([cast(torch.Tensor, teachers[i].tail) for i in rows])[:, None]), dim=-1)
    return F.kl_div(mine, his.to(mine.dtype), reduction="sum", log_target=True)
