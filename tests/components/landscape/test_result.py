"""What is said of points, against figures counted by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from components.landscape.points import Point
from components.landscape.refine import first_places
from components.landscape.result import landscape_result, student_reach
from components.landscape.schema import POOLED, LandscapeResult
from components.landscape.settings import RandomAxis, Scan
from components.landscape.survey import Lattice
from components.landscape.visage import line_numbers, visage, visage_official
from tests.components.landscape.test_survey import SETS, Named, surveyed

PROMPTS = 20


def hits(count: int, of: int = PROMPTS) -> str:
    return "1" * count + "0" * (of - count)


def point(direction: int, at: tuple[float, ...], succeeded: int, *, right: int = 10) -> Point:
    attacked = {"asr": hits(succeeded), "harmful": hits(succeeded // 2), "incoherent": hits(succeeded - succeeded // 2)}
    under_attack = {"asr": hits(PROMPTS), "harmful": hits(PROMPTS), "incoherent": hits(0)}
    return Point("random", direction, at, {"plain": attacked, "attacked": under_attack, "zh": {"task": hits(right)}})


FIVE = Scan(points=5)
SCAN = Scan(points=5, directions=3)
COUNTS = ([20, 10, 0, 10, 20], [20, 20, 2, 20, 20], [5, 5, 0, 0, 15])


def said(points: list[Point], scan: Scan = SCAN, confidence: float = 0.95) -> LandscapeResult:
    return landscape_result(model="m", scans=[scan], points=points, sets=SETS, marks={}, confidence=confidence)


@pytest.fixture(scope="module")
def result() -> LandscapeResult:
    places = Lattice(SCAN).axes[0]
    return said(
        [point(k, (at,), n, right=k) for k, counts in enumerate(COUNTS) for at, n in zip(places, counts, strict=True)]
    )


def test_each_direction_has_its_figures(result: LandscapeResult) -> None:
    scan = result["scans"]["random"]
    figures = [one["numbers"][POOLED]["asr"] for one in scan["directions"]]
    assert [f["visage"] for f in figures] == pytest.approx([(50 + 100 + 50) / 3, 90.0, (75 + 75 + 100 + 100 + 25) / 5])
    assert [f["depth"] for f in figures] == pytest.approx([100, 90, 100])
    assert [f["area"] for f in figures] == pytest.approx([200 / 5, 90 / 5, 375 / 5])
    assert figures[1]["visage_official"] == pytest.approx(90 / 5)  # only the centre is inside: nothing is found
    assert scan["directions"][0]["numbers"]["plain"]["harmful"]["visage"] == pytest.approx(
        (50 + 75 + 100 + 75 + 50) / 5
    )
    assert scan["directions"][0]["numbers"]["attacked"]["asr"]["visage"] == 0
    assert [one["means"]["zh"]["task"] for one in scan["directions"]] == pytest.approx([0, 1 / 20, 2 / 20])
    assert "error" not in scan["directions"][0]
    assert result["prompts"] == {"plain": 20, "attacked": 20, "zh": 20}


def test_intervals_over_directions_are_students(result: LandscapeResult) -> None:
    found = result["scans"]["random"]["numbers"][POOLED]["asr"]["visage"]
    values = [one["numbers"][POOLED]["asr"]["visage"] for one in result["scans"]["random"]["directions"]]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found["value"], found["n"]) == (pytest.approx(np.mean(values)), 3)
    assert (found["low"], found["high"]) == (pytest.approx(low), pytest.approx(high))
    assert student_reach([1.0], 0.95) is None


def test_intervals_over_prompts_are_a_bootstrap(result: LandscapeResult) -> None:
    found = result["scans"]["random"]["numbers"][POOLED]["asr"]["visage"]
    matrices = [np.array([[c == "1" for c in hits(n)] for n in counts], float) for counts in COUNTS]
    rng, replicates = np.random.default_rng(99), []
    for _ in range(4000):
        drawn = rng.integers(0, PROMPTS, PROMPTS)
        replicates.append(np.mean([visage(100 * m[:, drawn].mean(1)) for m in matrices]))
    low, high = np.percentile(replicates, [2.5, 97.5])
    assert found["prompts_low"] == pytest.approx(low, abs=1.5)
    assert found["prompts_high"] == pytest.approx(high, abs=1.5)
    assert found["prompts_low"] < found["value"] < found["prompts_high"]


def test_a_figure_that_a_direction_lacks_is_left_out(result: LandscapeResult) -> None:
    # The third direction's left side never rises far enough, but its right side does.
    assert "sharpness" in result["scans"]["random"]["numbers"][POOLED]["asr"]
    assert "sharpness" not in result["scans"]["random"]["numbers"]["attacked"]["asr"]
    assert "width" in result["scans"]["random"]["numbers"][POOLED]["asr"]


def test_a_refined_line_says_what_all_places_would() -> None:
    scan = Scan(refine=1.0)
    refined = said_of(scan)
    fine = said_of(Scan(points=201))
    own, whole = (r["scans"]["random"]["numbers"][POOLED]["asr"]["visage"]["value"] for r in (refined, fine))
    direction = refined["scans"]["random"]["directions"][0]
    assert len(direction["points"]) < 30
    assert direction["error"] <= 1.0
    assert abs(own - whole) <= 1.0


def said_of(scan: Scan) -> LandscapeResult:
    return landscape_result(
        model="m", scans=[scan], points=surveyed([scan]).points, sets=SETS, marks={}, confidence=0.9
    )


def test_a_plane_of_measured_and_of_refined_points() -> None:
    whole, refined = (
        said_of(Scan(axes=(RandomAxis(), RandomAxis()), refine=refine))["scans"]["random"] for refine in (None, 1.0)
    )
    assert len(whole["directions"][0]["points"]) == 441
    assert len(first_places((21, 21))) < len(refined["directions"][0]["points"]) < 441
    for figure in ("visage", "area", "share"):
        one, other = (r["numbers"][POOLED]["asr"][figure]["value"] for r in (whole, refined))
        assert other == pytest.approx(one, abs=1.0 if figure != "share" else 0.02)
    assert "width" not in whole["numbers"][POOLED]["asr"]
    assert [len(axis) for axis in refined["grid"]] == [21, 21]


def test_it_is_plain_json(result: LandscapeResult) -> None:
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["scans"]["random"]["directions"][0]["points"][0]["at"] == [-0.5]


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("chosen", ["plain", "second"])
def test_answers_that_nobody_could_score_are_counted_where_there_are_some(at: int, chosen: str) -> None:
    sets = [Named("plain", "harmful"), Named("second", "harmful")]
    hits_ = {"asr": "10", "harmful": "00", "incoherent": "00"}
    points = [Point("random", 0, (x,), {"plain": dict(hits_), "second": dict(hits_)}) for x in Lattice(FIVE).axes[0]]
    points[at].hits[chosen]["unscored"] = "01"
    result = landscape_result(model="m", scans=[FIVE], points=points, sets=sets, marks={}, confidence=0.95)
    line = result["scans"]["random"]["directions"][0]
    assert line["means"][chosen]["unscored"] == pytest.approx(0.5 / 5)
    assert [p["rates"][chosen]["unscored"] for p in line["points"]] == [0.5 if k == at else 0 for k in range(5)]


def test_the_official_figure_of_a_refined_line_is_of_the_full_grids_places() -> None:
    rates = np.array([100.0, 50, 0, 0, 50, 100, 100, 100, 40])
    numbers = line_numbers(list(np.linspace(-0.5, 0.5, 9)), rates, 50.0, every=2)
    assert numbers["visage_official"] == visage_official(rates[::2]) != visage_official(rates)
    fine, full = Lattice(Scan(refine=1.0)), Lattice(Scan())
    assert fine.axes[0][:: fine.finer] == full.axes[0]
