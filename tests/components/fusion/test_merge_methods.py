"""Every merge against its formula written out a whole tensor at a time in fp64, over odd shapes, zeros, ties and dtypes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from components.errors import ConfigError
from components.fusion.fused import FusedSource
from components.fusion.merge_functions import Angle, Draws, angle_between, dropped, slerp
from components.fusion.merge_settings import MERGE_PAPERS, MergeSettings, merge_problems
from components.fusion.merging import MergedSource
from components.fusion.settings import FusionSettings
from components.fusion.trimming import find_thresholds
from components.records import canonical_json
from tests.components.checkpoints.tiny import LogitMask, MemorySource

Array = np.ndarray[Any, Any]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TASK_METHODS = ("average", "task_arithmetic", "ties", "dare", "dare_ties")
SHAPES = ((1,), (7,), (3, 5), (2, 3, 4), (65, 3), (130,), (5, 0))
NAMES = ("zh", "hi", "code")


def drawn(seed: int, count: int) -> tuple[MemorySource, dict[str, MemorySource]]:
    """A family on a coarse grid: many equal magnitudes, many zeros of τ, sums that cancel; dtypes as they fall."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = [FLOATS[int(i)] for i in torch.randint(0, 3, (count + 1,), generator=generator)]
    aligned, tensors = {}, [{} for _ in range(count)]  # type: ignore[var-annotated]
    for i, shape in enumerate(SHAPES):
        base = torch.randint(-16, 17, shape, generator=generator) / 8
        aligned[f"layers.{i}.w"] = base.to(dtypes[0])
        for one, dtype in zip(tensors, dtypes[1:], strict=True):
            step = torch.randint(-3, 4, shape, generator=generator) / 8
            one[f"layers.{i}.w"] = (base + step).to(dtype)
    return MemorySource(aligned), {n: MemorySource(t) for n, t in zip(NAMES, tensors, strict=False)}


def fp64(source: MemorySource, name: str) -> Array:
    return source.tensors[name].double().reshape(-1).numpy()


def reference(
    aligned: MemorySource,
    finetunes: Mapping[str, MemorySource],
    chosen: MergeSettings,
    name: str,
    mask: Array | float = 1.0,
) -> Array:
    """λ Merge({m ⊙ τ}) of one tensor, a weight at a time; what TIES trims is decided by τ without the mask."""
    base = fp64(aligned, name)
    deltas = [fp64(f, name) - base for f in finetunes.values()]
    kept = [np.ones(base.size, bool) for _ in deltas]
    if chosen.method == "ties":
        for i, source in enumerate(finetunes.values()):
            names = [name] if chosen.threshold == "tensor" else aligned.names()
            sizes = np.concatenate([np.abs(fp64(source, n) - fp64(aligned, n)) for n in names])
            if sizes.size:
                limit = np.sort(sizes)[-max(1, round(chosen.kept * sizes.size))]
                kept[i] = np.abs(deltas[i]) >= limit
    if chosen.method in ("dare", "dare_ties"):
        for i, one in enumerate(finetunes):
            ones = torch.ones(base.size)
            drawn = Draws(seed=chosen.seed, name=f"{one}/{name}").at(0, base.size)
            drops = dropped(ones, drawn, keep=chosen.kept)
            kept[i] = drops.numpy() > 0
            deltas[i] = deltas[i] / chosen.kept
    out = np.zeros(base.size)
    weights = [float(chosen.weights.get(one, 1.0)) for one in finetunes]  # type: ignore[arg-type]
    for at in range(base.size):
        m = mask if isinstance(mask, float) else mask[at]
        values = [w * m * d[at] * k[at] for w, d, k in zip(weights, deltas, kept, strict=True)]
        if chosen.method == "average":
            out[at] = sum(values) / len(values)
        elif chosen.method in ("ties", "dare_ties"):
            sign = np.sign(round(sum(values), 12))
            agree = [(v, abs(w)) for v, w in zip(values, weights, strict=True) if v != 0 and np.sign(v) == sign]
            total, share = sum(v for v, _ in agree), sum(w for _, w in agree)
            out[at] = total / share if agree and chosen.aggregate == "mean" else total
        else:
            out[at] = sum(values)
    return chosen.scale * out


def merged(chosen: MergeSettings, aligned: MemorySource, finetunes: Mapping[str, MemorySource]) -> MergedSource:
    thresholds = find_thresholds(aligned, finetunes, chosen) if chosen.method == "ties" else None
    return MergedSource(aligned, finetunes, chosen, thresholds)


@st.composite
def choices(draw: st.DrawFn) -> MergeSettings:
    method = draw(st.sampled_from(TASK_METHODS))
    given: dict[str, Any] = {"method": method, "scale": draw(st.sampled_from([0.3, 1.0, 2.5]))}
    if method != "average":
        # powers of two: a sum that cancels does so in fp32 and fp64 alike
        given["weights"] = {"zh": draw(st.sampled_from([0.5, 1.0, 2.0, -1.0]))}
    if method in ("dare", "dare_ties"):
        given["density"] = draw(st.sampled_from([0.25, 0.5, 1.0]))
    if method == "ties":
        given["density"] = draw(st.sampled_from([0.05, 0.2, 0.5, 1.0]))
        given["threshold"] = draw(st.sampled_from(["tensor", "model"]))
    if method in ("ties", "dare_ties"):
        given["aggregate"] = draw(st.sampled_from(["mean", "sum"]))
    if method in ("dare", "dare_ties"):
        given["seed"] = draw(st.integers(0, 5))
    return MergeSettings(**given)


@given(seed=st.integers(0, 10**6), count=st.sampled_from([1, 3]), chosen=choices())
@hypothesis_settings(max_examples=60, deadline=None)
def test_merges_are_their_formulas(seed: int, count: int, chosen: MergeSettings) -> None:
    aligned, finetunes = drawn(seed, count)
    source = merged(chosen, aligned, finetunes)
    for name in aligned.names():
        want = fp64(aligned, name) + reference(aligned, finetunes, chosen, name)
        got = source.read(name)
        assert got.dtype == torch.float32
        # a dozen fp32 roundings of sums that stay below 64
        np.testing.assert_allclose(got.double().numpy(), want, rtol=0, atol=12 * 64 * 2.0**-24)
        size = want.size
        for start, stop in ((0, size // 2), (size // 3, size), (size // 2, size // 2)):
            assert torch.equal(source.read(name, start, stop), got[start:stop])


@given(seed=st.integers(0, 10**6), chosen=choices(), form=st.sampled_from(["soft", "binary"]))
@hypothesis_settings(max_examples=40, deadline=None)
def test_a_shared_mask_goes_through_every_merge(seed: int, chosen: MergeSettings, form: str) -> None:
    """m ⊙ Merge({τ}), as a mask over the merged model computes it, is Merge({m ⊙ τ}) with the thresholds of τ."""
    aligned, finetunes = drawn(seed, 3)
    generator = torch.Generator().manual_seed(seed)
    # logits of whole numbers: a soft mask never takes a weight below what fp64 tells from zero
    logits = {n: torch.randint(-3, 4, t.shape, generator=generator) for n, t in aligned.tensors.items()}
    mask = LogitMask(logits)
    fused = FusedSource(
        aligned=aligned,
        finetune=merged(chosen, aligned, finetunes),
        settings=FusionSettings(method="masked", form=form),  # type: ignore[arg-type]
        mask=mask,
    )
    for name in aligned.names():
        size = fp64(aligned, name).size
        soft = mask.soft(name, 0, size) if form == "soft" else mask.binary(name, 0, size)
        want = fp64(aligned, name) + reference(aligned, finetunes, chosen, name, soft.double().numpy())
        np.testing.assert_allclose(fused.read(name).double().numpy(), want, rtol=0, atol=16 * 64 * 2.0**-24)


def test_weights_and_layers_may_be_patterns_and_the_first_match_counts() -> None:
    aligned, finetunes = drawn(1, 3)
    chosen = MergeSettings(
        method="task_arithmetic",
        scale=2.0,
        weights={"zh": 0.25, "hi": {"layers.[0-2].*": 0.5, "layers.2.w": 9.0, "layers.3.*": -1.0}},
        layers={"layers.4.*": 0.0, "layers.[45].*": 3.0},
    )
    source = MergedSource(aligned, finetunes, chosen)
    for i, name in enumerate(aligned.names()):
        hi = [0.5, 0.5, 0.5, -1.0, 1.0, 1.0, 1.0][i]
        layer = [1.0, 1.0, 1.0, 1.0, 0.0, 3.0, 1.0][i]
        base = fp64(aligned, name)
        zh, other, code = (fp64(finetunes[n], name) - base for n in NAMES)
        want = base + 2.0 * layer * (0.25 * zh + hi * other + code)
        np.testing.assert_allclose(source.read(name).double().numpy(), want, rtol=0, atol=1e-5)


def test_patterns_keep_their_order_through_json_with_sorted_keys() -> None:
    chosen = MergeSettings(
        method="ties", weights={"hi": {"z*": 1.0, "*": 0.5}, "zh": 2.0}, layers={"model.norm*": 0.0, "*": 1.5}
    )
    again = MergeSettings(**json.loads(canonical_json(chosen.model_dump(mode="json"))))
    assert again == chosen
    assert again.weights["hi"] == (("z*", 1.0), ("*", 0.5))
    other = MergeSettings(method="ties", weights={"hi": {"*": 0.5, "z*": 1.0}, "zh": 2.0}, layers=chosen.layers)
    assert canonical_json(other.model_dump(mode="json")) != canonical_json(chosen.model_dump(mode="json"))


def test_what_fits_no_model_or_tensor_is_refused_all_at_once() -> None:
    aligned, finetunes = drawn(0, 3)
    chosen = MergeSettings(
        method="ties", weights={"ja": 1.0, "hi": {"layers.9.*": 1.0, "*": 1.0}}, layers={"head*": 2.0}
    )
    with pytest.raises(ConfigError) as caught:
        MergedSource(aligned, finetunes, chosen, {one: {} for one in finetunes})
    for part in (
        "weights names 'ja', which is not there",
        "layers: pattern 'head*' matches no tensor",
        "weights of hi: pattern 'layers.9.*' matches no tensor",
        "the finetunes are zh, hi, code",
    ):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match=r"slerp is between two models: .* given are 3"):
        MergedSource(aligned, finetunes, MergeSettings(method="slerp", t=0.5))
    with pytest.raises(ConfigError, match=r"t: no pattern matches layers\.1\.w"):
        MergedSource(aligned, {"zh": finetunes["zh"]}, MergeSettings(method="slerp", t={"layers.0.*": 0.5}))
    assert merge_problems(MergeSettings(method="ties", weights={"zh": {"nothing": 1.0}}), ["zh"]) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "slerp"}, "slerp needs t"),
        ({"method": "slerp", "t": 1.5}, r"t is outside 0 … 1"),
        ({"method": "slerp", "t": {"*": -0.1}}, r"t is outside 0 … 1"),
        ({"method": "slerp", "t": 0.5, "scale": 2.0}, "slerp has no use for scale"),
        ({"method": "slerp", "t": 0.5, "weights": {"a": 1.0}}, "slerp has no use for weights"),
        ({"method": "average", "t": 0.5}, "average has no use for t"),
        ({"method": "dare_ties", "threshold": "model"}, "dare_ties has no use for threshold"),
        ({"method": "ties", "seed": 1}, "ties has no use for seed"),
        ({"method": "ties", "weights": {"a": {}}}, "weights of a: no pattern is given"),
        ({"method": "ties", "weights": {"a": {"*": float("nan")}}}, "finite"),
        ({"method": "ties", "layers": {"*": float("inf")}}, "finite"),
    ],
)
def test_settings_that_say_nothing_or_too_much_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MergeSettings(**wrong)


def test_every_method_says_where_it_was_published() -> None:
    assert set(MERGE_PAPERS) == set(MergeSettings.model_fields["method"].annotation.__args__)  # type: ignore[union-attr]
    assert all(url.startswith("https://") for papers in MERGE_PAPERS.values() for url in papers)


def literal_slerp(x: Array, y: Array, t: float) -> Array:
    """Rotates in the plane of the two directions, each direction with its own length: another way to write the arc."""
    norms = np.linalg.norm(x) * np.linalg.norm(y)
    if not norms or abs(x @ y / norms) > 0.9995:
        return (1 - t) * x + t * y
    omega = math.acos(x @ y / norms)
    along, across = np.linalg.solve(
        [[1.0, math.cos(omega)], [0.0, math.sin(omega)]], [math.cos(t * omega), math.sin(t * omega)]
    )
    return along * x + across * y


@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(1,), (7,), (33, 5)]),
    t=st.sampled_from([0.0, 0.1, 0.5, 0.77, 1.0]),
    near=st.sampled_from([0.0, 0.001, 0.5, 5.0, -2.0]),
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
    pair=st.booleans(),
)
@hypothesis_settings(max_examples=60, deadline=None)
def test_slerp_is_the_arc(
    seed: int, shape: tuple[int, ...], t: float, near: float, dtypes: tuple[torch.dtype, torch.dtype], pair: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtypes[0])
    y = torch.randn(shape, generator=generator) * near if near >= 0.5 else x.float() * (1 + near)
    first, second = MemorySource({"w": x}), MemorySource({"w": y.to(dtypes[1])})
    bystander = MemorySource({"w": torch.full(shape, 7.0)})
    chosen = MergeSettings(method="slerp", t=t)
    source = (
        MergedSource(bystander, {"a": first, "b": second}, chosen)
        if pair
        else MergedSource(first, {"b": second}, chosen)
    )
    want = literal_slerp(fp64(first, "w"), fp64(second, "w"), t)
    got = source.read("w")
    bound = 8 * 2.0**-24 * (np.abs(fp64(first, "w")) + np.abs(fp64(second, "w"))) * 32 + 1e-30
    assert (np.abs(got.double().numpy() - want) <= bound).all()
    half = got.numel() // 2
    assert torch.equal(torch.cat([source.read("w", 0, half), source.read("w", half)]), got)
    if t in (0, 1):
        assert torch.equal(got, (second if t else first).tensors["w"].float().reshape(-1))


def test_slerp_of_equal_and_of_zero_weights() -> None:
    x = MemorySource({"w": torch.randn(1000, generator=torch.Generator().manual_seed(0))})
    zero = MemorySource({"w": torch.zeros(1000)})
    for t in (0.3, 0.5, 0.9):
        assert torch.equal(MergedSource(x, {"b": x}, MergeSettings(method="slerp", t=t)).read("w"), x.tensors["w"])
    half = MergedSource(zero, {"b": x}, MergeSettings(method="slerp", t=0.5)).read("w")
    assert torch.equal(half, x.tensors["w"] * 0.5)


def test_the_angle_is_taken_in_fp64_of_the_whole_tensor() -> None:
    """Sums in fp32 would lose the small part; half a million elements are several blocks."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(500_003, generator=generator) * 10.0 ** torch.randint(-3, 4, (500_003,), generator=generator)
    y = x.roll(1).bfloat16()
    found = angle_between(MemorySource({"w": x}), MemorySource({"w": y}), "w")
    a, b = x.double().numpy(), y.double().numpy()
    assert found.dot == pytest.approx(math.fsum((a * b).tolist()), rel=1e-12)
    assert found.first == pytest.approx(math.sqrt(math.fsum((a * a).tolist())), rel=1e-14)
    assert found.second == pytest.approx(math.sqrt(math.fsum((b * b).tolist())), rel=1e-14)
    assert Angle(1.0, 0.0, 2.0).cosine is None
    assert Angle(4.0000001, 2.0, 2.0).cosine == 1.0


def test_the_arc_keeps_the_norm_where_the_line_does_not() -> None:
    x, y = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
    middle = slerp(x, y, t=0.5, angle=Angle(0.0, 3.0, 3.0))
    assert float(middle.norm()) == pytest.approx(3.0, rel=1e-6)
