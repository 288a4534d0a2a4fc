"""Fronts, volumes and winners against what brute force says."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from components.errors import EvaluationError
from components.sweeps.front import best, hypervolume, knee, pareto_front, ranking, reference_of
from components.sweeps.settings import DEFAULT_OBJECTIVES, Objective
from components.sweeps.trials import Scored

GRID = 4


def points(dimensions: int) -> st.SearchStrategy[list[tuple[int, ...]]]:
    return st.lists(st.tuples(*[st.integers(0, GRID + 1)] * dimensions), max_size=12)


@given(found=st.integers(1, 4).flatmap(points))
@hypothesis_settings(max_examples=60, deadline=None)
def test_the_volume_is_the_number_of_cells_that_a_point_dominates(found: list[tuple[int, ...]]) -> None:
    dimensions = len(found[0]) if found else 2
    cells = itertools.product(range(GRID), repeat=dimensions)
    inside = sum(any(all(x <= c for x, c in zip(p, cell, strict=True)) for p in found) for cell in cells)
    assert hypervolume(found, (GRID,) * dimensions) == inside


def test_the_volume_of_many_points_is_that_of_a_closer_and_closer_grid() -> None:
    drawn = np.random.default_rng(0).random((40, 3))
    axis = (np.arange(80) + 0.5) / 80
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    inside = np.zeros(len(grid), dtype=bool)
    for one in drawn:
        inside |= (grid >= one).all(1)
    assert hypervolume(drawn.tolist(), (1.0, 1.0, 1.0)) == pytest.approx(inside.mean(), abs=0.005)


@given(found=points(3))
@hypothesis_settings(max_examples=60, deadline=None)
def test_the_front_is_what_can_be_reached_by_no_step_down(found: list[tuple[int, ...]]) -> None:
    front = pareto_front(found)
    for i, one in enumerate(found):
        better = [p for p in found if p != one and all(x <= y for x, y in zip(p, one, strict=True))]
        assert (i in front) == (not better)
    assert hypervolume([found[i] for i in front], (9,) * 3) == hypervolume(found, (9,) * 3)


def test_a_point_at_its_demand_has_volume_and_one_beyond_has_none() -> None:
    reference = reference_of(DEFAULT_OBJECTIVES)
    assert hypervolume([(0.05, 0.0, 0.0)], reference) > 0
    assert hypervolume([(0.06, 0.0, 0.0)], reference) == 0
    assert hypervolume([(0.0, 0.0, 0.0)], reference) == pytest.approx(0.05, abs=1e-6)


def test_the_knee_is_furthest_from_the_line_through_the_ends() -> None:
    front = [(0.0, 10.0), (1.0, 6.0), (2.0, 2.0), (5.0, 1.0), (10.0, 0.0)]
    # Distance from x + y = 10 in units of the spans, by hand: 0, 3, 6, 4, 0.
    assert knee([*front, (9.0, 9.0)]) == 2
    assert knee([(3.0, 3.0)]) == 0
    assert knee([(0.0, 4.0), (0.0, 4.0)]) == 0


def scored(*losses: tuple[int, int, int]) -> list[Scored]:
    """Of asr, task and over_refusal, in hundredths."""

    def hits(lost: int, *, grows: bool = False) -> str:
        return ("0" if grows else "1") * lost + ("1" if grows else "0") * (100 - lost)

    return [
        Scored({"scale": float(i)}, {"asr": hits(a), "task": hits(t, grows=True), "over_refusal": hits(o)})
        for i, (a, t, o) in enumerate(losses)
    ]


@pytest.mark.parametrize(
    ("losses", "skill", "safest", "bend"),
    [
        ([(5, 20, 0), (6, 0, 0), (0, 30, 0)], 0, 2, 0),  # the demand is kept at 0.05 and not at 0.06
        ([(5, 10, 2), (5, 8, 2), (4, 8, 2)], 2, 2, 2),
        ([(0, 5, 1), (4, 1, 1), (0, 3, 1), (0, 4, 0)], 2, 2, 3),  # two hundredths of skill are not worth four of safety
        ([(0, 40, 1), (4, 1, 1)], 1, 0, 0),  # forty are
        ([(0, 5, 1), (1, 3, 0), (0, 3, 1)], 2, 2, 1),  # nowhere worse than the run's own settings
        ([(2, 10, 2), (2, 5, 3), (2, 9, 2)], 2, 1, 1),  # over-refusal has no demand: skill does not trade it away
        ([(20, 10, 0), (9, 50, 9), (9, 60, 0)], 2, 1, 1),  # none keeps the demand: those that miss it least
        ([(1, 10, 0), (1, 10, 0)], 0, 0, 0),
    ],
)
def test_who_wins(losses: list[tuple[int, int, int]], skill: int, safest: int, bend: int) -> None:
    found = scored(*losses)
    assert best(found, DEFAULT_OBJECTIVES, "skill", found[0]) == skill
    assert best(found, DEFAULT_OBJECTIVES, "safest", found[0]) == safest
    assert best(found, DEFAULT_OBJECTIVES, "knee", found[0]) == bend


def test_without_the_runs_own_settings_nothing_is_held() -> None:
    assert best(scored((2, 10, 2), (2, 5, 3)), DEFAULT_OBJECTIVES, "skill", None) == 1


def test_a_key_never_falls_as_a_loss_grows() -> None:
    objectives = (
        *DEFAULT_OBJECTIVES,
        Objective(metric="harmful", at_most=0.1),
        Objective(metric="exact", at_least=0.9),
    )
    generator = random.Random(0)
    for rule in ("skill", "safest"):
        key = ranking(objectives, rule, [0.1] * 5)  # type: ignore[arg-type]
        for _ in range(500):
            low = [generator.choice([0, 0.05, 0.1, 0.3]) for _ in objectives]
            high = [x + generator.choice([0, 0, 0.05, 0.2]) for x in low]
            assert key(low) <= key(high)


def test_nothing_to_pick_from() -> None:
    with pytest.raises(EvaluationError, match="none to pick"):
        best([], DEFAULT_OBJECTIVES, "skill", None)
