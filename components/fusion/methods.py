"""Fusion methods: plain tensor functions with their papers, and the registry that a method's name is looked up in.

Notation: a = aligned, f = finetune, u = unaligned, τ = f − a. Functions take flattened slices of equal length. All
arithmetic is fp32 (the engine casts once, at the end); selects are in the output dtype and exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from components.errors import ConfigError
from components.fusion.inputs import Block, Kernel, Method, TensorInputs
from components.fusion.merge_settings import factor_for
from components.fusion.random_subset import RandomSubset
from components.fusion.restoration import (
    Lineage,
    Projection,
    is_matrix,
    low_rank_direction,
    lowest_cosine,
    lox,
    projection,
    safe_lora,
    safe_merge,
)
from components.fusion.settings import FusionSettings
from components.masks.granularity import spread, units


def blend(aligned: torch.Tensor, finetune: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a + c τ in fp32, exactly a where c = 0 and exactly f where c = 1, signs of zeros included.

    torch.lerp works from the nearer end, so a large f − a costs neither end a bit.
    """
    a, f = aligned.float(), finetune.float()
    out = torch.lerp(a, f, c)
    low, high = torch.aminmax(c) if c.numel() else (c.sum(), c.sum())
    if low <= 0 <= high:  # −0.0 + 0 would be +0.0
        out = select(out, a, c == 0, torch.float32)
    if low <= 1 <= high:
        out = select(out, f, c == 1, torch.float32)
    return out


def select(aligned: torch.Tensor, finetune: torch.Tensor, bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """f where the bit is set, else a: no arithmetic, every bit kept when `dtype` is at least as wide as both.

    Integer logic on the bit patterns: torch.where takes ten times as long (measured).
    """
    integer: torch.dtype = getattr(torch, f"int{8 * dtype.itemsize}")
    a, f = aligned.to(dtype).view(integer), finetune.to(dtype).view(integer)
    chosen = torch.bitwise_xor(a, f).bitwise_and_(bits.to(integer).neg_())
    return chosen.bitwise_xor_(a).view(dtype)


def masked(
    aligned: torch.Tensor, finetune: torch.Tensor, mask: torch.Tensor, *, scale: float, mean: float | None
) -> torch.Tensor:
    """θ_safe + λ (τ ⊙ m) / mean(m): subspace-oriented model fusion, https://arxiv.org/abs/2405.09055.

    `mean` is that of the mask over the whole tensor, None for no rescale. A tensor whose mask is all zero stays
    aligned.
    """
    factor = scale if mean is None else (scale / mean if mean > 0 else 0.0)
    return blend(aligned, finetune, mask if factor == 1.0 else mask * factor)


def interpolation(aligned: torch.Tensor, finetune: torch.Tensor, *, alpha: float) -> torch.Tensor:
    """θ_safe + α τ: WiSE-FT, https://arxiv.org/abs/2109.01903."""
    if alpha == 0:
        return aligned.float()
    if alpha == 1:
        return finetune.float()
    return torch.lerp(aligned.float(), finetune.float(), alpha)


def resta(aligned: torch.Tensor, finetune: torch.Tensor, unaligned: torch.Tensor, *, gamma: float) -> torch.Tensor:
    """θ_t + γ (θ_safe − θ_u): RESTA, https://arxiv.org/abs/2402.11746."""
    return (aligned.float() - unaligned.float()).mul_(gamma).add_(finetune.float())


def _prepare_masked(inputs: TensorInputs, settings: FusionSettings) -> Kernel:
    mask, name = inputs.mask, inputs.name
    assert mask is not None
    if not mask.is_masked(name):
        return _keep_finetune(inputs)
    rescale = settings.rescale == "mean"
    layer = factor_for(settings.layers, name)
    scale = settings.scale * (1.0 if layer is None else layer)
    if settings.form == "soft":
        t = settings.temperature
        mean = mask.soft_mean(name, temperature=t) if rescale else None
        return lambda b: masked(
            b.aligned, b.finetune, mask.soft(name, b.start, b.stop, temperature=t), scale=scale, mean=mean
        )
    return _bits_kernel(
        lambda start, stop: mask.binary(name, start, stop, threshold=settings.threshold),
        density=mask.density(name, threshold=settings.threshold) if rescale else None,
        inputs=inputs,
        scale=scale,
    )


def _prepare_random(inputs: TensorInputs, settings: FusionSettings) -> Kernel:
    """The control for a learned binary mask: as many ones (or rows of them) in each tensor, at random places."""
    if inputs.mask is not None and not inputs.mask.is_masked(inputs.name):
        return _keep_finetune(inputs)
    density = settings.density if inputs.mask is None else inputs.mask.density(inputs.name)
    assert density is not None
    unit = 1 if inputs.mask is None else inputs.mask.unit(inputs.name)
    places = inputs.numel // unit
    count = round(density * places)
    subset = RandomSubset(seed=settings.seed, name=inputs.name, numel=places, count=count)
    exact = count / places if settings.rescale == "mean" and places else None

    def bits(start: int, stop: int) -> torch.Tensor:
        return spread(subset.bits(*units(unit, start, stop)), unit, start, stop)

    return _bits_kernel(bits, density=exact, inputs=inputs, scale=settings.scale)


def _bits_kernel(
    bits: Callable[[int, int], torch.Tensor],
    *,
    density: float | None,
    inputs: TensorInputs,
    scale: float,
) -> Kernel:
    if scale == 1.0 and density is None:
        return lambda b: select(b.aligned, b.finetune, bits(b.start, b.stop), _held_in(b, inputs.dtype))
    return lambda b: masked(b.aligned, b.finetune, bits(b.start, b.stop).float(), scale=scale, mean=density)


def _keep_finetune(inputs: TensorInputs) -> Kernel:
    """A tensor that was left out of the mask keeps the finetune's weights, as it did in training."""
    return lambda b: b.finetune.to(_held_in(b, inputs.dtype))


def _held_in(b: Block, dtype: torch.dtype) -> torch.dtype:
    """The output's dtype, or a wider one that both models need: what is lost is lost once, where the engine casts."""
    both = torch.promote_types(b.aligned.dtype, b.finetune.dtype)
    return both if both.itemsize > dtype.itemsize else dtype


def _prepare_interpolation(inputs: TensorInputs, settings: FusionSettings) -> Kernel:
    alpha = settings.alpha
    assert alpha is not None
    return lambda b: interpolation(b.aligned, b.finetune, alpha=alpha)


def _prepare_resta(inputs: TensorInputs, settings: FusionSettings) -> Kernel:
    source, gamma = inputs.unaligned, settings.gamma
    assert source is not None
    assert gamma is not None
    return lambda b: resta(b.aligned, b.finetune, source.read(inputs.name, b.start, b.stop), gamma=gamma)


def _settle_lowest(lineage: Lineage, settings: FusionSettings, processes: int) -> FusionSettings:
    """The matrices with the lowest cosines are those up to some cosine."""
    if settings.lowest is None:
        return settings
    similarity = lowest_cosine(lineage, settings.lowest, processes=processes)
    return settings.model_copy(update={"lowest": None, "similarity": similarity})


def _to_restore(inputs: TensorInputs, settings: FusionSettings) -> Projection | None:
    """C ΔW of a matrix that strayed from what alignment changed; None where the finetune is kept."""
    assert settings.similarity is not None, "lowest is not settled"
    if not is_matrix(inputs.lineage.aligned, inputs.name):
        return None
    found = projection(inputs.lineage, inputs.name)
    return found if found is not None and found.cosine <= settings.similarity else None


def _prepare_safe_lora(inputs: TensorInputs, settings: FusionSettings) -> Kernel:
    found = _to_restore(inputs, settings)
    if found is None:
        return _keep_finetune(inputs)
    product = found.product
    return lambda b: safe_lora(b.aligned, product.read(b.start, b.stop))


def _prepare_safe_merge(inputs: TensorInputs, settings: FusionSettings) -> Kernel:
    """ΔW_safe is a safe finetune's where there is one (as published), else C ΔW: Safe LoRA's projection, taken in part."""
    found, safe, name, share = _to_restore(inputs, settings), inputs.safe, inputs.name, settings.safe_share
    if found is None:
        return _keep_finetune(inputs)
    if safe is not None:
        return lambda b: safe_merge(b.finetune, safe.read(name, b.start, b.stop), share=share)
    product = found.product
    return lambda b: safe_merge(b.finetune, safe_lora(b.aligned, product.read(b.start, b.stop)), share=share)


def _prepare_lox(inputs: TensorInputs, settings: FusionSettings) -> Kernel:
    gamma, rank = settings.gamma, settings.rank
    assert gamma is not None
    assert rank is not None
    found = (
        low_rank_direction(inputs.lineage, inputs.name, rank)
        if is_matrix(inputs.lineage.aligned, inputs.name)
        else None
    )
    if found is None:
        return _keep_finetune(inputs)
    product = found
    return lambda b: lox(b.finetune, product.read(b.start, b.stop), gamma=gamma)


METHODS: Mapping[str, Method] = {
    m.name: m
    for m in (
        Method("masked", "https://arxiv.org/abs/2405.09055", _prepare_masked, needs_mask=True),
        Method("interpolation", "https://arxiv.org/abs/2109.01903", _prepare_interpolation),
        Method("resta", "https://arxiv.org/abs/2402.11746", _prepare_resta, needs_unaligned=True, keeps_equal=False),
        Method("random_mask", "https://arxiv.org/abs/2405.09055", _prepare_random),
        Method(
            "safe_lora",
            "https://arxiv.org/abs/2405.16833",
            _prepare_safe_lora,
            needs_unaligned=True,
            whole_tensors=True,
            settle=_settle_lowest,
        ),
        Method(
            "safe_merge",
            "https://arxiv.org/abs/2503.17239",
            _prepare_safe_merge,
            needs_unaligned=True,
            takes_safe=True,
            keeps_equal=False,
            whole_tensors=True,
            settle=_settle_lowest,
        ),
        Method(
            "lox",
            "https://arxiv.org/abs/2506.15606",
            _prepare_lox,
            needs_unaligned=True,
            keeps_equal=False,
            whole_tensors=True,
        ),
    )
}


def method_named(name: str) -> Method:
    """Look a method up. Raises ConfigError that lists the names there are."""
    if name not in METHODS:
        raise ConfigError(f"fusion method {name!r} is unknown; there are {', '.join(sorted(METHODS))}")
    return METHODS[name]
