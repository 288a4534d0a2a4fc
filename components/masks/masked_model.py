"""A causal LM whose weights are written from (aligned, finetuned, mask), by parameter and not by module class.

The model's own parameters hold the fused weights. Before a step they are written in place from the two stored models and
the logits; an ordinary backward leaves ∂L/∂w in `.grad`; `logit_gradients` turns that into ∂L/∂ℓ with the closed form of
concrete.py, drawing the same noise again. So no module is wrapped, autograd keeps neither mask nor delta, a tied weight is
one parameter with one mask, any number of forwards share one sample, and the same arithmetic works on a slice of each
parameter: an engine that shards parameters owns [start, stop) of aligned, finetuned, logits and weights alike, and only the
two sums of each tensor in `all_sum` cross ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from components.mapped import drop
from components.masks.concrete import (
    binary_mask,
    coefficient,
    concrete_sample,
    interpolate_into,
    logistic_noise,
    logit_gradient,
    sample_slope,
    soft_mask,
)
from components.masks.ranks import ALONE
from components.masks.rooms import MemoryRoom, Room
from components.masks.settings import MaskSettings
from components.masks.slices import MaskedSlice, Pack, UnmaskedSlice, pack

REMEMBER = 1 << 24
"""Default of `MaskedModel(remember=…)`: 64 MiB."""

Weights = Literal["aligned", "finetuned", "soft", "binary"]
"""What the parameters hold: mask 0, mask 1, the expected mask σ(ℓ), the mask ℓ > 0 (or a sample: `write_sample`)."""


def _nothing() -> None: ...


class MaskedModel:
    """Writes weights into `model` and reads gradients of the logits out of it.

    Every rank gives the same tensors in the same order, each with the elements that it owns. `all_sum` adds a vector over
    all ranks; `published` is called when new weights stand in the homes, before anything reads the model. Masks of at most
    `remember` elements here keep a step's samples from forward to backward instead of drawing them again: the same bits,
    sooner. Small tensors (`packs`) move into shared memory.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        slices: Sequence[MaskedSlice],
        settings: MaskSettings,
        *,
        unmasked: Sequence[UnmaskedSlice] = (),
        all_sum: Callable[[torch.Tensor], torch.Tensor] = ALONE.all_sum,
        published: Callable[[], None] = _nothing,
        room: Room | None = None,
        remember: int = REMEMBER,
    ) -> None:
        self.model, self.slices, self.settings = model, list(slices), settings
        self.room = room or MemoryRoom(self.slices[0].logits.device)
        """Where logits live, and what else an optimizer keeps."""
        self.packs = pack(self.slices, self.room)
        self.unmasked, self.all_sum, self._published = list(unmasked), all_sum, published
        self.numel = sum(s.numel for s in self.slices)
        """Elements of all masks, over all ranks."""
        self._remember = sum(p.numel for p in self.packs) <= remember
        self._samples: dict[tuple[int, int], torch.Tensor] = {}
        self._sampled: tuple[int, float, torch.Tensor] | None = None

    @torch.no_grad()
    def write(self, weights: Weights) -> None:
        """Put one of the four deterministic models into the parameters."""
        self._sampled = None
        self._samples.clear()
        self._write_unmasked(weights)
        if weights in ("soft", "binary"):
            self._fuse(lambda p, low, high: _expected(p.logits[low:high], weights))
        else:
            for p in self.packs:
                stored = p.aligned if weights == "aligned" else p.finetuned
                for low, high in p.pieces():
                    p.weights[low:high].copy_(stored[low:high])
        self._published()

    @torch.no_grad()
    def write_sample(self, step: int) -> None:
        """Put the weights under the mask of one training step into the parameters."""
        if self._sampled is None:
            self._write_unmasked("soft")
        self._samples.clear()
        temperature = self.settings.temperature(step)
        means = self._fuse(lambda p, low, high: self._harden(self._sample(p, low, high, step, temperature)))
        self._sampled = (step, temperature, means)
        self._published()

    @torch.no_grad()
    def logit_gradients(self) -> list[torch.Tensor]:
        """∂L/∂ℓ of each pack from the gradients that backward left in the homes; takes those away."""
        assert self._sampled is not None, "write_sample comes first"
        step, temperature, means = self._sampled
        wanted, scale = self.settings.rescale, self.settings.scale
        slopes = [p.gradient() for p in self.packs]
        mean, mean_pull = means.tolist(), self._mean_pulls(slopes, step, temperature, means)
        gradients = []
        for p, slope in zip(self.packs, slopes, strict=True):
            # In the place of ∂L/∂w, which is read for the last time here: one model's worth of memory less.
            gradient = slope if slope.dtype == p.logits.dtype else torch.empty_like(p.logits)
            for low, high in p.pieces(slope, gradient):
                if wanted == "mean" and _scratch(p, slope):
                    pull, bend = slope[low:high], p.weights[low:high]  # `_mean_pulls` left them there
                else:
                    bend = sample_slope(self._sample(p, low, high, step, temperature))
                    pull = _pull(p, slope, low, high)
                # Without rescaling every slice has the same constants: one call for the whole piece.
                parts = [(p.first, 0, high - low)] if wanted == "none" else p.split(low, high)
                for i, begin, end in parts:
                    gradient[low + begin : low + end] = logit_gradient(
                        pull[begin:end],
                        bend[begin:end],
                        temperature=temperature,
                        scale=scale,
                        mean=mean[i],
                        mean_pull=mean_pull[i],
                    )
                if self.settings.density_weight:
                    kept = soft_mask(p.logits[low:high])
                    gradient[low:high].add_(kept * (1 - kept), alpha=self.settings.density_weight / self.numel)
            gradients.append(gradient)
        for s in self.slices:
            s.home.forget_gradient()
        self._samples.clear()
        return gradients

    @torch.no_grad()
    def density(self) -> tuple[float, float]:
        """Shares of elements kept by the soft and by the binary mask, over all tensors (and ranks)."""
        sums = torch.zeros(2, dtype=torch.float64)
        for p in self.packs:
            for low, high in p.pieces():
                sums[0] += soft_mask(p.logits[low:high]).sum(dtype=torch.float64)
                sums[1] += binary_mask(p.logits[low:high]).sum()
        soft, binary = (self.all_sum(sums) / self.numel).tolist()
        return soft, binary

    def unchanged(self) -> dict[str, int]:
        """Per tensor, elements here that are equal in both models: no mask can matter there."""
        found = {s.name: 0 for s in self.slices}
        for p in self.packs:
            for low, high in p.pieces():
                same = torch.eq(*p.pair(low, high))
                for i, begin, end in p.split(low, high):
                    found[self.slices[i].name] += int(same[begin:end].sum())
        return found

    def unmasked_numel(self) -> dict[str, int]:
        """Tensors without a mask and their elements, over all ranks."""
        return {u.name: torch.Size(u.home.shape).numel() for u in self.unmasked}

    def _write_unmasked(self, weights: Weights) -> None:
        for plain in self.unmasked:
            stored = plain.aligned if weights == "aligned" else plain.finetuned
            plain.weights.copy_(stored)
            drop(stored)
            drop(plain.weights)

    def _sample(self, p: Pack, low: int, high: int, step: int, temperature: float) -> torch.Tensor:
        """s of elements [low, high) of a pack. Not to be written into."""
        if (p.first, low) in self._samples:
            return self._samples[p.first, low]
        noise = None
        if self.settings.stochastic:
            device = str(p.logits.device)
            noise = logistic_noise(seed=self.settings.seed, step=step, segments=p.segments(low, high), device=device)
        sample = concrete_sample(p.logits[low:high], noise, temperature)
        if self._remember:
            self._samples[p.first, low] = sample
        return sample

    def _harden(self, sample: torch.Tensor) -> torch.Tensor:
        return (sample > 0.5).to(sample.dtype) if self.settings.relaxation == "straight_through" else sample

    def _fuse(self, mask: Callable[[Pack, int, int], torch.Tensor]) -> torch.Tensor:
        """Write w = a + λ (h/M) δ for h = mask(pack, low, high); gives back each slice's M."""
        scale, rescaled = self.settings.scale, self.settings.rescale != "none"
        means = self._means(mask) if rescaled else torch.ones(len(self.slices), dtype=torch.float64)
        mean = means.tolist()
        for p in self.packs:
            for low, high in p.pieces():
                h = p.weights[low:high] if rescaled and _scratch(p, p.logits) else mask(p, low, high)
                if rescaled:
                    parts = [coefficient(h[a:b], scale=scale, mean=mean[i]) for i, a, b in p.split(low, high)]
                    c = torch.cat(parts)
                else:
                    c = coefficient(h, scale=scale, mean=1.0)
                interpolate_into(p.weights[low:high], *p.pair(low, high), c)
        return means

    def _means(self, mask: Callable[[Pack, int, int], torch.Tensor]) -> torch.Tensor:
        """M of each slice's whole tensor, [slices] fp64. Leaves the mask where the weights go, if they are as wide."""
        sums = torch.zeros(len(self.slices), dtype=torch.float64)
        for p in self.packs:
            for low, high in p.pieces():
                h = mask(p, low, high)
                for i, begin, end in p.split(low, high):
                    sums[i] += h[begin:end].sum(dtype=torch.float64)
                if _scratch(p, p.logits):
                    p.weights[low:high].copy_(h)
        return self.all_sum(sums) / self._numels()

    def _mean_pulls(
        self, slopes: Sequence[torch.Tensor], step: int, temperature: float, means: torch.Tensor
    ) -> list[float]:
        """[Σ G h]/(N M²) per slice where the rescaling's gradient is wanted, else 0. Where it is, G is left in the slopes and
        s (1 − s) in the weights, which nobody reads before they are written again: the samples are not drawn a third time."""
        sums = torch.zeros(len(self.slices), dtype=torch.float64)
        if self.settings.rescale != "mean":
            return [0.0] * len(self.slices)
        for p, slope in zip(self.packs, slopes, strict=True):
            for low, high in p.pieces(slope):
                sample, pull = self._sample(p, low, high, step, temperature), _pull(p, slope, low, high)
                product = pull * self._harden(sample)
                for i, begin, end in p.split(low, high):
                    sums[i] += product[begin:end].sum(dtype=torch.float64)
                if _scratch(p, slope):
                    slope[low:high].copy_(pull)
                    p.weights[low:high].copy_(sample_slope(sample))
        found = self.all_sum(sums) / (self._numels() * means.square())
        return [value if mean > 0 else 0.0 for value, mean in zip(found.tolist(), means.tolist(), strict=True)]

    def _numels(self) -> torch.Tensor:
        return torch.tensor([s.numel for s in self.slices], dtype=torch.float64)


def _scratch(p: Pack, slope: torch.Tensor) -> bool:
    """Whether the weights' place can hold what is computed in the logits' dtype."""
    return p.weights.dtype == p.logits.dtype == slope.dtype and p.weights.device == p.logits.device


def _pull(p: Pack, slope: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """G = (∂L/∂w) δ, a tensor of its own."""
    aligned, finetuned = p.pair(low, high)
    return (finetuned - aligned).mul_(slope[low:high])


def _expected(logits: torch.Tensor, weights: Literal["soft", "binary"]) -> torch.Tensor:
    return soft_mask(logits) if weights == "soft" else binary_mask(logits).to(logits.dtype)
