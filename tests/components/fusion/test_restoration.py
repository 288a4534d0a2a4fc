"""Safe LoRA, SafeMERGE and LoX against their formulas on whole matrices in fp64, whichever way the products are taken."""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from components.checkpoints.adapters import LoraSource
from components.checkpoints.reference import open_checkpoint
from components.checkpoints.source import read_whole
from components.errors import CheckpointError, ConfigError
from components.fusion import restoration
from components.fusion.fused import FusedSource
from components.fusion.restoration import Lineage, RowProduct, cosines, low_rank_direction, projection
from components.fusion.settings import FusionSettings
from tests.components.checkpoints.test_adapters import make_adapter
from tests.components.checkpoints.tiny import MemorySource, gpt2, llama, perturbed, same_bits, save

Array = np.ndarray[Any, Any]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MATRICES = {"tall": (41, 6), "wide": (5, 33), "square": (9, 9), "one": (1, 1), "column": (17, 1), "row": (1, 17)}
OTHERS = {"vector": (23,), "experts": (2, 5, 4), "empty": (0, 7)}


def drawn(seed: int, dtypes: tuple[torch.dtype, ...] = (torch.float32,) * 4) -> list[MemorySource]:
    """Aligned, finetune, unaligned and a safe finetune; `still` is equal in the first two, `unmoved` in aligned and
    unaligned."""
    generator = torch.Generator().manual_seed(seed)
    models: list[dict[str, torch.Tensor]] = [{}, {}, {}, {}]
    for name, shape in {**MATRICES, **OTHERS, "still": (4, 6), "unmoved": (6, 4)}.items():
        base = torch.randn(shape, generator=generator)
        for i, model in enumerate(models):
            same = i == 0 or (name, i) in (("still", 1), ("unmoved", 2))
            noise = torch.zeros(shape) if same else torch.randn(shape, generator=generator) * (0, 0.5, 0.7, 0.2)[i]
            model[name] = (base + noise).to(dtypes[0] if same else dtypes[i])
    return [MemorySource(m) for m in models]


def fp64(source: Any, name: str) -> Array:
    return read_whole(source, name).double().numpy()  # type: ignore[no-any-return]


def literal(lineage: Lineage, name: str, *, transposed: bool = False) -> tuple[Array, float]:
    """C Δ with C written out, and its cosine with Δ."""
    a, f, u = (fp64(s, name) for s in (lineage.aligned, lineage.finetune, lineage.unaligned))
    v, delta = (a - u, f - a) if not transposed else ((a - u).T, (f - a).T)
    projected = (v @ v.T) / np.linalg.norm(v) @ delta
    cosine = (projected * delta).sum() / (np.linalg.norm(projected) * np.linalg.norm(delta))
    return (projected.T if transposed else projected), float(cosine)


@pytest.fixture(params=[3, 16, 1 << 20], ids=["rows", "tiles", "whole"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Elements of a tile: of one row or two, of several, of everything."""
    monkeypatch.setattr(restoration, "_TILE", request.param)
    return int(request.param)


@given(seed=st.integers(0, 10**6), dtypes=st.tuples(*[st.sampled_from(FLOATS)] * 4))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_projection_is_its_formula(tile: int, seed: int, dtypes: tuple[torch.dtype, ...]) -> None:
    aligned, finetune, unaligned, _ = drawn(seed, dtypes)
    lineage = Lineage(aligned, finetune, unaligned)
    for name, shape in MATRICES.items():
        delta = fp64(finetune, name) - fp64(aligned, name)
        found = projection(lineage, name)
        if not delta.any() or not (fp64(aligned, name) - fp64(unaligned, name)).any():
            assert found is None
            continue
        assert found is not None
        want, cosine = literal(lineage, name)
        got = found.product.read(0, want.size).double().numpy().reshape(shape)
        # fp32 differences and products of some dozen terms, each at most |V| (|V|ᵀ |Δ|) / ‖V‖
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1.0, np.abs(want).max()))
        assert found.cosine == pytest.approx(cosine, abs=1e-4)
        for start, stop in ((0, 1), (want.size // 3, want.size), (want.size // 2, want.size // 2 + 1)):
            assert same_bits(found.product.read(start, stop), found.product.read(0, want.size)[start:stop])
    assert projection(lineage, "still") is None or dtypes[0] != dtypes[1]
    assert projection(lineage, "unmoved") is None


class Largest(TorchDispatchMode):
    """The most elements that any operation gave."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("shape", [(900, 4), (4, 900)])
def test_no_square_matrix_of_the_longer_side_is_built(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    models = [MemorySource({"w": torch.randn(shape, generator=generator)}) for _ in range(3)]
    with Largest() as seen, FlopCounterMode(display=False) as counter:
        found = projection(Lineage(*models), "w")
        assert found is not None
        assert counter.get_total_flops() == 2 * 2 * 3600 * 4  # twice by the shorter side
        found.product.read(0, 3600)
    assert seen.numel == 3600 < 900 * 900


def fused(method: str, models: list[MemorySource], *, safe: bool = False, **given: Any) -> FusedSource:
    aligned, finetune, unaligned, safer = models
    return FusedSource(
        aligned=aligned,
        finetune=finetune,
        unaligned=unaligned,
        safe=safer if safe else None,
        settings=FusionSettings(method=method, **given),  # type: ignore[arg-type]
    )


@given(
    seed=st.integers(0, 10**6),
    similarity=st.sampled_from([-1.0, 0.0, 0.3, 0.5, 0.7, 1.0]),
    method=st.sampled_from(["safe_lora", "safe_merge", "safe_merge to a model"]),
    share=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
)
@settings(max_examples=30, deadline=None)
def test_matrices_that_strayed_are_restored_and_the_rest_is_the_finetune(
    seed: int, similarity: float, method: str, share: float
) -> None:
    models = drawn(seed, (torch.float32, torch.bfloat16, torch.float32, torch.float16))
    aligned, finetune, unaligned, safe = models
    lineage = Lineage(aligned, finetune, unaligned)
    own = {} if method == "safe_lora" else {"safe_share": share}
    source = fused(
        method.split()[0], models, safe=method.endswith("model"), similarity=similarity, output_dtype="float32", **own
    )
    for name in aligned.names():
        got = source.read(name)
        a, f = fp64(aligned, name).reshape(-1), fp64(finetune, name).reshape(-1)
        want = f
        # `one` and the like have cosines of 1 up to rounding
        if name in MATRICES and literal(lineage, name)[1] <= similarity + 1e-6:
            projected = literal(lineage, name)[0].reshape(-1)
            if method == "safe_lora":
                want = a + projected
            else:
                other = fp64(safe, name).reshape(-1) - a if method.endswith("model") else projected
                want = a + (1 - share) * (f - a) + share * other
            np.testing.assert_allclose(
                got.double().numpy(), want, rtol=0, atol=2e-5 * max(1.0, np.abs(want).max(initial=0))
            )
        else:
            assert same_bits(got, finetune.tensors[name].float().reshape(-1)), name


@pytest.mark.parametrize("method", ["safe_lora", "safe_merge"])
@pytest.mark.parametrize("count", [1, 3, 6, 50])
def test_the_lowest_are_restored(method: str, count: int) -> None:
    models = drawn(11)
    source = fused(method, models, lowest=count)
    aligned, finetune, unaligned, _ = models
    found = cosines(Lineage(aligned, finetune, unaligned))
    assert set(found) == set(MATRICES)
    expected = sorted(found, key=found.__getitem__)[:count]
    changed = [n for n in aligned.names() if not torch.equal(source.read(n), finetune.read(n))]
    assert sorted(changed) == sorted(expected)
    # What was found out once can be handed on; several processes find the same.
    settled = source.settled()
    assert fused(method, models, lowest=count).settled(processes=2) == settled
    assert settled.lowest is None
    again = FusedSource(aligned=aligned, finetune=finetune, unaligned=unaligned, settings=settled)
    assert all(same_bits(again.read(n), source.read(n)) for n in aligned.names())
    assert FusionSettings(**settled.model_dump()) == settled


def test_the_lowest_of_none() -> None:
    aligned, _, unaligned, safe = drawn(3)
    assert fused("safe_lora", [aligned, aligned, unaligned, safe], lowest=2).read("tall").equal(aligned.read("tall"))


@given(seed=st.integers(0, 10**6), rank=st.integers(1, 12), gamma=st.floats(-2, 2), of=st.sampled_from(["f", "a"]))
@settings(max_examples=25, deadline=None)
def test_lox_adds_the_best_of_its_rank(seed: int, rank: int, gamma: float, of: str) -> None:
    models = drawn(seed, (torch.bfloat16, torch.float32, torch.float16, torch.float32))
    aligned, finetune, unaligned, safe = models
    start = finetune if of == "f" else aligned
    source = fused("lox", [aligned, start, unaligned, safe], rank=rank, gamma=gamma, output_dtype="float32")
    for name in aligned.names():
        want = fp64(start, name)
        if name in (*MATRICES, "still"):
            u, s, v = np.linalg.svd(fp64(aligned, name) - fp64(unaligned, name), full_matrices=False)
            kept = min(rank, s.size)
            if kept < s.size and s[kept - 1] - s[kept] < 1e-2 * s[0]:
                continue  # two nearest matrices, nearly
            want = want + gamma * (u[:, :kept] * s[:kept]) @ v[:kept]
        np.testing.assert_allclose(source.read(name).double().numpy(), want.reshape(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "given", [{"method": "safe_lora", "similarity": 1.0}, {"method": "lox", "gamma": 0.5, "rank": 2}]
)
def test_a_slice_has_the_bits_of_the_whole(tile: int, given: dict[str, Any]) -> None:
    models = drawn(5, (torch.bfloat16, torch.float32, torch.bfloat16, torch.float32))
    given = dict(given)
    source = fused(given.pop("method"), models, **given)
    for name in ("tall", "wide", "square"):
        whole = source.read(name)
        for start, stop in ((0, 1), (7, 20), (63, 66), (whole.numel() - 3, whole.numel())):
            assert same_bits(source.read(name, start, stop), whole[start : min(stop, whole.numel())])


def test_the_matrices_of_one_tensor_are_held_at_a_time() -> None:
    before = sum(isinstance(o, RowProduct) for o in gc.get_objects())
    source = fused("lox", drawn(5), gamma=1.0, rank=2)
    for name in source.names():
        source.read(name)
    gc.collect()
    assert sum(isinstance(o, RowProduct) for o in gc.get_objects()) <= before + 1


ADAPTERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (llama, {"target_modules": ["v_proj", "down_proj", "up_proj"], "r": 3, "layers_to_transform": [1]}),
    "embedding": (llama, {"target_modules": ["embed_tokens"], "r": 2}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "attn.c_proj", "c_fc"], "r": 4, "use_rslora": True}),
}


@pytest.mark.parametrize("tile", [200, 1 << 20], indirect=True, ids=["tiles", "whole"])
@pytest.mark.parametrize("case", ADAPTERS)
def test_a_lora_is_projected_by_its_factors(case: str, tile: int, tmp_path: Path) -> None:
    make, config = ADAPTERS[case]
    save(make(0), tmp_path / "aligned")
    save(perturbed(make(0), 1), tmp_path / "unaligned")
    make_adapter(make(0), tmp_path / "lora", base=tmp_path / "aligned", **config)
    aligned, unaligned = (open_checkpoint(tmp_path / n).source for n in ("aligned", "unaligned"))
    lora = open_checkpoint(tmp_path / "lora", base=tmp_path / "aligned").source
    assert isinstance(lora, LoraSource)
    pairs = lora.pairs()
    assert pairs
    assert all(pair.transposed == (case != "linear") for pair in pairs.values())
    lineage = Lineage(aligned, lora, unaligned)
    for name, pair in pairs.items():
        with FlopCounterMode(display=False) as counter:
            found = projection(lineage, name)
        assert found is not None
        # B A as the source reads it, Vᵀ B, V times that, and the product itself to see how it lies: by the rank, not by a side
        assert counter.get_total_flops() == 4 * 2 * aligned.spec(name).numel * pair.rank
        want, cosine = literal(lineage, name, transposed=pair.transposed)
        got = found.product.read(0, want.size).double().numpy().reshape(want.shape)
        # Δ is known to fp32's last place of the weights in one, exactly in the other
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max() + 1e-7)
        assert found.cosine == pytest.approx(cosine, abs=1e-4)
    assert set(cosines(lineage)) == set(pairs)  # nothing else was changed


def test_a_lora_over_another_base_changed_more_than_its_factors_say(tmp_path: Path) -> None:
    save(llama(0), tmp_path / "base")
    make_adapter(llama(0), tmp_path / "lora", base=tmp_path / "base", target_modules=["q_proj"], r=2)
    save(perturbed(llama(0), 1), tmp_path / "aligned")
    save(perturbed(llama(0), 2), tmp_path / "unaligned")
    aligned, unaligned = (open_checkpoint(tmp_path / n).source for n in ("aligned", "unaligned"))
    lora = open_checkpoint(tmp_path / "lora", base=tmp_path / "base").source
    lineage = Lineage(aligned, lora, unaligned)
    name = "model.layers.0.self_attn.q_proj.weight"
    found = projection(lineage, name)
    assert found is not None
    want, cosine = literal(lineage, name)
    np.testing.assert_allclose(found.product.read(0, want.size).double().numpy(), want.reshape(-1), rtol=0, atol=1e-6)
    assert found.cosine == pytest.approx(cosine, abs=1e-4)


@pytest.mark.parametrize(
    "method", [{"method": "safe_lora", "similarity": 0.5}, {"method": "lox", "gamma": 1.0, "rank": 1}]
)
@pytest.mark.parametrize("whose", ["aligned", "finetune", "unaligned"])
def test_what_is_not_finite_is_named(method: dict[str, Any], whose: str) -> None:
    models = drawn(0)
    at = ("aligned", "finetune", "unaligned").index(whose)
    models[at].tensors["tall"][3, 2] = math.nan
    given = dict(method)
    with pytest.raises(CheckpointError, match=rf"{whose} model: tall\[3, 2\] is nan"):
        fused(given.pop("method"), models, **given).read("tall")


def test_products_beyond_fp32_are_refused() -> None:
    models = [MemorySource({"w": torch.full((3, 2), v)}) for v in (1e25, 3e25, -2e25)]
    with pytest.raises(CheckpointError, match="w: its projection on what alignment changed overflows"):
        projection(Lineage(*models), "w")


def test_inputs_that_lack_or_do_not_fit() -> None:
    aligned, finetune, unaligned, safe = drawn(0)
    chosen = FusionSettings(method="safe_merge", similarity=0.5)
    with pytest.raises(ConfigError, match="safe_merge needs the unaligned model"):
        FusedSource(aligned=aligned, finetune=finetune, settings=chosen, safe=safe)
    del safe.tensors["tall"]
    with pytest.raises(CheckpointError, match="safe: tensor tall is missing"):
        FusedSource(aligned=aligned, finetune=finetune, unaligned=unaligned, settings=chosen, safe=safe)


def test_nothing_to_extrapolate() -> None:
    aligned, finetune, _, _ = drawn(0)
    assert low_rank_direction(Lineage(aligned, finetune, aligned), "tall", 2) is None
