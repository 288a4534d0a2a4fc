"""The mask-training engine: what one optimizer step is, whatever the hardware. `TorchEngine` is one process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from components.errors import StorageError, TrainingError, listed
from components.masks.anchor import Anchor
from components.masks.masked_model import MaskedModel, Weights
from components.masks.objective import anchor_kl, score, sigmoid_dpo
from components.masks.preferences import Pair
from components.masks.settings import MaskSettings

STATE_FILE = "engine.safetensors"
EVALUATE_BATCH = 32
"""Pairs scored at once in an evaluation."""


@dataclass(frozen=True)
class ScoredPair:
    """A preference pair with its reference log-probabilities (chosen, rejected)."""

    pair: Pair
    reference: tuple[float, float]


@dataclass(frozen=True)
class Batch:
    """The examples of one global step, or one of several disjoint shares of them. Losses are sums over a share's examples
    divided by the *whole* batch's counts, so the shares' losses, metrics and gradients add up to those of the batch,
    whoever computes them."""

    step: int
    pairs: tuple[ScoredPair, ...]
    anchors: tuple[Anchor, ...] = ()
    counts: tuple[int, int] | None = None
    """Pairs and answer tokens of the whole batch; None: this is the whole."""

    def totals(self) -> tuple[int, int]:
        """Pairs and answer tokens of the whole batch."""
        return self.counts or (len(self.pairs), sum(a.row.response for a in self.anchors))

    def share(self, index: int, shares: int) -> Batch:
        """One of `shares` parts: every `shares`-th pair and anchor from `index` on."""
        return Batch(self.step, self.pairs[index::shares], self.anchors[index::shares], self.totals())


class Engine(Protocol):
    """What the training loop sees (DESIGN.md)."""

    def step(self, batch: Batch) -> dict[str, float]:
        """One optimizer step; the metrics of its batch. Raises TrainingError when the loss is not finite."""
        ...

    def evaluate(self, batch: Batch, weights: Weights) -> dict[str, float]:
        """The same metrics with fixed weights and no step."""
        ...

    def density(self) -> dict[str, float]:
        """Share of elements that the soft and the binary mask keep."""
        ...

    def save(self, directory: Path) -> None:
        """Write everything that `load` needs to go on exactly, as files in `directory`. Raises StorageError."""
        ...

    def load(self, directory: Path) -> None:
        """Go on from what `save` wrote."""
        ...

    def iter_shards(self) -> Iterator[tuple[str, int, int, torch.Tensor]]:
        """(name, start, stop, logits) until every element of every mask has been given once."""
        ...


@dataclass(frozen=True)
class Losses:
    """What a share adds to its batch's loss (with its graph) and to its metrics."""

    loss: torch.Tensor
    metrics: dict[str, float]


def batch_losses(model: torch.nn.Module, batch: Batch, settings: MaskSettings) -> Losses:
    """Mean DPO loss over pairs + chosen weight × their mean −log π(chosen) + anchor weight × mean KL over answer tokens, all
    rows in as few forwards as pay."""
    pairs, (total_pairs, total_tokens) = batch.pairs, batch.totals()
    rows = [r for p in pairs for r in (p.pair.chosen, p.pair.rejected)] + [a.row for a in batch.anchors]
    scored = score(model, rows)
    policy = scored.sequences()[: 2 * len(pairs)].view(-1, 2)
    reference = torch.tensor([p.reference for p in pairs], dtype=policy.dtype, device=policy.device).view(-1, 2)
    losses, margins = sigmoid_dpo(policy, reference, settings.beta)
    loss = dpo = losses.sum() / total_pairs
    chosen = -policy[:, 0].sum() / total_pairs
    if settings.chosen_weight:
        loss = loss + settings.chosen_weight * chosen
    margins = margins.detach()
    metrics = {
        "dpo_loss": float(dpo.detach()),
        "dpo_accuracy": float((margins > 0).double().sum()) / total_pairs,
        "reward_margin": float(margins.sum()) / total_pairs,
        "chosen_nll": float(chosen.detach()),
    }
    if batch.anchors:
        kl = anchor_kl(scored, {2 * len(pairs) + i: a.teacher for i, a in enumerate(batch.anchors)}) / total_tokens
        loss = loss + settings.anchor_weight * kl
        metrics["anchor_kl"] = float(kl.detach())
    return Losses(loss, {"loss": float(loss.detach()), **metrics})


class TorchEngine:
    """One process, whole tensors, Adam on the logits. A step's rows go forward and backward in `accumulate` parts under the
    same sample: less memory for activations, the same step up to rounding."""

    def __init__(self, masked: MaskedModel, *, accumulate: int = 1) -> None:
        self.masked = masked
        self.settings = masked.settings
        self._accumulate = accumulate
        self._moments = [(torch.zeros_like(p.logits), torch.zeros_like(p.logits)) for p in masked.packs]
        self._updates = 0

    def step(self, batch: Batch) -> dict[str, float]:
        """See Engine."""
        self.masked.write_sample(batch.step)
        metrics = self._backward(batch)
        if not math.isfinite(metrics["loss"]):
            lines = listed([str(p.pair.line) for p in batch.pairs], 32)
            raise TrainingError(
                f"mask training: the loss is {metrics['loss']} at step {batch.step}, preference lines {lines}; "
                "lower mask.learning_rate or look at these rows"
            )
        gradients = self.masked.logit_gradients()
        norm = torch.stack([g.square().sum(dtype=torch.float64) for g in gradients]).sum().sqrt().item()
        metrics["gradient_norm"] = norm
        if not math.isfinite(norm):
            raise TrainingError(
                f"mask training: the gradient is not finite at step {batch.step}; lower mask.learning_rate"
            )
        clip = self.settings.clip_norm
        if clip is not None and norm > clip:
            for gradient in gradients:
                gradient.mul_(clip / norm)
        self._adam(gradients)
        return metrics

    @torch.no_grad()
    def evaluate(self, batch: Batch, weights: Weights) -> dict[str, float]:
        """See Engine."""
        self.masked.write(weights)
        parts = -(-len(batch.pairs) // EVALUATE_BATCH)
        return _added([self._losses(batch.share(i, parts)).metrics for i in range(parts)])

    def _backward(self, batch: Batch) -> dict[str, float]:
        """Leave the batch's gradients in the parameters; its metrics."""
        found = []
        for i in range(self._accumulate):
            part = batch.share(i, self._accumulate)
            if part.pairs or part.anchors:
                losses = self._losses(part)
                torch.autograd.backward(losses.loss)
                found.append(losses.metrics)
        return _added(found)

    def _losses(self, batch: Batch) -> Losses:
        return batch_losses(self.masked.model, batch, self.settings)

    def density(self) -> dict[str, float]:
        """See Engine."""
        soft, binary = self.masked.density()
        return {"density_soft": soft, "density_binary": binary}

    def iter_shards(self) -> Iterator[tuple[str, int, int, torch.Tensor]]:
        """See Engine."""
        for s in self.masked.slices:
            yield s.name, s.home.start, s.home.stop, s.logits

    def save(self, directory: Path) -> None:
        """See Engine."""
        tensors = {key: tensor.clone() for key, tensor in self._state()}
        path = directory / STATE_FILE
        try:
            save_file(tensors, path, metadata={"updates": str(self._updates)})
        except SafetensorError as error:  # what it raises when the disk is full too: no OSError
            raise StorageError(
                f"{path}: training state cannot be written ({error}); free some space or choose another workspace"
            ) from error

    def load(self, directory: Path) -> None:
        """See Engine."""
        tensors, updates = _read_state(directory / STATE_FILE)
        mine = dict(self._state())
        wrong = sorted(key for key in mine.keys() | tensors if key not in mine or key not in tensors)
        wrong += [key for key in mine.keys() & tensors if mine[key].shape != tensors[key].shape]
        if wrong:
            raise StorageError(
                f"{directory}: training state of another model: {listed(wrong)}; delete it to start anew"
            )
        for key, tensor in mine.items():
            tensor.copy_(tensors[key])
        self._updates = updates

    def _state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Logits and moments by tensor, as views: the files do not know of packs."""
        for pack, (first, second) in zip(self.masked.packs, self._moments, strict=True):
            for i, begin, end in pack.split(0, pack.numel):
                name = self.masked.slices[i].name
                for kind, flat in (("logits", pack.logits), ("first", first), ("second", second)):
                    yield f"{kind}/{name}", flat[begin:end]

    @torch.no_grad()
    def _adam(self, gradients: Sequence[torch.Tensor]) -> None:
        """Adam (arXiv 1412.6980), written out so that its state is plain tensors which any engine can shard."""
        s = self.settings
        self._updates += 1
        correct_1 = 1 - s.adam_beta1**self._updates
        correct_2 = 1 - s.adam_beta2**self._updates
        rate = s.learning_rate / correct_1
        for pack, (first, second), gradient in zip(self.masked.packs, self._moments, gradients, strict=True):
            first.lerp_(gradient, 1 - s.adam_beta1)
            second.mul_(s.adam_beta2).addcmul_(gradient, gradient, value=1 - s.adam_beta2)
            scale = second.sqrt().mul_(1 / math.sqrt(correct_2)).add_(s.adam_epsilon)
            pack.logits.addcdiv_(first, scale, value=-rate)


def _added(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """The metrics of a batch from those of its shares."""
    return {key: sum(part.get(key, 0.0) for part in parts) for key in max(parts, key=len)}


def _read_state(path: Path) -> tuple[dict[str, torch.Tensor], int]:
    try:
        with safe_open(path, framework="pt") as opened:
            updates = int(opened.metadata()["updates"])
        return load_file(path), updates
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{path}: training state cannot be read ({error}); delete it to start anew") from None
