from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.checkpoints.reference import open_checkpoint
from components.errors import CheckpointError
from components.landscape.moving import Pristine
from components.landscape.plane import Plane
from components.landscape.vectors import Direction, RandomDirection, TowardsDirection
from tests.components.checkpoints.tiny import gpt2, llama, perturbed, qwen, save
from tests.components.landscape.support import assert_weights, dense, rounded, source, weights

BIG = {"vocab_size": 1500, "hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 1}
"""Its embedding is more than one block, and no block holds a whole number of its rows."""


def random(stream: int = 0, norm: Any = "layer", seed: int = 3) -> RandomDirection:
    return RandomDirection(seed, stream, norm)


def towards(model: Any, seed: int, scale: float = 0.05) -> TowardsDirection:
    return TowardsDirection(source(perturbed(copy.deepcopy(model), seed, scale)), f"other {seed}")


AXES: dict[str, Callable[[Any], Sequence[Direction]]] = {
    "layer": lambda m: [random()],
    "filter": lambda m: [random(norm="filter")],
    "towards": lambda m: [towards(m, 1)],
    "layer, layer": lambda m: [random(), random(1)],
    "filter, filter": lambda m: [random(norm="filter"), random(1, "filter")],
    "layer, filter": lambda m: [random(), random(1, "filter")],
    "filter, layer": lambda m: [random(norm="filter"), random(1)],
    "towards, layer": lambda m: [towards(m, 1), random(1)],
    "towards, filter": lambda m: [towards(m, 1), random(1, "filter")],
    "layer, towards": lambda m: [random(), towards(m, 1)],
    "filter, towards": lambda m: [random(norm="filter"), towards(m, 1)],
    "towards, towards": lambda m: [towards(m, 1), towards(m, 2)],
}
PLACES = [(-0.5, 0.25), (0.1, -0.3), (0.0, 0.45), (0.37, 0.0), (1.5, 1.0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("axes", AXES)
def test_every_weight_equals_a_recomputation_in_fp64(axes: str, dtype: torch.dtype) -> None:
    model = perturbed(llama(0, dtype, **BIG), 9, 0.02)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    directions = AXES[axes](model)
    origin, pristine = weights(model), Pristine(model)
    plane, whole = Plane(pristine, directions), dense(origin, directions)
    for place in PLACES:
        at = place[: len(directions)]
        assert pristine.move(plane, at)
        expected = {name: w.copy() for name, w in origin.items()}
        for name in origin:
            for coordinate, axis in zip(at, whole, strict=True):
                expected[name] += coordinate * axis[name]
        moved = {name for name in origin if (expected[name] != origin[name]).any()}
        to_other = any(c for c, kind in zip(at, axes.split(", "), strict=True) if kind == "towards")
        assert moved == {name for name in origin if any(at) and (to_other or "norm" not in name)}
        assert_weights(model, {name: rounded(w, dtype) for name, w in expected.items()})
    assert pristine.move(plane, (0.0,) * len(directions))
    assert_weights(model, before)


def test_restores_every_bit_of_weights_that_are_no_round_numbers() -> None:
    model = llama(0, torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight.view(-1)[:3] = torch.tensor([-0.0, 1e-40, 3e38])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pristine = Pristine(model)
    plane = Plane(pristine, [random(), random(1)])
    for at in ((0.3, 0.3), (-7.0, 1e3), (1e45, 0.0)):
        pristine.move(plane, at)
    pristine.restore()
    assert_weights(model, before)


def test_the_other_checkpoint_is_at_one_bit_for_bit() -> None:
    model = llama(0)
    others = [perturbed(copy.deepcopy(model), seed) for seed in (1, 2)]
    with torch.no_grad():
        # θ₀ + (θ − θ₀) is not θ in fp64 where θ is some 10¹² times smaller.
        model.lm_head.weight.view(-1)[:4] = torch.tensor([1.0, -3.0, 2.5, 0.5])
        others[0].lm_head.weight.view(-1)[:4] = torch.tensor([1.2345e-12, -0.0, 7e-9, 1e-38])
    axes = [TowardsDirection(source(other), f"other {i}") for i, other in enumerate(others)]
    pristine = Pristine(model)
    plane = Plane(pristine, axes)
    for axis, other in zip(axes, others, strict=True):
        at = tuple(plane.locate(axis.name, axis.source)["at"])
        assert pristine.move(plane, at)
        assert_weights(model, dict(other.named_parameters()))
    line = Plane(pristine, [axes[1]])
    pristine.move(line, (1.0,))
    assert_weights(model, dict(others[1].named_parameters()))
    mixed = Plane(pristine, [random(), axes[0]])
    pristine.move(mixed, tuple(mixed.locate("other 0", axes[0].source)["at"]))
    assert_weights(model, dict(others[0].named_parameters()))


def test_an_fp32_checkpoint_is_rounded_once_into_a_bf16_model() -> None:
    model = llama(0, torch.bfloat16)
    other = perturbed(llama(0), 4)
    pristine = Pristine(model)
    pristine.move(Plane(pristine, [TowardsDirection(source(other), "other")]), (1.0,))
    assert_weights(model, {name: rounded(w, torch.bfloat16) for name, w in weights(other).items()})


def test_random_axes_move_all_but_norms() -> None:
    model = perturbed(qwen(0), 5)
    pristine = Pristine(model)
    before = weights(model)
    pristine.move(Plane(pristine, [random()]), (0.2,))
    kept = {name for name, w in weights(model).items() if np.array_equal(w, before[name])}
    assert kept == {name for name in before if "norm" in name}
    assert any(name.endswith("bias") for name in before.keys() - kept)
    assert {"model.embed_tokens.weight"} <= before.keys() - kept


def test_tied_weights_are_one_tensor() -> None:
    model = perturbed(qwen(0), 5)
    pristine = Pristine(model)
    assert pristine.aliases() == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in pristine.names()
    origin = weights(model)
    pristine.move(Plane(pristine, [random()]), (0.2,))
    whole = dense(origin, [random()])[0]
    assert_weights(model, {n: rounded(w + 0.2 * whole[n], torch.float32) for n, w in origin.items()})
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_saved_checkpoint_and_an_adapter_lead_like_their_weights(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    model = gpt2(0)  # weights stored as (in, out), a tied head, biases
    base = save(model, tmp_path / "base")
    torch.manual_seed(1)
    tuned = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    )
    tuned.save_pretrained(tmp_path / "adapter")
    merged = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "adapter")).merge_and_unload()
    pristine = Pristine(model)
    plane = Plane(pristine, [TowardsDirection(open_checkpoint(tmp_path / "adapter", base=base).source, "adapter")])
    pristine.move(plane, (1.0,))
    for name, parameter in merged.named_parameters():
        assert torch.allclose(dict(model.named_parameters())[name], parameter, rtol=0, atol=1e-6), name
    saved = save(perturbed(copy.deepcopy(merged), 3), tmp_path / "saved")
    pristine.move(Plane(pristine, [TowardsDirection(open_checkpoint(saved).source, "saved")]), (1.0,))
    assert_weights(model, {n: p.detach() for n, p in perturbed(merged, 3).named_parameters()})


def test_weights_that_overflow_are_told_of() -> None:
    for dtype, far in ((torch.float16, 1e7), (torch.bfloat16, 1e45), (torch.float32, 1e45)):
        model = llama(0, dtype)
        pristine = Pristine(model)
        plane = Plane(pristine, [random()])
        assert pristine.move(plane, (1.0,))
        assert not pristine.move(plane, (far,)), (dtype, far)
        assert pristine.move(plane, (0.0,))


def test_a_parameter_that_is_a_transposed_view_is_moved() -> None:
    model = llama(0)
    model.lm_head.weight.data = model.lm_head.weight.detach().T.contiguous().T
    assert not model.lm_head.weight.is_contiguous()
    origin, pristine = weights(model), Pristine(model)
    pristine.move(Plane(pristine, [random()]), (0.2,))
    whole = dense(origin, [random()])[0]
    assert_weights(model, {n: rounded(w + 0.2 * whole[n], torch.float32) for n, w in origin.items()})


@pytest.mark.gpu
@pytest.mark.parametrize("axes", ["layer, layer", "filter", "towards, filter", "layer, towards"])
def test_a_gpu_sets_the_weights_that_a_cpu_sets(axes: str) -> None:
    """Products and sums are rounded one by one in fp64, and sums of squares differ in their last bits only."""
    here = perturbed(llama(0, **BIG), 9, 0.02)
    there = copy.deepcopy(here).cuda()
    at = (0.4, -0.3)[: len(AXES[axes](here))]
    for model in (here, there):
        pristine = Pristine(model)
        assert pristine.move(Plane(pristine, AXES[axes](copy.deepcopy(here))), at)
    assert_weights(there.cpu(), {n: p.detach() for n, p in here.named_parameters()})


def test_what_cannot_be_moved_is_refused() -> None:
    with torch.device("meta"):
        empty = llama(0)
    with pytest.raises(CheckpointError, match="21 weights are not in memory"):
        Pristine(empty)
