"""The mask-training engine: what one optimizer step is, alone or on one of several ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from components.errors import StorageError, TrainingError, listed
from components.masks.anchor import Anchor
from components.masks.masked_model import MaskedModel, Weights
from components.masks.objective import EVALUATE_BATCH, GROUP_OVERHEAD, Forwards, anchor_kl, preference_losses, score
from components.masks.preferences import Pair, Row
from components.masks.settings import MaskSettings
from components.masks.state import SavedState, Slice, save_state, state_file

METRICS = ("loss", "dpo_loss", "dpo_accuracy", "reward_margin", "chosen_nll", "anchor_kl")
"""What a batch is told by; the last only where it has anchors."""
IDLE_ROW = Row((0, 0), 1)


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

    def tokens(self) -> int:
        """Tokens of every prompt with its answer."""
        rows = [row for p in self.pairs for row in (p.pair.chosen, p.pair.rejected)]
        return sum(len(row.tokens) for row in (*rows, *(a.row for a in self.anchors)))

    def share(self, index: int, shares: int) -> Batch:
        """One of `shares` parts: every `shares`-th pair and anchor from `index` on."""
        return Batch(self.step, self.pairs[index::shares], self.anchors[index::shares], self.totals())


@dataclass(frozen=True)
class Losses:
    """What a share adds to its batch's loss (with its graph) and to its metrics."""

    loss: torch.Tensor
    metrics: dict[str, float]


def batch_losses(
    model: torch.nn.Module, batch: Batch, settings: MaskSettings, *, overhead: int = GROUP_OVERHEAD
) -> Losses:
    """Preference weight × mean preference loss over pairs + chosen weight × their mean −log π(chosen) + anchor weight × mean
    KL over answer tokens, all rows in as few forwards as pay. An empty share's loss is 0, by a forward that its rank has to
    take part in."""
    pairs, (total_pairs, total_tokens) = batch.pairs, batch.totals()
    rows = [r for p in pairs for r in (p.pair.chosen, p.pair.rejected)] + [a.row for a in batch.anchors]
    if not rows:
        idle = score(model, [IDLE_ROW], overhead=overhead).log_probs.sum() * 0.0
        return Losses(idle, dict.fromkeys(METRICS, 0.0))
    scored = score(model, rows, overhead=overhead)
    policy = scored.sequences()[: 2 * len(pairs)].view(-1, 2)
    reference = torch.tensor([p.reference for p in pairs], dtype=policy.dtype, device=policy.device).view(-1, 2)
    losses, margins = preference_losses(policy, reference, loss=settings.loss, beta=settings.beta)
    dpo = losses.sum() / total_pairs
    loss = settings.preference_weight * dpo
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
    """Adam on the logits that are here, alone or as one of several ranks. A step's rows go forward and backward in
    `accumulate` parts on each rank under the same sample: less memory for activations, the same step up to rounding."""

    def __init__(
        self,
        masked: MaskedModel,
        *,
        accumulate: int = 1,
        forwards: Forwards | None = None,
        layers: Sequence[torch.nn.Module] = (),
    ) -> None:
        """`layers` are in training mode while a batch goes through the model, and only then."""
        self.masked, self.settings, self._layers = masked, masked.settings, layers
        self.forwards = forwards or Forwards()
        self.ranks = self.forwards.ranks
        self._accumulate = accumulate
        made = [[masked.room.zeros(p.logits.numel(), p.logits.dtype) for _ in range(2)] for p in masked.packs]
        self._moments = [(first, second) for first, second in made]
        self._updates = 0

    def step(self, batch: Batch) -> dict[str, float]:
        """One optimizer step; the metrics of its batch. Raises TrainingError when the loss is not finite."""
        self.masked.write_sample(batch.step)
        with _training(self._layers):
            metrics = self._backward(batch)
        if not math.isfinite(metrics["loss"]):
            lines = listed([str(p.pair.line) for p in batch.pairs], 32)
            raise TrainingError(
                f"mask training: the loss is {metrics['loss']} at step {batch.step}, preference lines {lines}; "
                "lower mask.learning_rate or look at these rows"
            )
        gradients = self.masked.logit_gradients()
        norm = self.masked.norm(gradients)
        metrics["gradient_norm"] = norm
        if not math.isfinite(norm):
            raise TrainingError(
                f"mask training: the gradient is not finite at step {batch.step}; lower mask.learning_rate"
            )
        clip = self.settings.clip_norm
        if clip is not None and norm > clip:
            for pack, gradient in zip(self.masked.packs, gradients, strict=True):
                for low, high in pack.logit_pieces(gradient):
                    gradient[low:high].mul_(clip / norm)
        self._adam(gradients, self.settings.rate(batch.step))
        return metrics

    @torch.no_grad()
    def evaluate(self, batch: Batch, weights: Weights) -> dict[str, float]:
        """The same metrics with fixed weights and no step."""
        self.masked.write(weights)
        rounds = -(-len(batch.pairs) // (EVALUATE_BATCH * self.ranks.world))
        return self._added(batch, [self._losses(part).metrics for part in self._shares(batch, rounds)])

    def _backward(self, batch: Batch) -> dict[str, float]:
        """Leave the batch's gradients in the homes; its metrics."""
        found, shares = [], self._shares(batch, self._accumulate)
        for done, part in enumerate(shares, 1):
            losses = self._losses(part)
            torch.autograd.backward(losses.loss)
            self._reduce(last=done == len(shares))
            found.append(losses.metrics)
        return self._added(batch, found)

    def _reduce(self, *, last: bool) -> None:
        """Called after each backward of a batch: where gradients cross ranks."""

    def _shares(self, batch: Batch, rounds: int) -> list[Batch]:
        """This rank's parts of a batch; as many on every rank, so some may be empty."""
        world, rank = self.ranks.world, self.ranks.rank
        parts = [batch.share(i * world + rank, rounds * world) for i in range(rounds)]
        return [part for part in parts if part.pairs or part.anchors or world > 1]

    def _losses(self, batch: Batch) -> Losses:
        return batch_losses(self.masked.model, batch, self.settings, overhead=self.forwards.overhead)

    def _added(self, batch: Batch, parts: Sequence[dict[str, float]]) -> dict[str, float]:
        """The metrics of a batch from those of its shares, over all ranks."""
        keys = [key for key in METRICS if key != "anchor_kl" or batch.anchors]
        mine = [sum(part.get(key, 0.0) for part in parts) for key in keys]
        return dict(zip(keys, self.ranks.all_sum(torch.tensor(mine, dtype=torch.float64)).tolist(), strict=True))

    def density(self) -> dict[str, float]:
        """Share of elements that the soft and the binary mask keep."""
        soft, binary = self.masked.density()
        return {"density_soft": soft, "density_binary": binary}

    def save(self, directory: Path) -> None:
        """Write everything that `load` needs to go on exactly, as files in `directory`. Raises StorageError."""
        path = state_file(directory, self.ranks.rank, self.ranks.world)
        save_state(path, {key: (part, values) for key, part, values in self._state()}, updates=self._updates)

    def load(self, directory: Path) -> None:
        """Go on from what `save` wrote, on however many ranks. Raises StorageError."""
        mine = list(self._state())
        with SavedState(directory) as saved:
            there, expected = saved.numels(), {key: part.numel for key, part, _ in mine}
            wrong = sorted(k for k in there.keys() | expected if there.get(k) != expected.get(k))
            if wrong:
                raise StorageError(
                    f"{directory}: training state of another model: {listed(wrong)}; delete it to start anew"
                )
            for key, part, values in mine:
                saved.read_into(key, part.start, values)
            self._updates = saved.updates

    @torch.no_grad()
    def restart(self) -> None:
        """Back to the mask's start."""
        for pack, moments in zip(self.masked.packs, self._moments, strict=True):
            for low, high in pack.logit_pieces(*moments):
                pack.logits[low:high].fill_(self.settings.init_logit)
                for moment in moments:
                    moment[low:high].zero_()
        self._updates = 0

    def _state(self) -> Iterator[tuple[str, Slice, torch.Tensor]]:
        """Logits and moments by tensor, as views: the files do not know of packs."""
        for pack, (first, second) in zip(self.masked.packs, self._moments, strict=True):
            for s, begin, end in pack.places():
                part = Slice(s.home.start, s.home.stop, s.numel)
                if s.unit is not None:
                    begin, end, part = 0, s.logits.numel(), Slice(0, s.logits.numel(), s.logits.numel())
                for kind, flat in (("logits", pack.logits), ("first", first), ("second", second)):
                    yield f"{kind}/{s.name}", part, flat[begin:end]

    @torch.no_grad()
    def _adam(self, gradients: Sequence[torch.Tensor], learning_rate: float) -> None:
        """Adam (arXiv 1412.6980), written out so that its state is plain tensors which any engine can shard."""
        s = self.settings
        self._updates += 1
        correct_1 = 1 - s.adam_beta1**self._updates
        correct_2 = 1 - s.adam_beta2**self._updates
        # √(v/c₂) + ε = (√v + ε √c₂) / √c₂, and the last factor goes into the rate: one pass less.
        rate, epsilon = learning_rate * math.sqrt(correct_2) / correct_1, s.adam_epsilon * math.sqrt(correct_2)
        for pack, (first, second), gradient in zip(self.masked.packs, self._moments, gradients, strict=True):
            for low, high in pack.logit_pieces(first, second, gradient):
                g, m, v = gradient[low:high], first[low:high], second[low:high]
                m.lerp_(g, 1 - s.adam_beta1)
                v.mul_(s.adam_beta2).addcmul_(g, g, value=1 - s.adam_beta2)
                pack.logits[low:high].addcdiv_(m, v.sqrt().add_(epsilon), value=-rate)


@contextmanager
def _training(layers: Sequence[torch.nn.Module]) -> Iterator[None]:
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
