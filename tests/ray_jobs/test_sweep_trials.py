"""A sweep's candidates on a real model: in one process and on Ray's actors, cut off and gone on with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from components.errors import CheckpointError
from components.sweeps.settings import Objective, Range
from components.sweeps.trials import TRIALS_FILE, Scored, candidate_key
from ray_jobs.sweep_trials import SweepCourse
from tests.ray_jobs.sweep_driver import SETTINGS, plain, sweeping, swept, write_mask
from tests.ray_jobs.watching import Watching

pytestmark = [pytest.mark.multiproc, pytest.mark.xdist_group("jobs")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sweep")
    write_mask(directory)
    return directory


@pytest.fixture(scope="module")
def seen(place: Path) -> dict[str, Any]:
    """What drivers of their own saw, the first of which was killed."""

    def driver(what: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tests.ray_jobs.sweep_driver", str(place), what]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    killed = driver("die")
    assert killed.returncode == -9, killed.stderr
    done = driver("see")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_a_lost_actors_candidate_is_tried_again(seen: dict[str, Any]) -> None:
    assert seen["before"] >= 4
    assert seen["told"] == SETTINGS.trials - seen["before"]
    assert len(seen["resumed"]) == SETTINGS.trials
    # Nothing was tried twice, and what the killed process left unfinished is gone.
    tried = [json.loads(line)["candidate"] for line in seen["lines"]]
    assert len(tried) == len({json.dumps(one) for one in tried}) == SETTINGS.trials
    assert {"form": "binary"} in tried[:3]
    assert {} in tried[:3]
    assert seen["storage"] == []


@pytest.mark.slow
def test_more_lost_actors_than_allowed_end_a_sweep_with_a_remedy(seen: dict[str, Any]) -> None:
    assert seen["too many"].startswith("more than 0 actors were lost (")
    assert "execution.sweep.max_losses" in seen["too many"]


@pytest.mark.slow
def test_candidates_have_the_same_hits_whoever_tries_them(seen: dict[str, Any]) -> None:
    found = set()
    for key, (hits, stopped) in seen["resumed"].items():
        everything = seen["here"][key][0]
        assert all(everything[name].startswith(some) for name, some in hits.items()), key
        assert stopped is not None or hits == everything
        found.add(json.dumps(everything))
    assert len(found) > 3  # candidates differ


def test_in_one_process_the_seed_decides_and_a_rerun_tries_nothing(place: Path) -> None:
    first = swept(place, 1, "here")
    assert plain(first) == plain(swept(place, 1, "there"))
    told = Watching(0, lambda: None)
    assert plain(swept(place, 1, "here", progress=told)) == plain(first)
    assert told.told == 0
    more = swept(place, 1, "here", sweep=SETTINGS.model_copy(update={"trials": 10}), progress=told)
    assert told.told == 2
    assert plain(more)[next(iter(plain(first)))] == plain(first)[next(iter(plain(first)))]
    assert len(more) == 10


def test_who_is_stopped_for_a_demand_goes_on_when_it_is_dropped(place: Path) -> None:
    safe = [{"method": "interpolation", "alpha": 0.02}]
    first = swept(place, 1, "dropped", earlier=safe)
    for_asr = [one for one in first if one.stopped and one.stopped.startswith("asr")]
    assert for_asr, "somebody is stopped for the demand"
    assert all(len(one.hits["asr"]) < 24 or len(one.hits["task"]) < 24 for one in for_asr)
    objectives = (Objective(metric="asr"), Objective(metric="task"), Objective(metric="over_refusal"))
    free = SETTINGS.model_copy(update={"objectives": objectives, "pick": "knee"})
    again = {json.dumps(one.candidate): one for one in swept(place, 1, "dropped", sweep=free)}
    assert len(again) == len(first)
    for one in for_asr:
        assert not (again[json.dumps(one.candidate)].stopped or "").startswith("asr")
    assert (place / "dropped" / TRIALS_FILE).read_text().count("\n") > len(first)


def test_what_did_well_elsewhere_is_tried_after_the_runs_own(place: Path) -> None:
    earlier = [{"method": "interpolation", "alpha": 0.25}, {"form": "binary"}]
    found = swept(place, 1, "earlier", earlier=earlier)
    assert [one.candidate for one in found[:3]] == [{}, {"form": "binary"}, earlier[0]]


@pytest.mark.parametrize("racing", [True, False])
def test_weights_that_are_not_finite_end_a_candidate_and_not_the_sweep(place: Path, racing: bool) -> None:
    huge = {"scale": 1e39}
    wide = {**SETTINGS.space, "scale": Range(low=0.3, high=1e40, log=True)}
    few = SETTINGS.model_copy(update={"trials": 4, "racing": racing})
    found = swept(place, 1, f"huge {racing}", earlier=[huge], sweep=few, space=wide)
    [one] = [one for one in found if one.candidate == huge]
    assert one.stopped is not None
    assert one.stopped.startswith("cannot be fused: ")
    assert len(found) == 4


def test_the_runs_own_settings_that_cannot_be_fused_end_the_sweep(place: Path) -> None:
    with pytest.raises(CheckpointError, match="float32 overflows"):
        swept(place, 1, "own", own=({"scale": 1e39},))


def test_what_was_tried_outside_of_the_space_counts_for_nothing(place: Path) -> None:
    """A space that is changed between two sweeps of the same prompts: the file keeps all, the course what the space has."""
    first = swept(place, 1, "spaces")
    narrow = {**SETTINGS.space, "method": ("interpolation",), "alpha": Range(low=0, high=0.5)}
    found = swept(place, 1, "spaces", space=narrow)
    assert len(found) == SETTINGS.trials
    alphas = [one.candidate["alpha"] for one in found if one.candidate not in ({}, {"form": "binary"})]
    assert all(0 <= float(alpha) <= 0.5 for alpha in alphas)
    outside = [one.candidate for one in first if one.candidate not in [two.candidate for two in found]]
    assert outside
    back = swept(place, 1, "spaces")
    assert plain(back)[candidate_key(outside[0])] == plain(first)[candidate_key(outside[0])]


def test_the_others_wait_until_the_runs_own_settings_are_known(place: Path, tmp_path: Path) -> None:
    """Several processes ask for candidates; what is raced is held against the run's own settings, so these come first."""
    course = SweepCourse(sweeping(place), tmp_path)
    own = [course.next(), course.next()]
    assert all(one is not None and one.own and one.against is None for one in own)
    assert course.next() is None
    assert not course.finished
    told = Scored({}, dict.fromkeys(("asr", "task", "over_refusal"), "0" * 24))
    course.told(told)
    assert course.next() is None
    course.told(Scored({"form": "binary"}, told.hits))
    raced = course.next()
    assert raced is not None
    assert not raced.own
    assert raced.against is not None
    assert raced.against[1] == told  # the first of equals


def test_candidates_keep_their_places_when_one_is_tried_again(place: Path) -> None:
    first = [one.candidate for one in swept(place, 1, "places")]
    free = SETTINGS.model_copy(update={"racing": False})
    assert [one.candidate for one in swept(place, 1, "places", sweep=free)] == first
    assert [one.candidate for one in swept(place, 1, "places", sweep=free)] == first
