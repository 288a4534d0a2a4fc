"""A causal LM whose weights are written from (aligned, finetuned, mask), by parameter and not by module class.

The model's own parameters hold the fused weights. Before a step they are written in place from the two stored models
and the logits; an ordinary backward leaves ∂L/∂w in `.grad`; `logit_gradients` turns that into ∂L/∂ℓ with the closed
form of concrete.py, drawing the same noise again. So no module is wrapped, autograd keeps neither mask nor delta, a
tied weight is one parameter with one mask, any number of forwards share one sample, and the same arithmetic works on a
slice of each parameter: an engine that shards parameters owns [start, stop) of aligned, finetuned, logits and weights
alike, and only the two sums of each tensor in `all_sum` cross ranks."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from components.checkpoints.source import TensorSource, blocks
from components.errors import CheckpointError, ConfigError, listed
from components.masks.concrete import (
    BLOCK,
    binary_mask,
    coefficient,
    concrete_sample,
    interpolate_into,
    logistic_noise,
    logit_gradient,
    soft_mask,
)
from components.masks.settings import MaskSettings

REMEMBER = 1 << 24
"""Default of `MaskedModel(remember=…)`: 64 MiB."""

Weights = Literal["aligned", "finetuned", "soft", "binary"]
"""What the parameters hold: mask 0, mask 1, the expected mask σ(ℓ), the mask ℓ > 0 (or a sample: `write_sample`)."""


@dataclass
class MaskedSlice:
    """Elements [start, stop) of one tensor. `aligned`, `finetuned`: as stored; `logits`, `weights`: 1-D, what the mask
    is and where the fused weights go (a view of the model's parameter)."""

    name: str
    start: int
    stop: int
    numel: int
    """Of the whole tensor."""
    aligned: torch.Tensor
    finetuned: torch.Tensor
    logits: torch.Tensor
    weights: torch.Tensor
    parameter: torch.nn.Parameter

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Ranges within the slice that are worked on at once."""
        return blocks(self.stop - self.start, 2 * BLOCK)

    def pair(self, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Both models' elements in the logits' dtype (fp32 as they are read: a delta in a narrow type loses
        weights)."""
        dtype = self.logits.dtype
        return self.aligned[low:high].to(dtype), self.finetuned[low:high].to(dtype)


@dataclass
class UnmaskedSlice:
    """Elements [start, stop) of a tensor without a mask: the finetune's weights, except while the model is the aligned
    one."""

    name: str
    aligned: torch.Tensor
    finetuned: torch.Tensor
    weights: torch.Tensor


def _no_reduction(sums: torch.Tensor) -> torch.Tensor:
    return sums


class MaskedModel:
    """Writes weights into `model` and reads gradients of the logits out of it. `all_sum` adds a vector over all
    ranks."""

    def __init__(
        self,
        model: torch.nn.Module,
        slices: Sequence[MaskedSlice],
        settings: MaskSettings,
        *,
        unmasked: Sequence[UnmaskedSlice] = (),
        all_sum: Callable[[torch.Tensor], torch.Tensor] = _no_reduction,
        remember: int = REMEMBER,
    ) -> None:
        self.model, self.slices, self.settings = model, list(slices), settings
        self.unmasked, self._all_sum = list(unmasked), all_sum
        self._sampled: tuple[int, float, torch.Tensor] | None = None
        self.numel = sum(s.numel for s in self.slices if s.start == 0)
        """Elements of all masks, over all ranks."""
        self._remember = sum(s.stop - s.start for s in self.slices) <= remember
        self._samples: dict[tuple[str, int], torch.Tensor] = {}

    @torch.no_grad()
    def write(self, weights: Weights) -> None:
        """Put one of the four deterministic models into the parameters."""
        self._sampled = None
        self._samples.clear()
        for plain in self.unmasked:
            plain.weights.copy_(plain.aligned if weights == "aligned" else plain.finetuned)
        if weights in ("soft", "binary"):
            self._fuse(lambda s, low, high: _expected(s.logits[low:high], weights))
            return
        for s in self.slices:
            s.weights.copy_(s.aligned if weights == "aligned" else s.finetuned)

    @torch.no_grad()
    def write_sample(self, step: int) -> None:
        """Put the weights under the mask of one training step into the parameters."""
        if self._sampled is None:
            self.write("finetuned")
        self._samples.clear()
        temperature = self.settings.temperature(step)
        means = self._fuse(lambda s, low, high: self._harden(self._sample(s, low, high, step, temperature)))
        self._sampled = (step, temperature, means)

    @torch.no_grad()
    def logit_gradients(self) -> list[torch.Tensor]:
        """∂L/∂ℓ of each slice from the parameters' `.grad` after backward; takes the `.grad`s away."""
        assert self._sampled is not None, "write_sample comes first"
        step, temperature, means = self._sampled
        pulls = self._mean_pulls(step, temperature, means)
        gradients = []
        for s, mean, mean_pull in zip(self.slices, means.tolist(), pulls, strict=True):
            gradient = torch.empty_like(s.logits)
            for low, high in s.pieces():
                sample = self._sample(s, low, high, step, temperature)
                gradient[low:high] = logit_gradient(
                    self._pull(s, low, high),
                    sample,
                    temperature=temperature,
                    scale=self.settings.scale,
                    mean=mean,
                    mean_pull=mean_pull,
                )
            if self.settings.density_weight:
                kept = soft_mask(s.logits)
                gradient.add_(kept * (1 - kept), alpha=self.settings.density_weight / self.numel)
            gradients.append(gradient)
        for s in self.slices:
            s.parameter.grad = None
        self._samples.clear()
        return gradients

    @torch.no_grad()
    def density(self) -> tuple[float, float]:
        """Shares of elements kept by the soft and by the binary mask, over all tensors (and ranks)."""
        sums = torch.zeros(2, dtype=torch.float64)
        for s in self.slices:
            sums[0] += soft_mask(s.logits).sum(dtype=torch.float64)
            sums[1] += binary_mask(s.logits).sum()
        soft, binary = (self._all_sum(sums) / self.numel).tolist()
        return soft, binary

    def unchanged(self) -> dict[str, int]:
        """Per tensor, elements that are equal in both models: no mask can matter there."""
        return {s.name: sum(int(torch.eq(*s.pair(*piece)).sum()) for piece in s.pieces()) for s in self.slices}

    def unmasked_numel(self) -> dict[str, int]:
        """Tensors without a mask and their elements here."""
        return {u.name: u.weights.numel() for u in self.unmasked}

    def _sample(self, s: MaskedSlice, low: int, high: int, step: int, temperature: float) -> torch.Tensor:
        if (s.name, low) in self._samples:
            return self._samples[s.name, low]
        logits = s.logits[low:high]
        if not self.settings.stochastic:
            return concrete_sample(logits, None, temperature)
        noise = logistic_noise(
            seed=self.settings.seed,
            name=s.name,
            step=step,
            start=s.start + low,
            stop=s.start + high,
            device=str(logits.device),
        )
        sample = concrete_sample(logits, noise, temperature)
        if self._remember:
            self._samples[s.name, low] = sample
        return sample

    def _harden(self, sample: torch.Tensor) -> torch.Tensor:
        return (sample > 0.5).to(sample.dtype) if self.settings.relaxation == "straight_through" else sample

    def _pull(self, s: MaskedSlice, low: int, high: int) -> torch.Tensor:
        """G = (∂L/∂w) δ."""
        aligned, finetuned = s.pair(low, high)
        pull = finetuned - aligned
        if s.parameter.grad is None:  # a parameter that the loss does not reach
            return pull.zero_()
        return pull.mul_(s.parameter.grad.view(-1)[low:high])

    def _fuse(self, mask: Callable[[MaskedSlice, int, int], torch.Tensor]) -> torch.Tensor:
        """Write w = a + λ (h/M) δ for h = mask(slice, low, high); gives back each slice's M."""
        means = torch.ones(len(self.slices), dtype=torch.float64)
        if self.settings.rescale != "none":
            for i, s in enumerate(self.slices):
                means[i] = sum(float(mask(s, low, high).sum(dtype=torch.float64)) for low, high in s.pieces())
            means = self._all_sum(means) / torch.tensor([s.numel for s in self.slices])
        for s, mean in zip(self.slices, means.tolist(), strict=True):
            for low, high in s.pieces():
                aligned, finetuned = s.pair(low, high)
                c = coefficient(mask(s, low, high), scale=self.settings.scale, mean=mean)
                interpolate_into(s.weights[low:high], aligned, finetuned, c)
        return means

    def _mean_pulls(self, step: int, temperature: float, means: torch.Tensor) -> list[float]:
        """[Σ G h]/(N M²) per slice where the rescaling's gradient is wanted, else 0."""
        sums = torch.zeros(len(self.slices), dtype=torch.float64)
        if self.settings.rescale != "mean":
            return sums.tolist()
        for i, s in enumerate(self.slices):
            for low, high in s.pieces():
                h = self._harden(self._sample(s, low, high, step, temperature))
                sums[i] += self._pull(s, low, high).mul_(h).sum(dtype=torch.float64)
        numel = torch.tensor([s.numel for s in self.slices])
        return torch.where(means > 0, self._all_sum(sums) / (numel * means.square()), 0.0).tolist()


def _expected(logits: torch.Tensor, weights: Literal["soft", "binary"]) -> torch.Tensor:
    return soft_mask(logits) if weights == "soft" else binary_mask(logits).to(logits.dtype)


def _source_names(model: torch.nn.Module, source: TensorSource, where: Path) -> dict[str, torch.nn.Parameter]:
    """source name -> the parameter it fills. A tied parameter has several names in the model, one in the source."""
    listed_names, aliases = set(source.names()), source.aliases()
    found: dict[str, torch.nn.Parameter] = {}
    missing: list[str] = []
    by_identity: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        by_identity.setdefault(id(parameter), []).append(name)
    for names in by_identity.values():
        known = [aliases.get(name, name) for name in names if aliases.get(name, name) in listed_names]
        if known:
            found[known[0]] = parameters[names[0]]
        else:
            missing.append(names[0])
    if missing:
        raise CheckpointError(
            f"{where}: the model has parameters that the weights do not name: {listed(missing)}; "
            "save the checkpoint with save_pretrained of the same architecture"
        )
    return found


def _chosen(names: Sequence[str], settings: MaskSettings) -> set[str]:
    """Names that get a mask. A pattern that matches nothing is the user's mistake."""
    idle = [p for p in (*settings.include, *settings.exclude) if not fnmatch.filter(names, p)]
    if idle:
        raise ConfigError(
            f"mask patterns that match no tensor: {listed(idle)}; tensors are named like {listed(list(names), 3)}"
        )
    taken = {n for p in settings.include for n in fnmatch.filter(names, p)}
    taken -= {n for p in settings.exclude for n in fnmatch.filter(names, p)}
    if not taken:
        raise ConfigError("mask.exclude takes away every tensor that mask.include names: nothing to train")
    return taken


def load_model(model_dir: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The aligned model from its directory, in eval mode (no dropout), with a plain decoder's settings."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, local_files_only=True, trust_remote_code=False)
    return model.eval()


def build_masked_model(
    *,
    model: torch.nn.Module,
    aligned: TensorSource,
    finetune: TensorSource,
    settings: MaskSettings,
    where: Path,
    logits_dtype: torch.dtype = torch.float32,
) -> MaskedModel:
    """Whole tensors (one process). `where` names the aligned model in errors. Raises CheckpointError for parameters
    that the sources do not name or whose shapes differ."""
    parameters = _source_names(model, aligned, where)
    finetune_names, finetune_aliases = set(finetune.names()), finetune.aliases()
    wrong: list[str] = []
    slices: list[MaskedSlice] = []
    unmasked: list[UnmaskedSlice] = []
    masked = _chosen(sorted(parameters), settings)
    for name in sorted(parameters):
        parameter, other = parameters[name], finetune_aliases.get(name, name)
        if other not in finetune_names:
            wrong.append(f"{name} is missing")
            continue
        shapes = (aligned.spec(name).shape, finetune.spec(other).shape)
        if shapes != (tuple(parameter.shape),) * 2:
            wrong.append(
                f"{name}: aligned {list(shapes[0])}, finetune {list(shapes[1])}, model {list(parameter.shape)}"
            )
            continue
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
        stored = aligned.read(name).to(parameter.device), finetune.read(other).to(parameter.device)
        weights = parameter.detach().view(-1)
        parameter.requires_grad_(name in masked)
        if name not in masked:
            unmasked.append(UnmaskedSlice(name, *stored, weights))
            continue
        slices.append(
            MaskedSlice(
                name=name,
                start=0,
                stop=parameter.numel(),
                numel=parameter.numel(),
                aligned=stored[0],
                finetuned=stored[1],
                logits=torch.full_like(weights, settings.init_logit, dtype=logits_dtype),
                weights=weights,
                parameter=parameter,
            )
        )
    if wrong:
        raise CheckpointError(f"{where}: the finetune does not fit the aligned model: {listed(wrong)}")
    return MaskedModel(model, slices, settings, unmasked=unmasked)
