"""The lines that `realign landscape` prints."""

from __future__ import annotations

from components.landscape.points import Point
from components.landscape.result import landscape_result
from components.landscape.schema import LandscapeResult
from components.landscape.settings import RandomAxis, Scan
from components.landscape.survey import Survey
from pipelines.landscape_text import told_lines
from tests.components.landscape.test_survey import Named


def drawn(low: float, high: float) -> LandscapeResult:
    """A model that refuses everything between 0 and the far end."""
    scans, sets = [Scan(points=4, axes=(RandomAxis(low=low, high=high),))], [Named("harmful", "harmful")]
    survey = Survey(scans, sets=sets)
    while (ask := survey.next()) is not None:
        survey.told(Point(ask.scan, ask.direction, ask.at, {"harmful": {"asr": "00", "harmful": "00"}}))
    return landscape_result(model="m", scans=scans, points=survey.points, sets=sets, marks={}, confidence=0.95)


def test_numbers_of_any_size_stay_short() -> None:
    assert max(map(len, told_lines({"m": drawn(-1e38, 1e38)}))) < 120
    assert " 2.00 (" in told_lines({"m": drawn(-1, 1)})[1]


def test_a_model_beside_its_grid_is_told() -> None:
    told = "m, random: 0 is none of its places, so the model itself was measured besides"
    assert told in told_lines({"m": drawn(-1, 1)})  # of four places from -1 to 1
    assert told not in told_lines({"m": drawn(-1, 2)})
