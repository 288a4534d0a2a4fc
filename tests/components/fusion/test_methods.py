"""Methods as tensor functions: exact ends in every dtype, and slow fp64 references in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.errors import ConfigError
from components.fusion.fused import FusedSource
from components.fusion.inputs import Block, TensorInputs
from components.fusion.methods import (
    blend,
    interpolation,
    masked,
    method_named,
    resta,
    select,
)
from components.fusion.random_subset import RandomSubset
from components.fusion.settings import FusionSettings
from tests.components.checkpoints.tiny import LogitMask, MemorySource, same_bits

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
EPS = torch.finfo(torch.float32).eps


def odd_values(n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random values over many magnitudes, with zeros of both signs and subnormals."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator) * 10.0 ** torch.randint(-4, 4, (n,), generator=generator).float()
    values = values.to(dtype)
    values[0::11] = 0.0
    values[1::11] = -0.0
    values[2::11] = torch.finfo(dtype).smallest_normal / 4
    return values


def test_the_random_control_of_a_mask_of_rows_keeps_and_drops_rows() -> None:
    class Rows(LogitMask):
        def unit(self, name: str) -> int:
            return 6

    logits = torch.where(torch.arange(50) % 5 == 0, 1.0, -1.0).repeat_interleave(6)
    inputs = TensorInputs("w", 300, torch.float32, Rows({"w": logits}), None)
    kernel = method_named("random_mask").prepare(inputs, FusionSettings(method="random_mask"))
    whole = kernel(Block(0, 300, torch.zeros(300), torch.ones(300)))
    rows = whole.view(50, 6)
    assert torch.equal(rows.min(dim=1).values, rows.max(dim=1).values)
    assert int(rows[:, 0].sum()) == 10
    assert not torch.equal(whole > 0, logits > 0)
    assert torch.equal(kernel(Block(7, 200, torch.zeros(193), torch.ones(193))), whole[7:200])


@pytest.mark.parametrize("aligned_dtype", FLOATS)
@pytest.mark.parametrize("finetune_dtype", FLOATS)
def test_select_and_the_ends_of_a_soft_mask_keep_every_bit(
    aligned_dtype: torch.dtype, finetune_dtype: torch.dtype
) -> None:
    a, f = odd_values(500, aligned_dtype, 0), odd_values(500, finetune_dtype, 1)
    f[100:200] = a[100:200].to(finetune_dtype)
    wide = torch.promote_types(aligned_dtype, finetune_dtype)
    bits = torch.rand(500, generator=torch.Generator().manual_seed(2)) > 0.5
    want = torch.stack([f[i].to(wide) if bits[i] else a[i].to(wide) for i in range(500)])
    assert same_bits(select(a, f, bits, wide), want)
    assert same_bits(select(a, f, torch.zeros(500, dtype=torch.bool), wide), a.to(wide))
    assert same_bits(select(a, f, torch.ones(500, dtype=torch.bool), wide), f.to(wide))
    assert same_bits(masked(a, f, bits.float(), scale=1.0, mean=None).to(wide), want)
    assert same_bits(interpolation(a, f, alpha=0.0).to(wide), a.to(wide))
    assert same_bits(interpolation(a, f, alpha=1.0).to(wide), f.to(wide))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 300), scale=st.floats(0.01, 3), dtype=st.sampled_from(FLOATS))
def test_masked_against_fp64(seed: int, n: int, scale: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, f = odd_values(n, dtype, seed), odd_values(n, dtype, seed + 1)
    mask = torch.sigmoid(3 * torch.randn(n, generator=generator))
    for mean in (None, float(mask.double().mean())):
        factor = scale if mean is None else scale / mean
        want = a.double() + factor * mask.double() * (f.double() - a.double())
        got = masked(a, f, mask, scale=scale, mean=mean)
        assert got.dtype == torch.float32
        # a few fp32 roundings of terms no larger than these
        bound = 6 * EPS * (a.double().abs() + f.double().abs()) * (1 + factor * mask.double()) + 1e-44
        assert bool(((got.double() - want).abs() <= bound).all())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), alpha=st.floats(-1, 2), gamma=st.floats(-2, 2), dtype=st.sampled_from(FLOATS))
def test_interpolation_and_resta_against_fp64(seed: int, alpha: float, gamma: float, dtype: torch.dtype) -> None:
    a, f, u = (odd_values(97, dtype, seed + i) for i in range(3))
    size = a.double().abs() + f.double().abs() + u.double().abs()
    want = a.double() + alpha * (f.double() - a.double())
    bound = 6 * EPS * size * (1 + abs(alpha)) + 1e-44
    assert bool(((interpolation(a, f, alpha=alpha).double() - want).abs() <= bound).all())
    want = f.double() + gamma * (a.double() - u.double())
    bound = 6 * EPS * size * (1 + abs(gamma)) + 1e-44
    assert bool(((resta(a, f, u, gamma=gamma).double() - want).abs() <= bound).all())


@pytest.mark.parametrize("rescale", ["none", "mean"])
@pytest.mark.parametrize("given_", [{"form": "binary", "threshold": 0.75}, {"form": "soft", "temperature": 0.4}])
def test_thresholds_temperatures_and_factors_by_layer_against_fp64(given_: dict[str, Any], rescale: Any) -> None:
    names = ("layers.0.mlp.up", "layers.1.mlp.up", "layers.1.attn.q", "left.out")
    a, f, logits = ({n: odd_values(300, torch.float32, 3 * i + k) for i, n in enumerate(names)} for k in range(3))
    logits = {n: 2 * torch.randn(300, generator=torch.Generator().manual_seed(i)) for i, n in enumerate(names)}
    chosen = FusionSettings(
        method="masked", scale=1.5, rescale=rescale, layers={"*.1.mlp.*": 0.0, "*.mlp.*": 0.5, "left.*": 7.0}, **given_
    )
    mask = LogitMask(logits, left_out=("left.out",))
    fused = FusedSource(aligned=MemorySource(a), finetune=MemorySource(f), settings=chosen, mask=mask)
    for name, layer in zip(names[:3], (0.5, 0.0, 1.0), strict=True):
        l64 = logits[name].double()
        m = (l64 > 0.75).double() if chosen.form == "binary" else 1 / (1 + torch.exp(-l64 / 0.4))
        factor = 1.5 * layer / (float(m.mean()) if rescale == "mean" else 1.0)
        want = a[name].double() + factor * m * (f[name].double() - a[name].double())
        bound = 8 * EPS * (a[name].double().abs() + f[name].double().abs()) * (1 + factor) + 1e-44
        assert bool(((fused.read(name).double() - want).abs() <= bound).all()), name
    assert same_bits(fused.read(names[1]), a[names[1]])
    assert same_bits(fused.read("left.out"), f["left.out"])


def test_another_threshold_still_selects_and_the_defaults_are_the_old_masks_bit_for_bit() -> None:
    a, f = odd_values(500, torch.float32, 0), odd_values(500, torch.bfloat16, 1)
    logits = torch.randn(500, generator=torch.Generator().manual_seed(2))
    sources = {"aligned": MemorySource({"w": a}), "finetune": MemorySource({"w": f}), "mask": LogitMask({"w": logits})}

    def read(**given: Any) -> torch.Tensor:
        return FusedSource(settings=FusionSettings(method="masked", **given), **sources).read("w")  # type: ignore[arg-type]

    for threshold in (-0.5, 0.0, 0.5):
        assert same_bits(read(form="binary", threshold=threshold), select(a, f, logits > threshold, torch.float32))
    ones = {"layers": {"w": 1.0}}
    assert same_bits(read(form="binary", **ones), read(form="binary"))
    assert same_bits(read(form="soft", temperature=1.0, **ones), blend(a, f, torch.sigmoid(logits)))


def test_a_pattern_that_no_tensor_matches_is_refused() -> None:
    source, chosen = (
        MemorySource({"w": torch.ones(3)}),
        FusionSettings(method="masked", form="soft", layers={"v*": 2.0}),
    )
    with pytest.raises(ConfigError, match="no tensor matches 'v\\*'"):
        FusedSource(aligned=source, finetune=source, settings=chosen, mask=LogitMask({"w": torch.ones(3)}))


def test_a_large_delta_costs_the_finetune_no_bit() -> None:
    # 1e8 + (1 − 1e8) is not 1 in fp32
    assert masked(torch.tensor([1e8]), torch.tensor([1.0]), torch.ones(1), scale=1.0, mean=None).item() == 1.0


def test_rescaling_an_empty_mask_stays_aligned() -> None:
    a, f = torch.randn(9), torch.randn(9)
    assert same_bits(masked(a, f, torch.zeros(9), scale=2.0, mean=0.0), a)


def test_rescaling_a_uniform_mask_is_the_finetune() -> None:
    # The paper's rescale undoes uniform suppression: τ·m/mean(m) = τ.
    a, f = torch.randn(64), torch.randn(64)
    assert same_bits(masked(a, f, torch.full((64,), 0.25), scale=1.0, mean=0.25), f)


def test_blend_of_nothing() -> None:
    assert blend(torch.zeros(0), torch.zeros(0), torch.zeros(0)).numel() == 0


SHAPES = ((1,), (7,), (3, 5), (2, 3, 4), (65, 3), (130,), (0, 4))
GIVEN: dict[str, dict[str, Any]] = {
    "soft": {"method": "masked", "form": "soft", "scale": 0.7},
    "soft, mean": {"method": "masked", "form": "soft", "rescale": "mean"},
    "binary": {"method": "masked", "form": "binary"},
    "binary, mean": {"method": "masked", "form": "binary", "rescale": "mean", "scale": 1.5},
    "random": {"method": "random_mask"},
    "random, mean": {"method": "random_mask", "rescale": "mean", "scale": 0.5},
    "interpolation": {"method": "interpolation", "alpha": 0.3},
    "resta": {"method": "resta", "gamma": 0.4},
}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    given_=st.sampled_from(sorted(GIVEN)),
    dtypes=st.tuples(*[st.sampled_from(FLOATS)] * 3),
    out=st.sampled_from([None, "float32", "bfloat16", "float16"]),
)
def test_whole_models_against_fp64(seed: int, given_: str, dtypes: tuple[torch.dtype, ...], out: str | None) -> None:
    """Every method over odd shapes, mixed dtypes and many elements in which the models agree, rounded once at the end."""
    generator = torch.Generator().manual_seed(seed)
    models: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    logits = {}
    for i, shape in enumerate(SHAPES):
        base = torch.randn(shape, generator=generator)
        logits[f"w{i}"] = torch.randint(-3, 4, shape, generator=generator).float()
        for model, dtype in zip(models, dtypes, strict=True):
            step = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.4)
            model[f"w{i}"] = (base + step).to(dtype)
    aligned, finetune, unaligned = (MemorySource(m) for m in models)
    mask = LogitMask(logits, left_out=("w4",))
    chosen = FusionSettings(output_dtype=out, **GIVEN[given_])  # type: ignore[arg-type]
    source = FusedSource(aligned=aligned, finetune=finetune, settings=chosen, mask=mask, unaligned=unaligned)
    for name in aligned.names():
        a, f, u = (s.read(name).double() for s in (aligned, finetune, unaligned))
        dtype = getattr(torch, out) if out else torch.promote_types(dtypes[0], dtypes[1])
        if chosen.method == "interpolation":
            want = a + 0.3 * (f - a)
        elif chosen.method == "resta":
            want = f + 0.4 * (a - u)
        elif name == "w4":
            want = f
        else:
            bits = mask.values[name].double()
            m = (bits > 0).double() if chosen.form == "binary" else torch.sigmoid(bits)
            if chosen.method == "random_mask":
                m = (
                    RandomSubset(seed=0, name=name, numel=a.numel(), count=int((bits > 0).sum()))
                    .bits(0, a.numel())
                    .double()
                )
                assert int(m.sum()) == int((bits > 0).sum())
            mean = float(m.mean()) if chosen.rescale == "mean" and m.numel() else 1.0
            want = a + (chosen.scale / mean if mean else 0.0) * m * (f - a)
        got = source.read(name)
        assert got.dtype == dtype
        # a few fp32 roundings, then one to the output's type
        size = a.abs() + f.abs() + u.abs() + want.abs()
        bound = 8 * EPS * size + torch.finfo(dtype).eps * want.abs() / 2 * 1.01 + torch.finfo(dtype).smallest_normal
        assert bool(((got.double() - want).abs() <= bound).all()), name
