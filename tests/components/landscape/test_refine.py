"""Refinement: the few places that tell what all of them would."""

from __future__ import annotations

import numpy as np
import pytest

from components.landscape.refine import Index, fill, first_places, next_places
from components.landscape.visage import visage

STEP = 1.25
"""Of 80 prompts."""
RNG = np.random.default_rng(5)


def refined(surface: np.ndarray, bound: float) -> dict[Index, float]:
    known: dict[Index, float] = {}
    wanted = first_places(surface.shape)
    while wanted:
        assert not set(wanted) & set(known), "no place is measured twice"
        known |= {place: float(surface[place]) for place in wanted}
        wanted = next_places(surface.shape, known, bound, STEP)
    return known


def basin(x: np.ndarray, left: float, right: float, steep: float) -> np.ndarray:
    """Edges of logistic shape, as rates of 80 prompts."""
    rates = 100 - 100 / (1 + np.exp((left - x) * steep)) / (1 + np.exp((x - right) * steep))
    return np.round(rates * 0.8) / 0.8


LINES = {
    f"{left} {right} {steep}": basin(np.linspace(-0.5, 0.5, 201), left, right, steep)
    for left, right, steep in [(-0.4, 0.3, 20), (-0.1, 0.15, 60), (-0.7, 0.33, 12), (-0.3, 0.6, 200), (-0.21, 0.2, 40)]
}


@pytest.mark.parametrize("rates", LINES.values(), ids=LINES.keys())
def test_a_line_is_known_from_an_eighth_of_its_places(rates: np.ndarray) -> None:
    known = refined(rates, 1.0)
    filled = fill(rates.shape, known, STEP)
    assert abs(visage(filled.values) - visage(rates)) <= 1.0
    assert filled.error <= 1.0
    assert len(known) <= 25
    assert all(filled.values[place] == rate for place, rate in known.items())


def bowl(width: float, height: float, steep: float) -> np.ndarray:
    axis = np.linspace(-0.5, 0.5, 21)
    x, y = np.meshgrid(axis, axis, indexing="ij")
    far = np.sqrt((x / width) ** 2 + ((y - 0.05) / height) ** 2)
    return np.round(80 / (1 + np.exp((1 - far) * steep))) / 0.8


@pytest.mark.parametrize(
    ("surface", "share"), [(bowl(0.6, 0.5, 7), 0.35), (bowl(0.4, 0.3, 30), 0.7), (bowl(0.2, 0.3, 12), 0.7)]
)
def test_a_plane_is_known_from_part_of_its_places(surface: np.ndarray, share: float) -> None:
    known = refined(surface, 1.0)
    filled = fill(surface.shape, known, STEP)
    assert abs(visage(filled.values) - visage(surface)) <= 1.0
    assert filled.error <= 1.0
    assert len(known) <= share * surface.size


@pytest.mark.parametrize("shape", [(201,), (21, 21), (7, 13)])
@pytest.mark.parametrize("level", [0.0, 37.5, 100.0])
def test_a_flat_surface_takes_the_first_places_alone(shape: tuple[int, ...], level: float) -> None:
    rates = np.full(shape, level)
    known = refined(rates, 0.1)
    assert sorted(known) == sorted(first_places(shape))
    assert fill(shape, known, STEP).error == pytest.approx(0, abs=1e-9)
    assert np.array_equal(fill(shape, known, STEP).values, rates)


@pytest.mark.parametrize("shape", [(3,), (9,), (4, 5), (3, 21)])
def test_noise_is_measured_everywhere_and_then_known_exactly(shape: tuple[int, ...]) -> None:
    rates = RNG.uniform(0, 99, shape)
    known = refined(rates, 1e-9)
    filled = fill(shape, known, STEP)
    assert filled.error == pytest.approx(0, abs=1e-9)
    assert np.allclose(filled.values, rates)


def test_a_lower_bound_takes_more_places_and_comes_nearer() -> None:
    rates = LINES["-0.1 0.15 60"]
    taken = [len(refined(rates, bound)) for bound in (8.0, 2.0, 0.5)]
    assert taken == sorted(taken)
    assert taken[0] < taken[-1]
    assert abs(visage(fill(rates.shape, refined(rates, 0.5), STEP).values) - visage(rates)) <= 0.5


def test_a_rate_between_two_numbers_of_prompts_belongs_to_the_nearer() -> None:
    known = {(0,): 100.0, (4,): 98.75, (8,): 98.75}
    values = fill((9,), known, STEP).values
    assert (values < 100).tolist() == [False, False, False, True, True, True, True, True, True] or values[2] < 100
    assert (fill((9,), {(0,): 100.0, (4,): 99.0, (8,): 99.0}, 1.0).values[:2] == 100).all()
