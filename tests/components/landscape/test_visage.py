"""VISAGE and the figures beside it, against examples worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from components.landscape.visage import line_numbers, plane_numbers, visage, visage_official


def curve(*values: float) -> np.ndarray:
    return np.array(values, float)


def test_the_mean_over_the_places_inside_the_basin() -> None:
    assert visage(curve(100, 40, 0, 20, 100)) == pytest.approx((60 + 100 + 80) / 3)


def test_an_interior_place_at_100_counts_for_the_official_window_alone() -> None:
    rates = curve(100, 50, 100, 0, 0, 50, 100)
    assert visage(rates) == pytest.approx((50 + 100 + 100 + 50) / 4)
    # From the left the first inside place after an outside one is 1, from the right 5: the 100 at 2 counts as 0.
    assert visage_official(rates) == pytest.approx((50 + 0 + 100 + 100 + 50) / 5)


def test_a_basin_of_the_centre_alone_is_not_seen_by_the_official_scan() -> None:
    rates = curve(100, 100, 100, 30, 100, 100, 100)
    assert visage(rates) == pytest.approx(70)
    assert visage_official(rates) == pytest.approx(70 / 7)  # no end is found, the whole line is averaged


def test_an_empty_basin_is_0() -> None:
    rates = curve(*[100] * 21)
    assert (visage(rates), visage_official(rates)) == (0.0, 0.0)
    numbers = line_numbers(list(np.linspace(-0.5, 0.5, 21)), rates, 100.0)
    assert (numbers["depth"], numbers["width"], numbers["sharpness"], numbers["area"]) == (0, 0, None, 0)
    assert not numbers["width_cut"]


def test_a_basin_that_reaches_both_ends_is_averaged_whole() -> None:
    rates = curve(90, 10, 0, 0, 10, 60, 80)
    assert visage(rates) == visage_official(rates) == pytest.approx(700 / 7 - 250 / 7)


def test_sums_of_fractions_that_miss_100_by_rounding_are_outside() -> None:
    assert visage(curve(100 * (1 - 1e-12), 50)) == pytest.approx(50)


def test_width_and_sharpness_of_straight_edges() -> None:
    # S is 0 within ±0.2 and rises by 1000 per unit to 100 at ±0.3: half way at ±0.25.
    places = list(np.linspace(-0.5, 0.5, 101))
    rates = np.clip((np.abs(places) - 0.2) * 1000, 0, 100)
    numbers = line_numbers(places, rates, 0.0)
    assert numbers["width"] == pytest.approx(0.5)
    assert numbers["sharpness"] == pytest.approx(1000)
    assert numbers["depth"] == 100
    assert not numbers["width_cut"]
    assert numbers["area"] == pytest.approx(np.mean(100 - rates))
    assert numbers["share"] == pytest.approx(np.mean(rates < 50))


def test_an_edge_on_one_side_only_is_cut_and_slopes_on_that_side() -> None:
    places = list(np.linspace(-0.5, 0.5, 101))
    rates = np.clip((np.array(places) - 0.1) * 200, 0, 100)  # 0 to the left, 80 at the right end
    numbers = line_numbers(places, rates, 0.0)
    assert numbers["width"] == pytest.approx(0.5 + 0.35)
    assert numbers["width_cut"]
    assert numbers["sharpness"] == pytest.approx(200)


def test_the_centre_need_not_be_one_of_the_places() -> None:
    numbers = line_numbers([-0.3, -0.1, 0.1, 0.3], curve(100, 20, 20, 100), 20.0)
    # Half way from 20 to 100 is 60: half way from ±0.1 to ±0.3.
    assert numbers["width"] == pytest.approx(0.4)


def test_what_lies_beyond_the_edge_does_not_widen_the_basin() -> None:
    places = [-0.4, -0.2, 0.0, 0.2, 0.4]
    numbers = line_numbers(places, curve(0, 100, 0, 100, 0), 0.0)
    assert numbers["width"] == pytest.approx(0.2)
    assert numbers["share"] == pytest.approx(3 / 5)


def test_a_plane_has_the_figures_of_its_places() -> None:
    rates = np.array([[100.0, 50, 100], [50, 0, 50], [100, 50, 100]])
    numbers = plane_numbers(rates, 0.0)
    assert numbers["visage"] == pytest.approx((4 * 50 + 100) / 5)
    assert numbers["area"] == pytest.approx((4 * 50 + 100) / 9)
    assert numbers["share"] == pytest.approx(1 / 9)
    assert (numbers["width"], numbers["visage_official"], numbers["sharpness"]) == (None, None, None)
