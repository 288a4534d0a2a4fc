"""Versions: what is the same one, what is found again, and what is shown of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from components.tracked import TrackedRun
from components.tracking import EVALUATION_TAG, GATE_TAG, Registered, Tracker
from components.tracking.names import WEIGHTS_TAG
from tests.mlflow_server import losing_an_answer


def register(tracker: Tracker, name: str, **asked: Any) -> str:
    run = TrackedRun(name="run", fingerprint="0123456789abcdef0123", started_ms=1_700_000_000_000)
    given = {"weights_uri": "file:///w", "sha256": "aa", "fingerprint": "f1", "metrics": {"asr": 0.5}, "time_ms": 1}
    return tracker.register(Registered(name=name, run_id=tracker.project(run)[""], **{**given, **asked}))


@pytest.fixture
def name(tmp_path: Path) -> str:
    """With a dot, as many names of models have one."""
    return f"llama-3.1-8b-{tmp_path.name}"


def test_other_weights_are_another_version_and_moved_ones_the_same(tracker: Tracker, name: str) -> None:
    assert register(tracker, name) == "1"
    assert register(tracker, name, weights_uri="file:///moved") == "1"
    version = tracker.version(name, "1")
    assert version.tags[WEIGHTS_TAG] == "file:///moved"
    logged = tracker.client.get_logged_model(version.source.removeprefix("models:/"))
    assert logged.tags[WEIGHTS_TAG] == "file:///moved"
    assert register(tracker, name, sha256="bb", metrics={"asr": 0.25}) == "2"
    assert register(tracker, name, sha256="bb", metrics={"asr": 0.25}) == "2"
    assert register(tracker, name) == "1"
    assert tracker.aliases(name) == {"candidate": 2}
    assert [(one.number, one.tags["sha256"], tracker.metrics(one)) for one in tracker.versions(name)] == [
        (2, "bb", {"asr": 0.25}),
        (1, "aa", {"asr": 0.5}),
    ]
    assert len(tracker.client.search_logged_models([tracker.experiment_id])) == 2


def test_what_many_sets_measured_before_is_not_shown_as_measured_now(tracker: Tracker, name: str) -> None:
    before = {f"sets/{i}/asr": 0.5 for i in range(60)}
    register(tracker, name, metrics={"asr": 0.5, **before}, tags={EVALUATION_TAG: "evaluate/old"})
    register(tracker, name, metrics={"asr": 0.25}, tags={EVALUATION_TAG: "evaluate/new"}, time_ms=2)
    assert tracker.metrics(tracker.version(name, "1")) == {"asr": 0.25}


def test_tags_are_set_against_those_of_now(tracker: Tracker, name: str) -> None:
    register(tracker, name, decided={GATE_TAG: "shut"})
    read = tracker.version(name, "1")
    for said in ("passed", "shut"):
        tracker.set_tags(read, {GATE_TAG: said})
        assert tracker.version(name, "1").tags[GATE_TAG] == said


@pytest.mark.service
def test_a_version_that_a_lost_answer_made_twice_is_there_once(server: str, name: str, tmp_path: Path) -> None:
    with losing_an_answer(server, "/model-versions/create") as uri:
        tracker = Tracker(uri=uri, experiment=f"lost-{tmp_path.name}", workspace=tmp_path)
        assert register(tracker, name) == "1"
        assert [one.number for one in tracker.versions(name)] == [1]
        assert tracker.aliases(name) == {"candidate": 1}
        assert register(tracker, name) == "1"
