"""Which points are asked, in whatever order they come back."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest

from components.errors import EvaluationError
from components.evaluation.settings import SetKind
from components.landscape.points import Ask, Point, read_points, write_points
from components.landscape.settings import RandomAxis, Scan, TowardsAxis
from components.landscape.survey import Lattice, Survey, attack_sets


@dataclass
class Named:
    name: str
    kind: SetKind
    counts: bool = True


SETS = [Named("plain", "harmful"), Named("attacked", "harmful", counts=False), Named("zh", "task")]


def measured(ask: Ask) -> Point:
    """40 prompts that each hold out to a distance of their own."""
    far = np.hypot(*(ask.at if len(ask.at) == 2 else (ask.at[0] * (1 if ask.at[0] > 0 else 2), 0)))
    asr = "".join("1" if far > 0.2 + 0.4 * k / 40 + 0.05 * ask.direction else "0" for k in range(40))
    hits = {"asr": asr, "harmful": "0" * 40, "incoherent": asr}
    return Point(ask.scan, ask.direction, ask.at, {"plain": hits, "attacked": hits, "zh": {"task": "1" * 5}})


def surveyed(scans: list[Scan], *, known: list[Point] | None = None, at_once: int = 1, seed: int = 0) -> Survey:
    survey, under_way, rng = Survey(scans, sets=SETS, known=known or []), [], random.Random(seed)
    while not survey.finished:
        while len(under_way) < at_once and (ask := survey.next()) is not None:
            under_way.append(ask)
        survey.told(measured(under_way.pop(rng.randrange(len(under_way)))))
    assert survey.next() is None
    assert survey.done == survey.total == len(survey.points)
    return survey


def test_a_full_grid_is_every_place_of_every_direction_and_the_model_first() -> None:
    survey = Survey([Scan(directions=2), Scan(name="plane", axes=(RandomAxis(), TowardsAxis(model="x")))], sets=SETS)
    assert survey.next() == Ask("random", 0, (0.0,))
    whole = surveyed([Scan(directions=2), Scan(name="plane", axes=(RandomAxis(), TowardsAxis(model="x")))])
    assert len(whole.points) == 2 * 21 + 441
    places = [p.at[0] for p in whole.points if (p.scan, p.direction) == ("random", 1)]
    assert places == [round(-0.5 + 0.05 * k, 12) for k in range(21)]
    towards = sorted({p.at[1] for p in whole.points if p.scan == "plane"})
    assert (towards[0], towards[5], towards[15], towards[20]) == (-0.5, 0.0, 1.0, 1.5)


def test_a_grid_without_the_model_has_it_besides() -> None:
    whole = surveyed([Scan(axes=(RandomAxis(low=-0.3, high=0.5),), points=4)])
    assert [p.at[0] for p in whole.points] == pytest.approx([-0.3, -0.3 + 0.8 / 3, 0.0, -0.3 + 1.6 / 3, 0.5])
    assert Lattice(whole_scan := Scan(axes=(RandomAxis(low=-0.3, high=0.5),), points=4)).index((0.0,)) is None
    assert len(Lattice(whole_scan).grid[0]) == 4


@pytest.mark.parametrize("scan", [Scan(refine=1.0, directions=3), Scan(axes=(RandomAxis(), RandomAxis()), refine=2.0)])
def test_the_same_points_however_many_measure_and_in_whatever_order(scan: Scan) -> None:
    alone = surveyed([scan])
    full = 3 * 21 if len(scan.axes) == 1 else 441
    assert len(alone.points) < full
    for seed, at_once in [(1, 2), (2, 7), (3, 50)]:
        assert surveyed([scan], at_once=at_once, seed=seed).points == alone.points


def test_a_survey_goes_on_where_it_was_broken_off() -> None:
    scan = Scan(refine=1.0, directions=2)
    whole = surveyed([scan]).points
    for count in (0, 5, 13, len(whole)):
        some = random.Random(count).sample(whole, count)
        again = Survey([scan], sets=SETS, known=some)
        asked = []
        while not again.finished:
            ask = again.next()
            assert ask is not None
            asked.append(ask)
            again.told(measured(ask))
        assert again.points == whole
        assert len(asked) == len(whole) - count
        assert not {p.ask for p in some} & set(asked)


def test_a_point_that_is_not_coming_is_asked_again() -> None:
    survey = Survey([Scan(points=3)], sets=SETS)
    asks = [survey.next() for _ in range(3)]
    assert survey.next() is None
    assert not survey.finished
    survey.again(Ask("random", 0, (0.5,)))
    assert survey.next() == Ask("random", 0, (0.5,))
    assert Ask("random", 0, (0.5,)) in asks


def test_points_known_of_another_scan_are_left_out() -> None:
    other = surveyed([Scan(name="other", points=3)]).points
    assert surveyed([Scan(points=3)], known=other).points == surveyed([Scan(points=3)]).points


def test_a_landscape_without_harmful_requests_is_refused() -> None:
    with pytest.raises(EvaluationError, match="no set of kind harmful"):
        Survey([Scan()], sets=[Named("zh", "task")])


def test_the_sets_that_make_s() -> None:
    assert attack_sets(SETS) == ["plain"]
    assert attack_sets([Named("a", "harmful", counts=False), Named("b", "harmful", counts=False)]) == ["a", "b"]


def test_points_come_back_from_a_file_but_for_a_line_that_was_cut(tmp_path: object) -> None:
    path = tmp_path / "points.jsonl"  # type: ignore[operator]
    points = surveyed([Scan(directions=2)]).points
    write_points(path, points[::-1])
    assert read_points(path) == points
    path.write_text(path.read_text()[:-20])
    assert read_points(path) == points[:-1]
    assert read_points(path.with_name("nothing.jsonl")) == []
