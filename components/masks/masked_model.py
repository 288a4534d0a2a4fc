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
        self.shared = settings.granularity != "element"
        """Whether elements share logits; every rank then has all of them, the same at every step."""
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
            self._fuse(lambda p, low, high: _expected(p, low, high, weights))
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
            in_place = p.unit is None and slope.dtype == p.logits.dtype
            gradient = slope if in_place else torch.zeros_like(p.logits)
            for low, high in p.pieces(slope, *([] if p.unit else [gradient])):
                if wanted == "mean" and _scratch(p, slope):
                    pull, bend = slope[low:high], p.weights[low:high]  # `_mean_pulls` left them there
                else:
                    bend = sample_slope(self._sample(p, low, high, step, temperature))
                    pull = _pull(p, slope, low, high)
                # Without rescaling every slice has the same constants: one call for the whole piece.
                parts = [(p.first, 0, high - low)] if wanted == "none" else p.split(low, high)
                for i, begin, end in parts:
                    reached = logit_gradient(
                        pull[begin:end],
                        bend[begin:end],
                        temperature=temperature,
                        scale=scale,
                        mean=mean[i],
                        mean_pull=mean_pull[i],
                    )
                    first, last = p.units(low + begin, low + end)
                    if p.unit is None:
                        gradient[first:last] = reached
                    else:
                        gradient[first:last] += p.gathered(reached, low + begin)
                if self.settings.density_weight and p.unit is None:
                    kept = soft_mask(p.logits[low:high])
                    gradient[low:high].add_(kept * (1 - kept), alpha=self.settings.density_weight / self.numel)
            gradients.append(gradient)
        for s in self.slices:
            s.home.forget_gradient()
        self._samples.clear()
        return self._shared_gradients(gradients) if self.shared else gradients

    def _shared_gradients(self, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        """Each rank has what its own elements add to shared logits; all ranks need all of it, and the density's pull once."""
        total = self.all_sum(torch.cat(gradients))
        found = list(total.split([g.numel() for g in gradients]))  # type: ignore[no-untyped-call]
        if self.settings.density_weight:
            for p, gradient in zip(self.packs, found, strict=True):
                kept = soft_mask(p.logits)
                gradient.add_(kept * (1 - kept), alpha=self.settings.density_weight * (p.unit or 1) / self.numel)
        return found

    def norm(self, gradients: Sequence[torch.Tensor]) -> float:
        """‖∂L/∂ℓ‖₂ over the whole mask. Here as elsewhere pieces are summed in their own type, their sums in fp64."""
        total = torch.zeros((), dtype=torch.float64, device=gradients[0].device)
        for p, gradient in zip(self.packs, gradients, strict=True):
            for low, high in p.logit_pieces(gradient):
                total += torch.dot(gradient[low:high], gradient[low:high])
        return float((total if self.shared else self.all_sum(total)).sqrt())

    @torch.no_grad()
    def density(self) -> tuple[float, float]:
        """Shares of elements kept by the soft and by the binary mask, over all tensors (and ranks)."""
        sums = torch.zeros(2, dtype=torch.float64)
        for p in self.packs:
            for low, high in p.pieces():
                sums[0] += _expected(p, low, high, "soft").sum(dtype=torch.float64)
                sums[1] += _expected(p, low, high, "binary").sum(dtype=torch.float64)
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
            plain.weights.copy_(stored[:])
            if isinstance(stored, torch.Tensor):
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
        first, last = p.units(low, high)
        sample = p.spread(concrete_sample(p.logits[first:last], noise, temperature), low, high)
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
                    c = parts[0] if len(parts) == 1 else torch.cat(parts)
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
                    sums[i] += h[begin:end].sum()
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
                sample, kept = self._sample(p, low, high, step, temperature), _scratch(p, slope)
                pull = _pull(p, slope, low, high, out=slope[low:high] if kept else None)
                h = self._harden(sample)
                for i, begin, end in p.split(low, high):
                    sums[i] += torch.dot(pull[begin:end], h[begin:end])
                if kept:
                    sample_slope(sample, out=p.weights[low:high])
        found = self.all_sum(sums) / (self._numels() * means.square())
        return [value if mean > 0 else 0.0 for value, mean in zip(found.tolist(), means.tolist(), strict=True)]

    def _numels(self) -> torch.Tensor:
        return torch.tensor([s.numel for s in self.slices], dtype=torch.float64)


def _scratch(p: Pack, slope: torch.Tensor) -> bool:
    """Whether the weights' place can hold what is computed in the logits' dtype."""
    return p.weights.dtype == p.logits.dtype == slope.dtype and p.weights.device == p.logits.device


def _pull(p: Pack, slope: torch.Tensor, low: int, high: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """G = (∂L/∂w) δ, a tensor of its own unless it goes to `out`."""
    aligned, finetuned = p.pair(low, high)
    delta = finetuned - aligned
    return torch.mul(delta, slope[low:high], out=delta if out is None else out)


def _expected(p: Pack, low: int, high: int, weights: Literal["soft", "binary"]) -> torch.Tensor:
    """σ(ℓ) or ℓ > 0 of a pack's elements, in the logits' dtype."""
    first, last = p.units(low, high)
    logits = p.logits[first:last]
    return p.spread(soft_mask(logits) if weights == "soft" else binary_mask(logits).to(logits.dtype), low, high)
