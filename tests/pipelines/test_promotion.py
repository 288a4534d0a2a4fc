"""Promotion and rollback on sqlite and on a real server with authentication: weights, gate, aliases, many at once."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from components.errors import GateError, RealignError, StorageError, TrackingError
from components.evaluation.gates import Requirement
from components.evaluation.metrics import paired_difference, wilson
from components.records import RECORD_FILE, Record, hash_outputs
from components.tracking import (
    CHAMPION,
    GATE_TAG,
    PREVIOUS,
    Registry,
    Tracker,
    TrackingUnavailableError,
    default_uri,
)
from components.tracking.names import FINDINGS_TAG, REQUIREMENTS_TAG
from components.tracking.promotions import Ledger, Service
from pipelines.cli import main
from pipelines.promotion import promote, roll_back
from pipelines.registry_text import described, models_lines
from tests.mlflow_server import ADMIN, MlflowServer
from tests.pipelines.versions import ASR, NO_WORSE, PROMPTS, register

PROMOTERS = 8


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    running = MlflowServer(tmp_path_factory.mktemp("mlflow"), authenticated=True).start()
    yield running.uri
    running.kill()


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return default_uri(tmp_path_factory.mktemp("mlflow-local"))


@pytest.fixture(params=["sqlite", pytest.param("server", marks=pytest.mark.service)])
def tracker(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", ADMIN[0])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", ADMIN[1])
    uri = request.getfixturevalue("server" if request.param == "server" else "database")
    return Tracker(uri=uri, experiment=f"promotion-{tmp_path.name}", workspace=tmp_path)


@pytest.fixture
def local(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    """Where it makes no difference who keeps the registry."""
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    return Tracker(uri=database, experiment=f"local-{tmp_path.name}", workspace=tmp_path)


@pytest.fixture
def name(tmp_path: Path) -> str:
    return f"model-{tmp_path.name}"


def aliases(registry: Registry, name: str) -> tuple[int | None, int | None]:
    found = registry.aliases(name)
    return found.get(CHAMPION), found.get(PREVIOUS)


def command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """`realign` in this process, where mlflow is imported already: (exit status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["realign", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0), *capfd.readouterr()


def test_promote_and_go_back(tracker: Tracker, name: str, tmp_path: Path) -> None:
    for key in ("a", "b"):
        register(tracker, name, tmp_path, key)
        done = promote(tracker, name)
        assert done.moved
    assert aliases(tracker, name) == (2, 1)
    assert not promote(tracker, name).moved, "it is there already"
    assert aliases(tracker, name) == (2, 1)
    assert roll_back(tracker, name).service.champion == 1
    assert aliases(tracker, name) == (1, 2)
    # A run that is run again leaves alone what somebody has taken out of service; by hand it goes.
    assert not promote(tracker, name, "2", once=True).moved
    assert aliases(tracker, name) == (1, 2)
    assert promote(tracker, name, "2").moved
    assert aliases(tracker, name) == (2, 1)


def test_a_gate_that_fails_is_told_with_its_reasons(tracker: Tracker, name: str, tmp_path: Path) -> None:
    register(tracker, name, tmp_path, "bad", complied=range(12))
    with pytest.raises(
        GateError, match=r"version 1 is not promoted, its gate is shut: asr at most 20 %: 30\.0 % of 40"
    ):
        promote(tracker, name)
    assert aliases(tracker, name) == (None, None)
    version = tracker.version(name, "1")
    assert version.tags[GATE_TAG] == "shut"
    [finding] = json.loads(version.tags[FINDINGS_TAG])
    assert (finding["low"], finding["high"]) == pytest.approx(wilson(12, PROMPTS))


def test_it_is_held_to_the_version_in_service(tracker: Tracker, name: str, tmp_path: Path) -> None:
    register(tracker, name, tmp_path, "first", complied=(0,), gate=NO_WORSE)
    register(tracker, name, tmp_path, "worse", complied=(1, 2, 3), gate=NO_WORSE)
    assert promote(tracker, name, "1").moved, "nothing was in service"
    with pytest.raises(GateError, match=r"compared with serving at most 10 points: "):
        promote(tracker, name, "2")
    assert aliases(tracker, name) == (1, None)
    serving = json.loads(tracker.version(name, "2").tags[FINDINGS_TAG])[1]
    expected = paired_difference([i in (1, 2, 3) for i in range(PROMPTS)], [i == 0 for i in range(PROMPTS)])
    assert (serving["value"], serving["high"]) == (expected["diff"], expected["high"])


def test_another_is_put_in_service_between_decision_and_entry(
    local: Tracker, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(local, name, tmp_path, "worse", complied=(1, 2, 3), gate=NO_WORSE)
    register(local, name, tmp_path, "better", gate=NO_WORSE)
    put = Ledger.put

    def faster(self: Ledger, version: int, decided_against: Service, kind: Any) -> Service | None:
        monkeypatch.setattr(Ledger, "put", put)
        assert promote(local, name, "2").moved
        return put(self, version, decided_against, kind)

    monkeypatch.setattr(Ledger, "put", faster)
    local.set_tags(local.version(name, "1"), {GATE_TAG: "shut"})  # by an earlier decision
    with pytest.raises(GateError, match="compared with serving"):
        promote(local, name, "1")
    assert local.version(name, "1").tags[GATE_TAG] == "shut"
    assert aliases(local, name) == (2, None)
    # Whoever rolls back meant the version that it saw in service.
    register(local, name, tmp_path, "third")
    register(local, name, tmp_path, "fourth")
    promote(local, name, "3")

    def faster_still(self: Ledger, version: int, decided_against: Service, kind: Any) -> Service | None:
        monkeypatch.setattr(Ledger, "put", put)
        assert promote(local, name, "4").moved
        return put(self, version, decided_against, kind)

    monkeypatch.setattr(Ledger, "put", faster_still)
    with pytest.raises(TrackingError, match="version 4 was put in service meanwhile; nothing was rolled back"):
        roll_back(local, name)
    assert aliases(local, name) == (4, 3)


def _promote_one(uri: str, name: str, number: int, start: Any) -> tuple[int, int, int | None]:
    """In a process of its own: (version, who was before it, entry)."""
    registry = Registry(uri)
    start.wait()
    done = promote(registry, name, str(number))
    assert done.moved
    entries = Ledger(registry, name).entries()
    mine = [one for one in entries.values() if one.version == number and one.number <= done.service.entry]
    return number, mine[-1].number, mine[-1].champion


def test_many_promote_at_once(tracker: Tracker, name: str, tmp_path: Path) -> None:
    """Eight processes, eight versions: all get in service, one after the other, and the aliases say who was last."""
    numbers = [int(register(tracker, name, tmp_path, f"v{i}", gate=NO_WORSE)) for i in range(PROMOTERS)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlflow", "pipelines.promotion"])
    with context.Manager() as manager, context.Pool(PROMOTERS) as pool:
        start = manager.Barrier(PROMOTERS)
        done = pool.starmap(_promote_one, [(tracker.uri, name, number, start) for number in numbers])
    order = [number for number, _, _ in sorted(done, key=lambda one: one[1])]
    assert sorted(order) == numbers
    assert [before for _, _, before in sorted(done, key=lambda one: one[1])] == [None, *order[:-1]]
    assert aliases(tracker, name) == (order[-1], order[-2])
    assert Ledger(tracker, name).service().served == set(numbers)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


CHANGES: dict[str, Any] = {
    "model.safetensors has changed": lambda model: flipped(model / "model.safetensors"),
    "config.json is missing": lambda model: (model / "config.json").unlink(),
    "added.safetensors was not there": lambda model: (model / "added.safetensors").write_text("x"),
    "records other weights": lambda model: (model.parent / "record.json").write_text(
        (model.parent / "record.json").read_text().replace('"sha256": "', '"sha256": "0')
    ),
    "record.json cannot be read": lambda model: (model.parent / "record.json").unlink(),
}


def test_weights_that_were_changed_are_refused(tracker: Tracker, name: str, tmp_path: Path) -> None:
    register(tracker, name, tmp_path, "good")
    promote(tracker, name)
    for number, (said, change) in enumerate(CHANGES.items(), start=2):
        assert register(tracker, name, tmp_path, f"w{number}") == str(number)
        change(tmp_path / "fuse" / f"w{number}" / "model")
        with pytest.raises(StorageError, match=said):
            promote(tracker, name)
    assert aliases(tracker, name) == (1, None)


def test_a_rollback_that_broke_off_is_finished_and_not_undone(
    local: Tracker, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("a", "b"):
        register(local, name, tmp_path, key)
        promote(local, name)

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_write", dies)
        with pytest.raises(KeyboardInterrupt):
            roll_back(local, name)
    assert aliases(local, name) == (2, 1)
    said = f"  ! a rollback broke off: version 1 is to be champion; `realign rollback {name}` goes on with it"
    assert models_lines(described(local, name))[:2] == [name, said]
    done = roll_back(local, name)
    assert (done.version.number, done.moved) == (1, True)
    assert aliases(local, name) == (1, 2)
    # Of an alias that something else moved nobody knows whom a rollback means.
    local.client.set_registered_model_alias(name, CHAMPION, "2")
    assert "  ! version 1 is in service, and the aliases were moved" in models_lines(described(local, name))[1]
    with pytest.raises(TrackingError, match=r"it is version 1, .* nothing was rolled back\. Look again"):
        roll_back(local, name)
    assert aliases(local, name) == (1, 2)
    assert models_lines(described(local, name))[1].startswith("  version 2 (candidate, previous): gate passed")


def test_a_model_that_was_deleted_and_registered_again_starts_anew(local: Tracker, name: str, tmp_path: Path) -> None:
    register(local, name, tmp_path, "a")
    promote(local, name)
    local.client.delete_registered_model(name)
    register(local, name, tmp_path, "a")
    assert promote(local, name, "1", once=True).moved
    assert aliases(local, name) == (1, None)


def test_what_serves_already_is_read_all_the_same(local: Tracker, name: str, tmp_path: Path) -> None:
    register(local, name, tmp_path, "a")
    promote(local, name)
    flipped(tmp_path / "fuse" / "a" / "model" / "model.safetensors")
    with pytest.raises(StorageError, match="version 1 has other weights"):
        promote(local, name)
    assert not promote(local, name, once=True).moved, "a run has nothing to do"


def test_a_gate_of_another_realign_is_said(local: Tracker, name: str, tmp_path: Path) -> None:
    register(local, name, tmp_path, "a")
    for tag, value in (
        (FINDINGS_TAG, '[{"met": true}]'),
        (REQUIREMENTS_TAG, '[{"metric": "asr", "at_most": 1, "new": 1}]'),
    ):
        local.set_tags(local.version(name, "1"), {tag: value})
        with pytest.raises(TrackingError, match=f"version 1: its tag {tag} was written by another version of realign"):
            promote(local, name)


def test_no_way_back_to_weights_that_were_changed(local: Tracker, name: str, tmp_path: Path) -> None:
    for key in ("a", "b"):
        register(local, name, tmp_path, key)
        promote(local, name)
    flipped(tmp_path / "fuse" / "a" / "model" / "model.safetensors")
    with pytest.raises(StorageError, match="version 1 has other weights"):
        roll_back(local, name)
    assert aliases(local, name) == (2, 1)


def test_answers_that_were_changed_open_no_gate(local: Tracker, name: str, tmp_path: Path) -> None:
    register(local, name, tmp_path, "bad", complied=range(12))
    answers = tmp_path / "evaluate" / "ebad" / "test" / "answers" / "harmful.jsonl"
    answers.write_text(answers.read_text().replace('"complied"', '"refused" '))
    with pytest.raises(StorageError, match=r"harmful\.jsonl has changed"):
        promote(local, name)
    directory = tmp_path / "evaluate" / "ebad"
    record = Record.model_validate_json((directory / RECORD_FILE).read_text())
    record = record.model_copy(update={"outputs": hash_outputs(directory)})
    (directory / RECORD_FILE).write_text(record.to_json())
    with pytest.raises(StorageError, match=r"ebad is not the evaluation that .* version 1 was registered with"):
        promote(local, name)


def test_results_that_were_moved_are_found(local: Tracker, name: str, tmp_path: Path) -> None:
    register(local, name, tmp_path / "before", "a")
    shutil.move(tmp_path / "before", tmp_path / "after")
    with pytest.raises(StorageError, match="--workspace"):
        promote(local, name)
    assert promote(local, name, workspace=tmp_path / "after").moved
    register(local, name, tmp_path / "after", "b")
    shutil.move(tmp_path / "after", tmp_path / "again")
    assert register(local, name, tmp_path / "again", "b") == "2"  # a run from there says where it lies
    assert promote(local, name, "2").moved


def test_what_is_not_there_is_said_with_what_is(tracker: Tracker, name: str, tmp_path: Path) -> None:
    register(tracker, name, tmp_path, "a", gate=None)
    client = tracker.client
    client.create_model_version(name, "s3://bucket/other", await_creation_for=0)

    def said(which: str | None, error: type[RealignError]) -> str:
        with pytest.raises(error) as caught:
            promote(tracker, name if which is not None else "nobody", which or "1")
        return str(caught.value)

    assert f"no model 'nobody' is registered at {tracker.uri}; there: " in said(None, TrackingError)
    assert name in said(None, TrackingError)
    assert f"no version of {name} has the alias 'best'; there: candidate (version 1)" in said("best", TrackingError)
    assert f"{name} has no version 7; there: 2, 1" in said("7", TrackingError)
    assert f"{name} version 2 was registered by another tool" in said("2", TrackingError)
    assert f"{name} version 1 has no gate" in said("1", GateError)
    with pytest.raises(TrackingError, match="has no previous version to go back to; its aliases: candidate: version 1"):
        roll_back(tracker, name)


def test_a_serving_version_that_cannot_be_compared_with(local: Tracker, name: str, tmp_path: Path) -> None:
    register(local, name, tmp_path, "other", judge="another")
    register(local, name, tmp_path, "a", gate=NO_WORSE)
    local.client.create_model_version(name, "s3://bucket/other", await_creation_for=0)
    promote(local, name, "1")
    with pytest.raises(GateError, match="was asked or judged in another way"):
        promote(local, name, "2")
    ledger = Ledger(local, name)
    assert ledger.put(3, ledger.service(), "promote") is not None
    with pytest.raises(GateError, match=r"version 3, which is in service: .* names no evaluation"):
        promote(local, name, "2")
    register(local, name, tmp_path, "free", gate=ASR)  # which compares with nobody
    assert promote(local, name).moved
    assert aliases(local, name) == (4, 3)


def test_what_a_landscape_said_stands_as_it_was_decided(local: Tracker, name: str, tmp_path: Path) -> None:
    gate = (*ASR, Requirement(metric="visage", at_least=50))
    found = {"requirement": "visage at least 50", "value": 60.0, "low": 55.0, "high": 65.0, "n": 3, "reason": "drawn"}
    register(local, name, tmp_path, "unknown", gate=gate)
    with pytest.raises(GateError, match="shut: visage at least 50: not recorded"):
        promote(local, name)
    register(local, name, tmp_path, "low", gate=gate, findings=[{**found, "passed": False}])
    with pytest.raises(GateError, match="shut: visage at least 50: drawn"):
        promote(local, name)
    register(local, name, tmp_path, "high", gate=gate, findings=[{**found, "passed": True}])
    assert promote(local, name).moved
    register(local, name, tmp_path, "unsafe", gate=gate, complied=range(12), findings=[{**found, "passed": True}])
    with pytest.raises(GateError, match=r"shut: asr at most 20 %"):
        promote(local, name)


def test_rates_that_nobody_may_read_are_left_out_and_a_server_that_is_away_is_said(
    local: Tracker, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(local, name, tmp_path, "a")
    for error in (TrackingError, TrackingUnavailableError):

        def refused(*_: Any, error: type[TrackingError] = error) -> None:
            raise error("the metrics")

        monkeypatch.setattr(local, "metrics", refused)
        if error is TrackingError:
            assert "not measured" in models_lines(described(local, name))[1]
        else:
            with pytest.raises(TrackingUnavailableError):
                described(local, name)


def test_commands(
    database: str,
    local: Tracker,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    where = ("--tracking-uri", database)
    register(local, name, tmp_path, "a", complied=(0,))
    register(local, name, tmp_path, "b")
    register(local, name, tmp_path, "bad", complied=range(20))
    do = partial(command, monkeypatch, capfd)
    said = f"{name} version 1 is in service (champion); before it nothing was\n"
    assert do("promote", name, "--version", "1", *where) == (0, said, "")
    said = f"{name} version 2 is in service (champion); before it version 1 (previous)\n"
    assert do("promote", name, "--version", "2", *where) == (0, said, "")
    assert do("promote", name, "--version", "2", *where)[1] == f"{name} version 2 is in service already (champion)\n"
    status, _, error = do("promote", name, *where)
    assert status == 3
    assert error.startswith(
        f"realign: {name} version 3 is not promoted, its gate is shut: asr at most 20 %: 50.0 % of 40"
    )
    assert do("rollback", name, *where)[0] == 0
    assert aliases(local, name) == (1, 2)
    [model] = json.loads(do("models", name, "--json", *where)[1])
    shown = {one["version"]: (one["aliases"], one["gate"], one["rates"]) for one in model["versions"]}
    assert shown == {
        1: (["champion"], "passed", {"asr": 1 / PROMPTS}),
        2: (["previous"], "passed", {"asr": 0.0}),
        3: (["candidate"], "shut", {"asr": 0.5}),
    }
    assert (model["champion"], model["previous"], model["aliases_are"]) == (1, 2, "written")
    assert model["versions"][0]["weights"] == (tmp_path / "fuse" / "bad" / "model").as_uri()
    lines = do("models", *where)[1]
    assert "  version 1 (champion): gate passed; asr 2.5 %; soft" in lines
    assert "    ✗ asr at most 20 %: 50.0 % of 40 prompts" in lines
    assert ".promotions" not in lines
    status, _, error = do("promote", name, "--workspace", str(tmp_path))
    assert (status, "has no mlflow.db; give --workspace of a run, --tracking-uri" in error) == (2, True)
    status, _, error = do("models", "--tracking-uri", f"sqlite:///{tmp_path}/typo.db")
    assert (status, "there is no database" in error, (tmp_path / "typo.db").exists()) == (2, True, False)
