"""Merges of task vectors against their formulas written out, and what a shared mask does to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from components.errors import CheckpointError, ConfigError
from components.fusion import thresholds
from components.fusion.merge_functions import BLOCK, Draws, dropped, ties, weighted_sum
from components.fusion.merge_settings import MergeSettings
from components.fusion.merging import MergedSource
from components.fusion.thresholds import kth_largest_magnitude
from components.fusion.trimming import find_thresholds
from tests.components.checkpoints.tiny import MemorySource

NAMES = ("zh", "code", "math")


def family(dtype: torch.dtype = torch.float32) -> tuple[MemorySource, dict[str, MemorySource]]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"big": (3, BLOCK // 2 + 5), "small": (7,)}
    aligned = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    finetunes = {
        one: MemorySource(
            {n: (a.float() + 0.1 * torch.randn(a.shape, generator=generator)).to(dtype) for n, a in aligned.items()}
        )
        for one in NAMES
    }
    return MemorySource(aligned), finetunes


def deltas_of(aligned: MemorySource, finetunes: Mapping[str, MemorySource], name: str) -> np.ndarray:
    """[T, N] in fp64."""
    base = aligned.tensors[name].double().reshape(-1)
    return np.stack([(f.tensors[name].double().reshape(-1) - base).numpy() for f in finetunes.values()])


def literal_ties(deltas: np.ndarray, keep: float, *, mean: bool) -> np.ndarray:
    """As in the paper, a whole tensor at a time."""
    trimmed = deltas.copy()
    for row in trimmed:
        k = max(1, round(keep * row.size))
        row[np.abs(row) < np.sort(np.abs(row))[-k]] = 0
    elected = np.sign(trimmed.sum(axis=0))
    agree = (np.sign(trimmed) == elected) & (trimmed != 0)
    total = (trimmed * agree).sum(axis=0)
    return total / np.maximum(agree.sum(axis=0), 1) if mean else total


def merged(settings: MergeSettings, aligned: MemorySource, finetunes: Mapping[str, MemorySource]) -> MergedSource:
    thresholds = find_thresholds(aligned, finetunes, settings) if settings.method == "ties" else None
    return MergedSource(aligned, finetunes, settings, thresholds)


@pytest.mark.parametrize("name", ["big", "small"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_and_task_arithmetic_are_their_formulas(name: str, dtype: torch.dtype) -> None:
    aligned, finetunes = family(dtype)
    base, deltas = aligned.tensors[name].double().reshape(-1).numpy(), deltas_of(aligned, finetunes, name)
    average = merged(MergeSettings(method="average"), aligned, finetunes).read(name)
    np.testing.assert_allclose(average.numpy(), base + deltas.mean(axis=0), rtol=0, atol=1e-6)
    settings = MergeSettings(method="task_arithmetic", scale=0.4, weights={"code": 2.0})
    summed = merged(settings, aligned, finetunes).read(name)
    np.testing.assert_allclose(summed.numpy(), base + 0.4 * (deltas[0] + 2 * deltas[1] + deltas[2]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("aggregate", ["mean", "sum"])
@pytest.mark.parametrize("name", ["big", "small"])
def test_ties_is_its_formula(name: str, aggregate: str) -> None:
    aligned, finetunes = family()
    settings = MergeSettings(method="ties", scale=0.7, density=0.3, aggregate=aggregate)  # type: ignore[arg-type]
    want = literal_ties(deltas_of(aligned, finetunes, name), 0.3, mean=aggregate == "mean")
    got = merged(settings, aligned, finetunes).read(name).double().numpy()
    base = aligned.tensors[name].double().reshape(-1).numpy()
    # fp32 and fp64 differences may order two near-equal magnitudes differently: at the very threshold only.
    wrong = np.abs(got - (base + 0.7 * want)) > 1e-6
    assert wrong.sum() <= len(NAMES)


def test_ties_over_the_whole_model_has_one_threshold() -> None:
    aligned, finetunes = family()
    settings = MergeSettings(method="ties", threshold="model", density=0.25)
    found = find_thresholds(aligned, finetunes, settings)
    for i, one in enumerate(NAMES):
        everything = np.concatenate([np.abs(deltas_of(aligned, finetunes, n)[i]) for n in aligned.names()])
        want = np.sort(everything)[-round(0.25 * everything.size)]
        assert found[one]["big"] == found[one]["small"] == pytest.approx(want, rel=1e-6)


def test_each_finetune_and_tensor_may_have_a_density_of_its_own() -> None:
    aligned, finetunes = family()
    own: dict[str, Any] = {"densities": {"zh": 0.9, "code": {"sm*": 0.5, "*": 0.1}}, "density": 0.3}
    shares = {"big": (0.9, 0.1, 0.3), "small": (0.9, 0.5, 0.3)}
    found = find_thresholds(aligned, finetunes, MergeSettings(method="ties", **own))
    for name, of in shares.items():
        for row, one, share in zip(deltas_of(aligned, finetunes, name), NAMES, of, strict=True):
            want = np.sort(np.abs(row))[-max(1, round(share * row.size))]
            assert found[one][name] == pytest.approx(want, rel=1e-6)
    base, merge = aligned.tensors["big"].reshape(-1), MergeSettings(method="dare", seed=4, **own)
    got = merged(merge, aligned, finetunes).read("big")
    drops = [
        dropped(
            finetunes[one].tensors["big"].reshape(-1) - base,
            Draws(seed=4, name=f"{one}/big").at(0, base.numel()),
            keep=share,
        )
        for one, share in zip(NAMES, shares["big"], strict=True)
    ]
    torch.testing.assert_close(got, base + drops[0] + drops[1] + drops[2], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        ({"densities": {"zh": {}}}, "no pattern is given"),
        ({"densities": {"zh": 0}}, "above 0 and at most 1"),
        ({"densities": {"zh": {"*": 1.5}}}, "above 0 and at most 1"),
        ({"densities": {"zh": {"*": 0.5}}, "threshold": "model"}, "whole model has one density"),
    ],
)
def test_densities_that_mean_nothing_are_refused(own: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        MergeSettings(method="ties", **own)
    aligned, finetunes = family()
    unknown = MergeSettings(method="dare", densities={"zh": {"attention": 0.5}, "hi": 0.5})
    with pytest.raises(
        ConfigError, match=r"densities names 'hi'.*densities of zh: pattern 'attention' matches no tensor"
    ):
        MergedSource(aligned, finetunes, unknown)


def test_dare_drops_its_share_and_keeps_the_mean() -> None:
    ones = torch.ones(200_000)
    found = dropped(ones.clone(), Draws(seed=1, name="zh/w").at(0, 200_000), keep=0.8)
    assert sorted(set(found.tolist())) == [0.0, 1.25]
    assert float((found > 0).float().mean()) == pytest.approx(0.8, abs=0.005)
    for other in ({"seed": 2}, {"name": "code/w"}):
        drawn = Draws(**{"seed": 1, "name": "zh/w", **other}).at(0, 200_000)  # type: ignore[arg-type]
        again = dropped(ones.clone(), drawn, keep=0.8)
        assert float((again == found).float().mean()) == pytest.approx(0.8**2 + 0.2**2, abs=0.01)


def test_draws_are_the_same_however_they_are_asked_for() -> None:
    whole = Draws(seed=1, name="zh/w").at(0, 10_000)
    chi_square = float((((np.bincount((whole.astype(np.int32) + 32_768) >> 12, minlength=16) - 625) ** 2) / 625).sum())
    assert chi_square < 45  # 15 degrees of freedom: one in ten thousand
    draws = Draws(seed=1, name="zh/w")
    for start, count in ((777, 2222), (2999, 1), (3000, 5), (3005, 4000), (0, 3), (3, 9_997), (9_999, 1), (4, 0)):
        assert np.array_equal(draws.at(start, count), whole[start : start + count]), (start, count)


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties", "dare"])
def test_a_slice_has_the_bits_of_the_whole(method: str) -> None:
    aligned, finetunes = family()
    source = merged(MergeSettings(method=method), aligned, finetunes)  # type: ignore[arg-type]
    whole = source.read("big")
    for start, stop in ((0, 1), (13, 4099), (BLOCK - 3, BLOCK + 3), (whole.numel() - 5, whole.numel())):
        assert torch.equal(source.read("big", start, stop), whole[start:stop])


def test_signs_that_nearly_cancel_are_elected_alike_in_every_slice() -> None:
    generator = torch.Generator().manual_seed(5)
    deltas = [(torch.randn(4_000, generator=generator) * 8).round() / 8 + 0.1 * (i % 2) for i in range(7)]
    limits, weights = [0.2] * 7, [1.0] * 7
    whole = ties(deltas, weights, limits, mean=True)
    for size in (13, 31, 64):
        parts = [ties([d[at : at + size] for d in deltas], weights, limits, mean=True) for at in range(0, 4_000, size)]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties", "dare"])
def test_the_gradient_of_a_shared_mask_is_that_of_the_merge_of_masked_task_vectors(method: str) -> None:
    """Autograd through a + λ Merge({m ⊙ τ_t}) as written, against (∂L/∂w)(merged − a)."""
    aligned, finetunes = family()
    settings = MergeSettings(method=method, scale=0.5)  # type: ignore[arg-type]
    source = merged(settings, aligned, finetunes)
    base = aligned.tensors["small"].double()
    deltas = torch.from_numpy(deltas_of(aligned, finetunes, "small"))
    mask = torch.linspace(0.1, 0.9, base.numel(), dtype=torch.float64, requires_grad=True)
    masked = [mask * d for d in deltas]
    if method == "average":
        joined = torch.stack(masked).mean(dim=0)
    elif method == "task_arithmetic":
        joined = torch.stack(masked).sum(dim=0)
    elif method == "dare":
        keeps = [
            dropped(torch.ones(7), Draws(seed=0, name=f"{one}/small").at(0, 7), keep=0.8).double() for one in NAMES
        ]
        joined = torch.stack([d * k for d, k in zip(masked, keeps, strict=True)]).sum(dim=0)
    else:
        limits = find_thresholds(aligned, finetunes, settings)
        kept = torch.stack(
            [m * (d.abs() >= limits[one]["small"] - 1e-9) for m, d, one in zip(masked, deltas, NAMES, strict=True)]
        )
        agree = (kept.sign() == kept.sum(dim=0).sign()) & (kept != 0)
        joined = (kept * agree).sum(dim=0) / agree.sum(dim=0).clamp_min(1)
    weights = base + 0.5 * joined
    pull = torch.sin(torch.arange(7.0, dtype=torch.float64))
    (weights * pull).sum().backward()
    assert mask.grad is not None
    expected = pull * (source.read("small").double() - base)
    torch.testing.assert_close(mask.grad, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        weights.detach(), base + mask.detach() * (source.read("small").double() - base), rtol=0, atol=1e-6
    )


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=300), st.data())
@settings(max_examples=60, deadline=None)
def test_the_kth_largest_magnitude_is_exact(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    tensor = torch.tensor(values)
    pieces = torch.split(tensor, 7)
    expected = float(tensor.abs().sort(descending=True).values[k - 1])
    assert kth_largest_magnitude(lambda: iter(pieces), k) == expected
    # A sample may be good, poor or misleading.
    taken = data.draw(st.lists(st.sampled_from(values), min_size=1, max_size=50))
    sampled = kth_largest_magnitude(lambda: iter(pieces), k, numel=len(values), sample=torch.tensor(taken))
    assert sampled == expected


@pytest.mark.parametrize("coarse", [False, True], ids=["distinct", "few values"])
@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.999, 1.0])
def test_a_sample_saves_the_other_passes(share: float, coarse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thresholds, "_WAITING", 5000)
    tensor = torch.randn(400_000, generator=torch.Generator().manual_seed(1))
    if coarse:
        tensor = (tensor * 8).round() / 8
    passes = []

    def values() -> Iterator[torch.Tensor]:
        passes.append(1)
        yield from tensor.clone().split(10_000)

    k = round(share * tensor.numel())
    found = kth_largest_magnitude(values, k, numel=tensor.numel(), sample=tensor[::50].clone())
    assert found == float(tensor.abs().sort(descending=True).values[k - 1])
    assert len(passes) == 1


def test_equal_task_vectors_survive_every_merge_that_averages() -> None:
    delta = torch.tensor([0.5, -0.25, 0.125])
    assert torch.equal(weighted_sum([delta.clone(), delta.clone()], [0.5, 0.5]), delta)
    assert torch.equal(ties([delta.clone(), delta.clone(), -delta], [1.0] * 3, [0.0] * 3, mean=True), delta)


def test_what_does_not_fit_is_refused() -> None:
    aligned, finetunes = family()
    finetunes["code"] = MemorySource({"big": aligned.tensors["big"]})
    with pytest.raises(CheckpointError, match=r"code: .*small"):
        MergedSource(aligned, finetunes, MergeSettings(method="average"))
    counts = MemorySource({"n": torch.tensor([1, 2])})
    source = MergedSource(
        counts, {"a": counts, "b": MemorySource({"n": torch.tensor([1, 3])})}, MergeSettings(method="average")
    )
    with pytest.raises(CheckpointError, match="integers that differ in b"):
        source.read("n")


def test_settings_refuse_what_the_method_ignores() -> None:
    assert (MergeSettings(method="ties").kept, MergeSettings(method="dare").kept) == (0.2, 0.8)
    assert MergeSettings(method="average", seed=0).kept == 1.0
    with pytest.raises(ValidationError, match="average has no use for density"):
        MergeSettings(method="average", density=0.5)
    with pytest.raises(ValidationError, match="dare has no use for aggregate, threshold"):
        MergeSettings(method="dare", threshold="model", aggregate="sum")
