from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from components.errors import CheckpointError
from components.landscape.moving import Pristine
from components.landscape.plane import Plane
from components.landscape.vectors import Direction, RandomDirection, TowardsDirection
from tests.components.checkpoints.tiny import MemorySource, llama, perturbed
from tests.components.landscape.support import noise, source, weights


def axes_of(model: Any, directions: list[Direction]) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Each axis as the plane moves an fp64 model along it, by tensor."""
    pristine = Pristine(model)
    plane, origin = Plane(pristine, directions), weights(model)
    found = []
    for unit in np.eye(len(directions)):
        pristine.move(plane, tuple(unit))
        found.append({name: w - origin[name] for name, w in weights(model).items()})
    pristine.restore()
    return found


def fp64_model() -> Any:
    return perturbed(llama(0, torch.float64), 2, 0.02)


def other_of(model: Any, seed: int) -> TowardsDirection:
    return TowardsDirection(source(perturbed(copy.deepcopy(model), seed)), f"other {seed}")


def cosine(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)))


@pytest.mark.parametrize("first", ["layer", "filter", "towards"])
@pytest.mark.parametrize("second", ["layer", "filter"])
def test_a_random_second_axis_is_orthogonal_and_as_long_in_every_part(first: str, second: Any) -> None:
    model = fp64_model()
    one: Any = other_of(model, 1) if first == "towards" else RandomDirection(0, 0, first)  # type: ignore[arg-type]
    d1, d2 = axes_of(model, [one, RandomDirection(0, 1, second)])
    for name, w in weights(model).items():
        if "norm" in name:
            assert not d2[name].any()
            continue
        parts = zip(d1[name], d2[name], w, strict=True) if second == "filter" else [(d1[name], d2[name], w)]
        for a, b, own in parts:
            assert abs(cosine(a, b)) < 1e-10, name
            assert np.linalg.norm(b) == pytest.approx(np.linalg.norm(own), rel=1e-10), name


def test_random_axes_are_as_long_as_tensors_or_rows() -> None:
    model = fp64_model()
    (layer,), (rows,) = (axes_of(model, [RandomDirection(0, 0, norm)]) for norm in ("layer", "filter"))
    uneven = 0
    for name, w in weights(model).items():
        if "norm" in name:
            continue
        assert np.linalg.norm(layer[name]) == pytest.approx(np.linalg.norm(w), rel=1e-12)
        assert np.linalg.norm(rows[name], axis=1) == pytest.approx(np.linalg.norm(w, axis=1), rel=1e-12)
        assert 0.8 < cosine(layer[name], rows[name]) < 0.9999  # the same noise
        uneven += int(not np.allclose(np.linalg.norm(layer[name], axis=1), np.linalg.norm(w, axis=1), rtol=0.05))
    assert uneven


@pytest.mark.parametrize("norm", ["layer", "filter"])
def test_squares_of_noise_are_exact_integers(norm: Any) -> None:
    """Whatever the order: against Python's integers. A row of 150,000 lies in several blocks."""
    model = torch.nn.Module()
    for name, shape in {"long": (3, 150_000), "short": (1_000, 77), "flat": (300_001,)}.items():
        model.register_parameter(name, torch.nn.Parameter(torch.ones(shape)))
    plane = Plane(Pristine(model), [RandomDirection(8, 0, norm), RandomDirection(8, 1, norm)])  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        rows = parameter.shape[0] if norm == "filter" and parameter.ndim > 1 else 1
        one, two = (noise(8, stream, name, parameter.numel()).reshape(rows, -1).tolist() for stream in (0, 1))
        found = plane._squares(name)
        assert found[1, 1] == [sum(x * x for x in row) for row in one]
        assert found[1, 2] == [sum(x * y for x, y in zip(a, b, strict=True)) for a, b in zip(one, two, strict=True)]
        assert found[2, 2] == [sum(y * y for y in row) for row in two]
        assert found[0, 0] == [parameter.numel() / rows] * rows
        assert max(found[1, 1]) > 2**53 or name == "short"


def test_one_seed_gives_two_axes_that_were_nearly_orthogonal_before() -> None:
    model = fp64_model()
    (one,), (two,) = (axes_of(model, [RandomDirection(0, stream)]) for stream in (0, 1))
    for name, w in weights(model).items():
        if "norm" not in name:
            assert 0 < abs(cosine(one[name], two[name])) < 5 / np.sqrt(w.size)


def test_a_second_axis_towards_a_checkpoint_is_orthogonal_over_all_tensors() -> None:
    model = fp64_model()
    for first in (RandomDirection(0, 0), other_of(model, 1)):
        d1, d2 = axes_of(model, [first, other_of(model, 2)])
        products = {n: float((d1[n] * d2[n]).sum()) for n in d1}
        size = np.sqrt(sum((d1[n] ** 2).sum() for n in d1) * sum((d2[n] ** 2).sum() for n in d1))
        assert abs(sum(products.values())) < 1e-10 * size
        assert max(map(abs, products.values())) > 1e-4 * size  # not within each


def test_a_tensor_of_one_element_stays_on_a_second_random_axis() -> None:
    model = llama(0, torch.float64)
    model.register_parameter("scale", torch.nn.Parameter(torch.tensor([0.25], dtype=torch.float64)))
    d1, d2 = axes_of(model, [RandomDirection(0, 0), RandomDirection(0, 1)])
    assert abs(d1["scale"]) == pytest.approx([0.25], rel=1e-12)
    assert d2["scale"].tolist() == [0.0]
    d1, d2 = axes_of(model, [RandomDirection(0, 0, "filter"), RandomDirection(0, 1, "filter")])
    assert d2["scale"].tolist() == [0.0]


def test_a_tensor_of_zeros_does_not_move_at_random() -> None:
    model = llama(0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.embed_tokens.weight[3].zero_()
    for norm in ("layer", "filter"):
        pristine = Pristine(model)
        assert pristine.move(Plane(pristine, [RandomDirection(0, 0, norm), RandomDirection(0, 1, norm)]), (0.5, 0.5))
        assert not model.lm_head.weight.any()
        assert model.model.embed_tokens.weight[3].any().item() == (norm == "layer")
        pristine.restore()


class TestMarks:
    def test_are_the_projections(self) -> None:
        """Against a least-squares fit of the whole vectors."""
        model = fp64_model()
        directions: list[Direction] = [RandomDirection(0, 0), other_of(model, 1)]
        flat = np.stack([np.concatenate([d[n].ravel() for n in sorted(d)]) for d in axes_of(model, directions)], 1)
        pristine = Pristine(model)
        plane, origin = Plane(pristine, directions), weights(model)
        for seed in (2, 3):
            third = perturbed(copy.deepcopy(model), seed, 0.3)
            away = np.concatenate([(weights(third)[n] - origin[n]).ravel() for n in sorted(origin)])
            fit = np.linalg.lstsq(flat, away, rcond=None)[0]
            mark = plane.locate("third", source(third))
            assert mark["name"] == "third"
            assert mark["at"] == pytest.approx(fit.tolist(), rel=1e-8)
            off = np.linalg.norm(away - flat @ fit) / np.linalg.norm(away)
            assert mark["off"] == pytest.approx(off, rel=1e-9)
            assert 0.5 < off < 1

    def test_of_what_lies_in_the_plane(self) -> None:
        model = fp64_model()
        one, two = other_of(model, 1), other_of(model, 2)
        pristine = Pristine(model)
        plane = Plane(pristine, [one, two])
        assert plane.locate("one", one.source) == {"name": "one", "at": [1.0, 0.0], "off": 0.0}
        second = plane.locate("two", two.source)
        d1, tau = (
            np.concatenate([(o.source.read(n).numpy() - pristine.read(n).numpy()) for n in pristine.names()])
            for o in (one, two)
        )
        assert second["at"] == [pytest.approx(d1 @ tau / (d1 @ d1), rel=1e-10), 1.0]
        # The same weights from elsewhere, and a point between.
        again = plane.locate("again", MemorySource(two.source.tensors))  # type: ignore[attr-defined]
        assert again["at"] == pytest.approx(second["at"], rel=1e-10)
        assert again["off"] == 0
        pristine.move(plane, (0.3, -0.7))
        between = plane.locate("between", source(model))
        assert between["at"] == pytest.approx([0.3, -0.7], rel=1e-9)
        assert between["off"] < 1e-6

    def test_the_model_itself(self) -> None:
        model = llama(0)
        pristine = Pristine(model)
        for directions in ([RandomDirection(0, 0)], [RandomDirection(0, 0), other_of(model, 1)]):
            mark = Plane(pristine, directions).locate("self", source(model))
            assert mark == {"name": "self", "at": [0.0] * len(directions), "off": 0.0}


class TestRefuses:
    def test_another_architecture_with_all_its_differences(self) -> None:
        pristine = Pristine(llama(0))
        wider = source(llama(0, intermediate_size=64))
        with pytest.raises(CheckpointError) as error:
            Plane(pristine, [TowardsDirection(wider, "wider")])
        assert str(error.value).startswith("wider is of another architecture")
        assert "(6 differences): model.layers.0.mlp.down_proj.weight is [32, 64], not [32, 48]" in str(error.value)
        assert "give a checkpoint of the same one" in str(error.value)
        plane = Plane(pristine, [RandomDirection(0, 0)])
        with pytest.raises(CheckpointError, match=r"\(1 difference\): lm_head.weight is tied, not separate"):
            plane.locate("tied", source(llama(0, tie_word_embeddings=True)))

    def test_a_direction_of_no_length(self) -> None:
        model = llama(0)
        pristine = Pristine(model)
        with pytest.raises(
            CheckpointError, match="the axis towards twin has no length: the weights there equal the model's"
        ):
            Plane(pristine, [TowardsDirection(source(model), "twin")])
        with pytest.raises(CheckpointError, match="towards twin has no length"):
            Plane(pristine, [RandomDirection(0, 0), TowardsDirection(source(model), "twin")])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    parameter.zero_()
        with pytest.raises(CheckpointError, match=r"\(seed 4\) has no length: all tensors that it moves are zero"):
            Plane(Pristine(model), [RandomDirection(4, 0)])

    def test_parallel_axes(self) -> None:
        model = llama(0, torch.float64)
        pristine = Pristine(model)
        one = source(perturbed(copy.deepcopy(model), 1))
        twice = MemorySource({n: 2 * t - pristine.read(n).view(t.shape) for n, t in one.tensors.items()})
        with pytest.raises(CheckpointError, match="the axes towards one and towards twice lie along one line"):
            Plane(pristine, [TowardsDirection(one, "one"), TowardsDirection(twice, "twice")])
        tiny = torch.nn.Module()
        tiny.register_parameter("scale", torch.nn.Parameter(torch.tensor([2.0])))
        with pytest.raises(CheckpointError, match="span no plane; give another second axis"):
            Plane(Pristine(tiny), [RandomDirection(0, 0), RandomDirection(0, 1)])  # type: ignore[arg-type]

    def test_weights_that_are_no_numbers(self) -> None:
        model = llama(0)
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.lm_head.weight[1, 2] = float("nan")
            other.model.norm.weight[0] = float("inf")
        broken = TowardsDirection(source(other), "broken")
        with pytest.raises(
            CheckpointError, match=r"broken: weights are not finite \(lm_head.weight; model.norm.weight\)"
        ):
            Plane(Pristine(model), [broken])
        with pytest.raises(CheckpointError, match="broken: its weights are not finite"):
            Plane(Pristine(model), [RandomDirection(0, 0)]).locate("broken", broken.source)
        with pytest.raises(CheckpointError, match=r"own weights are not finite \(lm_head.weight; model.norm.weight\)"):
            Plane(Pristine(other), [RandomDirection(0, 0)])
