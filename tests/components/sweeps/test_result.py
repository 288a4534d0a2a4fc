"""What is said of a sweep: values by hand."""

from __future__ import annotations

import pytest

from components.errors import EvaluationError
from components.evaluation.metrics import wilson
from components.fusion.settings import FusionSettings
from components.reporting.sweep_plot import front_png
from components.sweeps.result import SweepResult, candidate_text, demand_of, sweep_result, usual_of
from components.sweeps.settings import Objective, SweepSettings
from components.sweeps.space import Tuning
from components.sweeps.trials import Candidate, Scored

DEFAULTS = Tuning(fusion=FusionSettings(method="masked", form="soft"))
OWN: tuple[Candidate, ...] = ({}, {"form": "binary"})
SWEEP = SweepSettings(objectives=(Objective(metric="asr", at_most=0.25), Objective(metric="task")))
PROMPTS = {"asr": 4, "task": 4}


def one(candidate: Candidate, asr: str, task: str, stopped: str | None = None) -> Scored:
    return Scored(candidate, {"asr": asr, "task": task}, stopped, {"fuse": 0.5, "score": 1.0})


SCORED = [
    one({}, "0000", "1000"),
    one({"form": "binary"}, "0100", "1100"),
    one({"scale": 2.0}, "0100", "1111"),
    one({"scale": 1.5}, "1", "", "asr is too high"),
    one({"scale": 3.0}, "1111", "1111"),
    one({"scale": 0.5}, "0000", "0000"),
]


def result(scored: list[Scored] = SCORED, sweep: SweepSettings = SWEEP) -> SweepResult:
    return sweep_result("zh", scored, sweep=sweep, defaults=DEFAULTS, own=OWN, prompts=PROMPTS)


def test_the_front_the_winner_and_the_runs_own() -> None:
    found = result()
    assert [entry["number"] for entry in found["front"]] == [0, 2]  # 4 has no more skill than 2, and is less safe
    assert [entry["number"] for entry in found["own"]] == [0, 1]
    assert found["picked"]["number"] == 2
    assert found["picked"]["meets"]
    low, high = wilson(1, 4)
    assert found["picked"]["rates"]["asr"] == {"value": 0.25, "low": low, "high": high, "n": 4}
    assert found["picked"]["settings"]["fusion"] == {"method": "masked", "form": "soft", "scale": 2.0}
    # Up to the demand (a hair beyond): 0.25 · 1 · … of (0, 0.75), and nothing of what only reaches it.
    assert found["hypervolume"] == pytest.approx(0.25 * 0.25, abs=1e-6)
    assert found["prompts"] == {"asked": 5 * 8 + 1, "all": 6 * 8}
    assert found["seconds"] == {"fuse": 3.0, "score": 6.0}
    assert found["trials"][3] == {"candidate": {"scale": 1.5}, "rates": {"asr": 1.0}, "stopped": "asr is too high"}
    assert found["notes"] == []


def test_it_is_said_when_nothing_is_better_or_nothing_is_safe_enough() -> None:
    assert result(SCORED[:2])["notes"] == ["the run's own form binary was picked: nothing that was tried is better"]
    strict = SWEEP.model_copy(update={"objectives": (Objective(metric="asr", at_most=0.1), Objective(metric="task"))})
    found = result(SCORED[1:3], strict)
    assert not found["picked"]["meets"]
    assert "no candidate meets every demand (asr ≤ 10 %)" in found["notes"][0]


def test_it_is_said_when_less_skill_was_picked_for_more_safety() -> None:
    loose = SWEEP.model_copy(update={"tolerance": 0.8})
    assert "skill within 80 points of the most there is counts as equal" in "".join(result(SCORED, loose)["notes"])


def test_only_what_was_asked_everything_can_win() -> None:
    with pytest.raises(EvaluationError, match="sweep of zh: no candidate was asked every prompt"):
        result(SCORED[3:4])
    assert usual_of(SCORED[2:], OWN, SWEEP, PROMPTS) is None
    assert usual_of(SCORED, OWN, SWEEP, PROMPTS) == SCORED[1]  # both are safe enough, and this has more skill


def test_names_of_candidates_and_demands() -> None:
    assert candidate_text({"method": "masked", "scale": 0.123456}) == "method masked, scale 0.1235"
    assert candidate_text({}) == ""
    assert demand_of(Objective(metric="task", at_least=0.9)) == "≥ 90 %"
    assert demand_of(Objective(metric="task")) == ""


def test_the_picture_is_the_same_whenever_it_is_drawn() -> None:
    drawn = front_png(result())
    assert drawn.startswith(b"\x89PNG")
    assert drawn == front_png(result())
    single = SWEEP.model_copy(update={"objectives": (Objective(metric="asr"),)})
    alone = [Scored(each.candidate, {"asr": each.hits["asr"]}) for each in SCORED if len(each.hits["asr"]) == 4]
    found = sweep_result("zh", alone, sweep=single, defaults=DEFAULTS, own=OWN, prompts={"asr": 4})
    assert front_png(found) != drawn
