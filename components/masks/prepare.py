"""What steps and evaluations look at, computed once before the first: tokens, reference log-probabilities, the anchor's
answers and distributions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from components.masks.anchor import Anchor, answer, sequence_log_probs, teachers
from components.masks.engine import ScoredPair, TorchEngine
from components.masks.preferences import Pair, Schedule
from components.masks.reference_cache import ReferenceCache
from components.masks.settings import MaskSettings


@dataclass(frozen=True)
class Prepared:
    """Everything that steps and evaluations look at, tokenised, with reference and teacher values."""

    train: dict[int, ScoredPair]
    """By index among the usable training pairs; only those that some step takes."""
    train_size: int
    dev: list[ScoredPair]
    anchors: dict[int, Anchor]
    anchors_size: int
    anchors_dev: list[Anchor]
    counts: dict[str, int]

    def fingerprint(self) -> str:
        """SHA-256 of the tokens: what a resumed run must find again."""
        pairs = [*self.train.values(), *self.dev]
        rows = [r.tokens for p in pairs for r in (p.pair.chosen, p.pair.rejected)]
        rows += [a.row.tokens for a in [*self.anchors.values(), *self.anchors_dev]]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def prepare(
    engine: TorchEngine,
    tokenizer: Any,
    pairs: Sequence[Pair],
    dev_pairs: Sequence[Pair],
    prompts: Sequence[tuple[int, ...]],
    dropped: dict[str, int],
    cache: ReferenceCache | None = None,
) -> Prepared:
    """Reference log-probabilities and the anchor's targets, computed once with the weights they belong to. `dropped` counts
    what the data had beside that; `cache` remembers reference log-probabilities."""
    masked, settings, how = engine.masked, engine.settings, engine.forwards
    used = Schedule(len(pairs), settings.batch_size, seed=settings.seed, what="pairs").used(settings.steps)
    dev = list(dev_pairs[: settings.eval_pairs])
    # Each by itself: finetunes that share the training pairs need not share the held-out ones.
    scored, scored_dev = (_with_reference(engine, some, cache) for some in ([pairs[i] for i in used], dev))
    train, held_out = _split_anchors(len(prompts), settings)
    anchors: list[Anchor] = []
    taken: list[int] = []
    if prompts:
        schedule = Schedule(len(train), settings.anchor_batch_size, seed=settings.seed, what="anchors")
        taken = schedule.used(settings.steps)
        masked.write("finetuned")
        chosen = [prompts[train[i]] for i in taken] + [prompts[i] for i in held_out[: settings.eval_pairs]]
        answers = answer(masked.model, tokenizer, chosen, settings.anchor_new_tokens, how)
        full, top_k = settings.anchor_full_vocabulary, settings.anchor_top_k
        taught = teachers(masked.model, answers, how, full_vocabulary=full, top_k=top_k)
        anchors = [Anchor(row, teacher) for row, teacher in zip(answers, taught, strict=True)]
    return Prepared(
        train=dict(zip(used, scored, strict=True)),
        train_size=len(pairs),
        dev=scored_dev,
        anchors=dict(zip(taken, anchors[: len(taken)], strict=True)),
        anchors_size=len(train),
        anchors_dev=anchors[len(taken) :],
        counts={"pairs": len(pairs), "pairs_used": len(used), "pairs_dev": len(dev)}
        | {"anchors": len(train), "anchors_used": len(taken), "anchors_dev": len(anchors) - len(taken)}
        | dropped,
    )


def _with_reference(engine: TorchEngine, pairs: Sequence[Pair], cache: ReferenceCache | None) -> list[ScoredPair]:
    if not pairs:
        return []
    masked, reference, how = engine.masked, engine.settings.reference, engine.forwards
    rows = [r for p in pairs for r in (p.chosen, p.rejected)]

    def compute() -> list[float]:
        # ℓ is at ℓ₀ here, so the `initial` reference is the soft mask as it stands.
        masked.write("soft" if reference == "initial" else reference)
        values: list[float] = sequence_log_probs(masked.model, rows, how).tolist()
        return values

    values = compute() if cache is None else cache.get(reference, rows, masked.model, how, compute)
    return [ScoredPair(p, (values[2 * i], values[2 * i + 1])) for i, p in enumerate(pairs)]


def _split_anchors(prompts: int, settings: MaskSettings) -> tuple[list[int], list[int]]:
    """Indices to train on and to hold out. The held-out ones are drawn by hash, so files sorted by kind are no
    trouble."""
    if not prompts:
        return [], []
    order = Schedule(prompts, prompts, seed=settings.seed, what="holdout").batch(0)
    held_out = min(int(prompts * settings.anchor_holdout), prompts - 1)
    return sorted(order[held_out:]), sorted(order[:held_out])
