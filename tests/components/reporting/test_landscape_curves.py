"""What pictures show of points: values by hand."""

from __future__ import annotations

import numpy as np
import pytest

from components.landscape.schema import POOLED, ScanResult
from components.reporting.landscape_curves import (
    attack_keys,
    capability_keys,
    curve,
    filled,
    label,
    mark_label,
    marks_of,
    not_finite,
    side_keys,
    surface,
)
from components.reporting.landscape_planes import surfaces
from tests.components.reporting.example_landscape import plane, random_line, scan_of


def line(*directions: dict[float, float]) -> ScanResult:
    """One set, which is all that counts: x -> ASR."""
    found = [
        [{"at": [x], "rates": {POOLED: {"asr": y}, "bad": {"asr": y}}, "finite": True} for x, y in direction.items()]
        for direction in directions
    ]
    axes: list[dict[str, object]] = [{"kind": "random", "seed": 0, "norm": "layer"}]
    return scan_of("line", axes, [[-1.0, 0.0, 1.0]], found, visage=50.0)  # type: ignore[arg-type]


def test_a_curve_is_the_mean_of_its_directions_and_spans_them() -> None:
    found = curve(line({-1.0: 1.0, 0.0: 0.0, 1.0: 0.5}, {-1.0: 0.5, 0.0: 0.1, 1.0: 1.0}), (POOLED, "asr"))
    assert found is not None
    assert found.directions == 2
    assert found.x.tolist() == [-1, 0, 1]
    assert found.mean == pytest.approx([75, 5, 75])
    assert found.low == pytest.approx([50, 0, 50])
    assert found.high == pytest.approx([100, 10, 100])


def test_directions_with_points_of_their_own_are_joined_by_straight_lines() -> None:
    found = curve(line({-1.0: 0.0, 1.0: 1.0}, {-1.0: 0.2, 0.5: 0.2, 1.0: 0.2}), (POOLED, "asr"))
    assert found is not None
    assert found.x.tolist() == [-1, 0.5, 1]
    assert found.mean == pytest.approx([10, (75 + 20) / 2, 60])
    assert found.high == pytest.approx([20, 75, 100])


def test_what_a_direction_did_not_reach_is_not_made_up() -> None:
    found = curve(line({-1.0: 0.0, 1.0: 1.0}, {0.0: 1.0}), (POOLED, "asr"))
    assert found is not None
    assert found.mean == pytest.approx([0, 75, 100])
    assert found.low == pytest.approx([0, 50, 100])


def test_a_set_that_is_all_that_counts_has_no_second_curve() -> None:
    models = {"one": line({-1.0: 1.0, 0.0: 0.0})}
    assert attack_keys(models) == [(POOLED, "asr")]
    assert side_keys(models) == []
    assert capability_keys(models) == []
    assert curve(models["one"], ("sums", "task")) is None


def test_sets_metrics_and_names() -> None:
    models = {"a": random_line(0.3, visage=80, task=False), "b": random_line(0.3, visage=80)}
    assert attack_keys(models) == [(POOLED, "asr"), ("harmful", "asr"), ("harmful_system", "asr")]
    assert side_keys(models) == [(POOLED, "harmful"), (POOLED, "incoherent")]
    assert capability_keys(models) == [("sums", "task"), ("benign", "over_refusal")]
    assert [label(key) for key in ((POOLED, "asr"), ("harmful_system", "asr"))] == ["ASR", "ASR (harmful_system)"]
    assert not_finite(random_line(0.3, visage=80, broken=True)) == [[0.45], [0.5]]


def test_marks_that_lie_elsewhere_are_not_drawn_and_the_model_is_at_nought() -> None:
    scan = line({-1.0: 1.0, 0.0: 0.0})
    scan["directions"][0]["marks"] = [
        {"name": "elsewhere", "at": [0.001], "off": 0.999},
        {"name": "mine", "at": [1e-9], "off": 0.0},
        {"name": "half", "at": [0.5], "off": 0.37},
        {"name": "broken", "at": [float("nan")], "off": 0.0},
    ]
    found = marks_of(scan, "mine")
    assert [(mark["name"], mark["at"]) for mark in found] == [("mine", [0.0]), ("half", [0.5])]
    assert [mark_label(mark) for mark in found] == ["mine", "half (37 % off)"]


def test_a_surface_is_as_measured_and_linear_between() -> None:
    places = [(x, y) for x in (0.0, 1.0, 2.0) for y in (0.0, 1.0) if (x, y) != (1.0, 1.0)]
    points = [{"at": list(at), "rates": {POOLED: {"asr": at[0] / 4 + at[1] / 2}}, "finite": True} for at in places]
    found = surface({"points": points}, (POOLED, "asr"))  # type: ignore[typeddict-item]
    assert found is not None
    x, y = np.array([0.0, 1.0, 2.0]), np.array([0.0, 1.0])
    assert filled(found, x, y) == pytest.approx(np.array([[0, 25, 50], [50, 75, 100]]))


def test_points_on_a_line_have_no_surface() -> None:
    points = [{"at": [x, 2 * x], "rates": {POOLED: {"asr": x}}, "finite": True} for x in (0.0, 0.5, 1.0)]
    found = surface({"points": points}, (POOLED, "asr"))  # type: ignore[typeddict-item]
    assert found is not None
    assert filled(found, np.array([0.0, 1.0]), np.array([0.0, 1.0])) is None


def test_what_the_page_turns_has_every_measured_point() -> None:
    refined = plane(0.4, visage=80, refined=True)
    data = surfaces({"full": plane(0.4, visage=84), "few": refined, "no task": plane(0.3, visage=70, task=False)})
    few = data["models"][1]
    assert data["metrics"][0] == "ASR"
    assert len(few["measured"]) == len(refined["directions"][0]["points"]) < 21 * 21
    for point in refined["directions"][0]["points"]:
        x, y = point["at"]
        height = few["z"][0][few["y"].index(y)][few["x"].index(x)]
        assert height == pytest.approx(100 * point["rates"][POOLED]["asr"], abs=0.006)
    task = data["metrics"].index("task (sums)")
    assert data["models"][0]["z"][task] is not None
    assert data["models"][2]["z"][task] is None
    pins = {mark["name"]: mark for mark in data["models"][0]["marks"]}
    assert pins["finetune"]["at"] == [1.0, 0.0]
    assert pins["finetune"]["z"][0] == data["models"][0]["z"][0][data["models"][0]["y"].index(0.0)][15]
