"""What a study suggests: new things, inside the space, and better ones as it is told more."""

from __future__ import annotations

import math
from typing import Any

import pytest

from components.errors import ConfigError
from components.fusion.settings import FusionSettings
from components.sweeps.settings import Objective, Range, Sampler, Space
from components.sweeps.space import Tuning
from components.sweeps.study import Study
from components.sweeps.trials import Candidate, Scored

DEFAULTS = Tuning(fusion=FusionSettings(method="masked", form="soft"))
OBJECTIVES = (Objective(metric="asr", at_most=0.05), Objective(metric="task"))
SPACE: Space = {
    "method": ("masked", "interpolation"),
    "form": ("soft", "binary"),
    "scale": Range(low=0.5, high=1.5),
    "temperature": Range(low=0.25, high=4, log=True),
    "alpha": Range(low=0, high=1),
}
PROMPTS = 200


def hits(rate: float) -> str:
    count = round(PROMPTS * min(max(rate, 0), 1))
    return "1" * count + "0" * (PROMPTS - count)


def scored(candidate: Candidate) -> Scored:
    """A made-up world: safe up to scale 0.8 or α 0.3, more skill the further one goes, and some cannot be fused."""
    if candidate.get("form") == "binary" and float(candidate.get("scale", 1.0)) > 1.4:
        return Scored(candidate, {}, "cannot be fused: its weights are not finite")
    if candidate.get("method", "masked") == "interpolation":
        alpha = float(candidate["alpha"])
        return Scored(candidate, {"asr": hits(max(0.0, alpha - 0.3)), "task": hits(0.7 * alpha)})
    scale, bent = float(candidate.get("scale", 1.0)), abs(math.log(float(candidate.get("temperature", 1.0))))
    return Scored(candidate, {"asr": hits(max(0.0, scale - 0.8)), "task": hits(scale / 1.5 - 0.1 * bent)})


def sweep(trials: int, **options: Any) -> list[Scored]:
    study = Study(options.pop("space", SPACE), OBJECTIVES, DEFAULTS, **options)
    told = []
    for _ in range(trials):
        candidate = study.ask()
        assert candidate is not None
        told.append(scored(candidate))
        study.tell(told[-1])
    return told


def kept_skill(some: list[Scored]) -> float:
    """The most skill at the demanded safety."""
    return max((one.rate(OBJECTIVES[1]) for one in some if safe(one)), default=0.0)


def safe(one: Scored) -> bool:
    return one.stopped is None and one.rate(OBJECTIVES[0]) <= 0.05


def test_the_same_seed_suggests_the_same_and_another_seed_something_else() -> None:
    first, again, other = sweep(15, seed=3), sweep(15, seed=3), sweep(15, seed=4)
    assert first == again
    assert first != other
    for one in first:
        used = {"alpha"} if one.candidate["method"] == "interpolation" else {"form", "scale"}
        assert used <= one.candidate.keys() - {"method"} <= used | {"temperature"}
        assert ("temperature" in one.candidate) == (one.candidate.get("form") == "soft")


def test_what_it_is_told_leads_it_to_skill_at_the_demanded_safety() -> None:
    found = [(kept_skill(sweep(50, seed=s)), kept_skill(sweep(50, seed=s, sampler="random"))) for s in range(5)]
    assert sum(tpe for tpe, _ in found) > sum(drawn for _, drawn in found)
    late = [one for s in range(5) for one in sweep(50, seed=s)[25:]]
    drawn = [one for s in range(5) for one in sweep(50, seed=s, sampler="random")[25:]]
    shares = [sum(map(safe, some)) / len(some) for some in (late, drawn)]
    assert shares[0] > shares[1] + 0.2


@pytest.mark.parametrize("sampler", ["nsga2", "gp", "random"])
def test_every_sampler_stays_in_a_conditional_space(sampler: Sampler) -> None:
    told = sweep(30, sampler=sampler, seed=1)
    assert any(not one.hits for one in told)
    assert len({str(one.candidate) for one in told}) == 30
    assert {one.candidate["method"] for one in told} == {"masked", "interpolation"}
    assert all(0.5 <= float(one.candidate.get("scale", 1)) <= 1.5 for one in told)


def test_what_is_known_is_not_suggested_again_and_teaches() -> None:
    space: Space = {"form": ("soft", "binary"), "scale": (0.5, 1.0)}
    known = [scored({}), scored({"form": "binary", "scale": 0.5})]  # {}: form soft, scale 1, said otherwise
    study = Study(space, OBJECTIVES, DEFAULTS, known=known)
    assert study.seen({"method": "masked", "form": "soft", "scale": 1.0})
    asked = [study.ask(), study.ask()]
    assert sorted(map(str, asked)) == sorted(
        map(str, ({"form": "soft", "scale": 0.5}, {"form": "binary", "scale": 1.0}))
    )
    assert study.ask() is None, "the space is used up, though two are still under way"
    learnt = [one.values for one in study._study.trials if one.values is not None]
    assert sorted(learnt) == [[0.0, pytest.approx(1 - 1 / 3, abs=0.005)], [0.2, pytest.approx(1 / 3, abs=0.005)]]


def test_a_sweep_that_goes_on_draws_other_things_than_it_began_with() -> None:
    began = sweep(8, seed=0)
    study = Study(SPACE, OBJECTIVES, DEFAULTS, seed=0, known=began)
    more = [study.ask() for _ in range(8)]
    assert not [one for one in more if one in [two.candidate for two in began]]


def test_a_stopped_candidate_has_the_worst_where_it_was_not_asked_and_breaks_its_demand() -> None:
    study = Study(SPACE, OBJECTIVES, DEFAULTS)
    study.tell(Scored({"method": "interpolation", "alpha": 0.9}, {"asr": "1110", "task": ""}, "asr is too high"))
    [told] = study._study.trials
    assert told.values == [0.75, 1.0]
    assert told.constraints == {"asr": pytest.approx(0.7)}
    assert told.params == {"method": "interpolation", "alpha": 0.9}


def test_what_lies_outside_of_the_space_is_known_and_teaches_nothing() -> None:
    study = Study(SPACE, OBJECTIVES, DEFAULTS)
    study.tell(scored({"scale": 3.0}))
    assert study.seen({"scale": 3.0})
    assert [one.values for one in study._study.trials if one.values is not None] == []


def test_a_space_without_settings_that_fit_says_why() -> None:
    merged = Tuning(fusion=FusionSettings(method="interpolation", alpha=1.0))
    study = Study({"method": ("lox",), "gamma": (0.5,)}, OBJECTIVES, merged)
    with pytest.raises(ConfigError, match="needs rank"):
        study.ask()
