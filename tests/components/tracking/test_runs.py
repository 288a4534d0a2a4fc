from __future__ import annotations

import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from components.errors import TrackingError
from components.tracked import Point, TrackedRun
from components.tracking import EVALUATION_TAG, Registered, Tracker, address_of, default_uri
from components.tracking.names import DIFFERING_TAG, FINGERPRINT_TAG, OLDER_METRICS_TAG
from tests.lossy_proxy import lossy_proxy
from tests.mlflow_server import free_port

STARTED = 1_700_000_000_000


def tracked() -> TrackedRun:
    zh = TrackedRun(
        name="zh",
        fingerprint="aaaa",
        started_ms=STARTED + 10,
        ended_ms=STARTED + 5000,
        metrics={"before/asr": 0.95, "after_soft/asr": 0.02},
        tags={"selected": "soft"},
        series=[Point("train_mask/loss", step, 1.0 / (1 + step), STARTED + step) for step in range(250)],
    )
    hi = TrackedRun(name="hi", fingerprint="bbbb", started_ms=STARTED + 20, status="FAILED", tags={"error": "no base"})
    return TrackedRun(
        name="demo",
        fingerprint="0123456789abcdef0123",
        started_ms=STARTED,
        ended_ms=STARTED + 9000,
        params={"mask": {"preset": "realign", "steps": 200}, "finetunes": ["zh", "hi"]},
        metrics={"aligned/asr": 0.01},
        children=[zh, hi],
    )


def client(tracker: Tracker) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracker.uri, registry_uri=tracker.uri)


def test_a_run_and_its_finetunes_appear_once(tracker: Tracker, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text("<p>numbers</p>")
    run = replace(tracked(), artifacts=[page])
    ids = tracker.project(run)
    assert list(ids) == ["", "zh", "hi"]
    mlflow = client(tracker)
    top, zh, hi = (mlflow.get_run(ids[name]) for name in ids)
    assert top.data.params == {"mask.preset": "realign", "mask.steps": "200", "finetunes": '["zh", "hi"]'}
    assert top.data.metrics == {"aligned/asr": 0.01}
    assert top.data.tags[FINGERPRINT_TAG] == run.fingerprint
    assert (top.info.status, top.info.start_time, top.info.end_time) == ("FINISHED", STARTED, STARTED + 9000)
    assert zh.data.tags["mlflow.parentRunId"] == ids[""]
    assert zh.data.tags["selected"] == "soft"
    assert zh.data.metrics["after_soft/asr"] == 0.02
    assert hi.info.status == "FAILED"
    history = mlflow.get_metric_history(ids["zh"], "train_mask/loss")
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == [(s, 1 / (1 + s)) for s in range(250)]
    assert [f.path for f in mlflow.list_artifacts(ids[""])] == ["report.html"]

    for again in (run, replace(run, params={"mask": {"preset": "paper"}}, tags={"second": "yes"})):
        assert tracker.project(again) == ids
    assert len(mlflow.search_runs([tracker.experiment_id])) == 3
    assert len(mlflow.get_metric_history(ids[""], "aligned/asr")) == 1
    assert len(mlflow.get_metric_history(ids["zh"], "train_mask/loss")) == 250
    top = mlflow.get_run(ids[""])
    assert top.data.params["mask.preset"] == "realign"
    assert top.data.tags[DIFFERING_TAG] == "mask.preset"
    assert top.data.tags["second"] == "yes"


def test_files_are_attached_once_and_anew_when_they_say_something_else(tracker: Tracker, tmp_path: Path) -> None:
    run = replace(tracked(), fingerprint=f"attached-{tmp_path.name}", children=[])
    report = tmp_path / "report.html"
    report.write_text("version 1")
    with pytest.raises(TrackingError, match="no run attached-"):
        tracker.attach(run.fingerprint, [report], content="a")
    run_id = tracker.project(run)[""]

    def shown() -> str:
        return Path(client(tracker).download_artifacts(run_id, "report.html", str(tmp_path_of(tmp_path)))).read_text()

    tracker.attach(run.fingerprint, [report], content="a")
    assert shown() == "version 1"
    report.write_text("the same, made at another time")
    tracker.attach(run.fingerprint, [report], content="a")
    assert shown() == "version 1"
    report.write_text("version 2")
    tracker.attach(run.fingerprint, [report], content="b")
    assert shown() == "version 2"
    assert tracker.project(run)[""] == run_id
    page = f"{tracker.uri}/#/experiments/{tracker.experiment_id}/runs/{run_id}"
    assert tracker.address(run.fingerprint) == (page if tracker.uri.startswith("http") else None)
    assert tracker.address("nobody") is None


def tmp_path_of(parent: Path) -> Path:
    """A place of its own for each download, which must not overwrite the file itself."""
    return Path(tempfile.mkdtemp(dir=parent))


def test_a_projection_that_was_cut_off_is_completed(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection breaks at each write in turn; the same call finishes the job and leaves no double."""
    mlflow = type(client(tracker))
    whole = mlflow.log_batch
    breaks_at = 0
    while True:
        calls = 0

        def log_batch(self: Any, *arguments: Any, limit: int = breaks_at, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > limit:
                raise ConnectionError("gone")
            return whole(self, *arguments, **options)

        monkeypatch.setattr(mlflow, "log_batch", log_batch)
        try:
            ids = tracker.project(tracked())
            break
        except TrackingError:
            breaks_at += 1
        assert breaks_at < 20
    assert breaks_at > 3
    assert len(client(tracker).search_runs([tracker.experiment_id])) == 3
    assert len(client(tracker).get_metric_history(ids["zh"], "train_mask/loss")) == 250
    assert len(client(tracker).get_metric_history(ids[""], "aligned/asr")) == 1


def test_a_run_that_somebody_opened_is_used_and_left_open(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = client(tracker)
    elsewhere = mlflow.create_experiment("kubeflow-" + tracker.experiment_id)
    opened = mlflow.create_run(elsewhere, run_name="step").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", opened)
    ids = tracker.project(tracked())
    assert ids[""] == opened
    assert mlflow.get_run(opened).info.status == "RUNNING"
    assert mlflow.get_run(opened).data.metrics == {"aligned/asr": 0.01}
    assert mlflow.get_run(ids["zh"]).info.experiment_id == elsewhere
    assert mlflow.get_run(ids["zh"]).data.tags["mlflow.parentRunId"] == opened
    assert tracker.project(tracked()) == ids
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with pytest.raises(TrackingError, match="MLFLOW_RUN_ID"):
        tracker.project(tracked())


def test_registering_points_at_the_weights_and_finds_itself_again(tracker: Tracker, tmp_path: Path) -> None:
    run_id = tracker.project(tracked())["zh"]
    name = "demo-zh-" + tracker.experiment_id
    options: dict[str, Any] = {
        "name": name,
        "run_id": run_id,
        "metrics": {"asr": 0.02, "task": 0.93},
        "time_ms": STARTED,
    }
    first = register(
        tracker, weights_uri="s3://models/zh", sha256="aa", fingerprint="f1", tags={"variant": "soft"}, **options
    )
    assert first == "1"
    assert register(tracker, weights_uri="s3://models/zh", sha256="aa", fingerprint="f1", **options) == "1"
    mlflow = client(tracker)
    version = mlflow.get_model_version_by_alias(name, "candidate")
    assert str(version.version) == "1"
    assert version.tags == {"weights_uri": "s3://models/zh", "sha256": "aa", FINGERPRINT_TAG: "f1", "variant": "soft"}
    assert version.run_id == run_id
    model = mlflow.get_logged_model(version.source.removeprefix("models:/"))
    assert {m.key: m.value for m in model.metrics} == {"asr": 0.02, "task": 0.93}
    assert model.tags["weights_uri"] == "s3://models/zh"

    local = tmp_path / "weights"
    assert register(tracker, weights_uri=str(local), sha256="bb", fingerprint="f2", **options) == "2"
    assert str(mlflow.get_model_version_by_alias(name, "candidate").version) == "2"
    assert register(tracker, weights_uri="s3://models/zh", sha256="aa", fingerprint="f1", **options) == "1"
    assert str(mlflow.get_model_version_by_alias(name, "candidate").version) == "2", "a replay moves no alias back"
    assert len(mlflow.search_model_versions(f"name = '{name}'")) == 2
    assert len(mlflow.search_logged_models([tracker.experiment_id])) == 2


def register(tracker: Tracker, **asked: Any) -> str:
    return tracker.register(Registered(**asked))


def newest(model: Any) -> dict[str, float]:
    """Metric -> value of its latest time."""
    return {m.key: m.value for m in sorted(model.metrics, key=lambda m: m.timestamp)}


def test_a_version_shows_its_latest_evaluation(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = client(tracker)
    name = "again-" + tracker.experiment_id
    first, second = (tracker.project(replace(tracked(), fingerprint=f))["zh"] for f in ("1" * 20, "2" * 20))
    evaluations: dict[str, dict[str, Any]] = {
        "old": {"run_id": first, "metrics": {"asr": 0.5, "task": 0.9, "sets/a/asr": 0.5}, "time_ms": STARTED},
        "new": {"run_id": second, "metrics": {"asr": 0.25, "task": 0.9, "sets/b/asr": 0.25}, "time_ms": STARTED + 1},
    }

    def evaluated(which: str) -> str:
        tags = {EVALUATION_TAG: f"evaluate/{which}", "realign.form": "soft"}
        return register(
            tracker, name=name, weights_uri="/w", sha256="aa", fingerprint="f1", tags=tags, **evaluations[which]
        )

    def shown() -> tuple[Any, Any]:
        version = mlflow.get_model_version_by_alias(name, "candidate")
        return version, mlflow.get_logged_model(version.source.removeprefix("models:/"))

    assert evaluated("old") == "1"
    other = {"name": "other-" + name, "fingerprint": "f9", "metrics": {"asr": 0.3}, "run_id": first}
    register(tracker, weights_uri="/o", sha256="oo", time_ms=STARTED, **other)
    with monkeypatch.context() as patch:  # the first try breaks off before the tag that says that all is there
        whole = type(mlflow).set_model_version_tag

        def breaks(self: Any, name: str, version: str, key: str, value: str) -> None:
            if key == EVALUATION_TAG:
                raise ConnectionError("gone")
            whole(self, name, version, key, value)

        patch.setattr(type(mlflow), "set_model_version_tag", breaks)
        with pytest.raises(TrackingError):
            evaluated("new")
    for which, left in (("new", "sets/a/asr"), ("new", "sets/a/asr"), ("old", "sets/b/asr"), ("old", "sets/b/asr")):
        assert evaluated(which) == "1"
        version, model = shown()
        metrics = evaluations[which]["metrics"]
        assert {key: newest(model)[key] for key in metrics} == metrics
        for tags in (version.tags, model.tags):
            assert tags[EVALUATION_TAG] == f"evaluate/{which}"
            assert tags[OLDER_METRICS_TAG] == left
            assert (tags["weights_uri"], tags["sha256"], tags["realign.form"]) == ("/w", "aa", "soft")
        # The server takes the same for the newest: it sorts by it.
        order = [{"field_name": "metrics.asr", "ascending": True}]
        by_asr = mlflow.search_logged_models([tracker.experiment_id], order_by=order)
        assert [m.name == name for m in by_asr] == [metrics["asr"] < 0.3, metrics["asr"] > 0.3]
    assert [m.value for m in sorted(model.metrics, key=lambda m: m.timestamp) if m.key == "asr"] == [0.5, 0.25, 0.5]
    assert len(mlflow.search_model_versions(f"name = '{name}'")) == 1


def test_a_registration_that_died_half_way_is_finished(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    run_id = tracker.project(tracked())["zh"]
    options: dict[str, Any] = {
        "name": "half-" + tracker.experiment_id,
        "weights_uri": "/w",
        "sha256": "aa",
        "fingerprint": "f1",
        "run_id": run_id,
        "metrics": {"asr": 0.0},
        "time_ms": STARTED,
    }

    def dies(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mlflow, "register_model", dies)
        with pytest.raises(KeyboardInterrupt):
            register(tracker, **options)
    before = mlflow.get_tracking_uri()
    assert register(tracker, **options) == "1"
    assert mlflow.get_tracking_uri() == before
    assert len(client(tracker).search_logged_models([tracker.experiment_id])) == 1
    assert str(client(tracker).get_model_version_by_alias(options["name"], "candidate").version) == "1"


def test_local_tracking_stays_in_the_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    tracker = Tracker(uri=None, experiment="quiet", workspace=workspace)
    shown_all(tracker, "q")
    assert tracker.uri == default_uri(workspace)
    assert sorted(p.name for p in workspace.iterdir()) == ["mlartifacts", "mlflow.db"]
    assert list((tmp_path / "elsewhere").iterdir()) == []

    # The workspace moves, and takes with it what was there and what comes.
    workspace.rename(tmp_path / "moved")
    report = tmp_path / "report.html"
    report.write_text("the report")
    there = Tracker(uri=None, experiment="quiet", workspace=tmp_path / "moved")
    there.attach(tracked().fingerprint, [report], content="a")
    assert not workspace.exists()
    [run_id] = [run.info.run_id for run in client(there).search_runs(["1"]) if run.info.run_name == "demo"]
    assert Path(client(there).download_artifacts(run_id, "report.html")).read_text() == "the report"
    assert len(list((tmp_path / "moved" / "mlartifacts").rglob("report.html"))) == 1


def shown_all(tracker: Tracker, name: str) -> None:
    """A run, its children and a registered model."""
    run_id = tracker.project(tracked())["zh"]
    asked: dict[str, Any] = {"weights_uri": "/w", "sha256": "a", "fingerprint": "f", "metrics": {"asr": 0.0}}
    register(tracker, name=name, run_id=run_id, time_ms=STARTED, **asked)


def test_tracking_is_silent(tracker: Tracker, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    shown_all(tracker, "silent-" + tracker.experiment_id)
    written = capfd.readouterr()
    assert (written.out, written.err) == ("", "")


def test_artifacts_that_the_disk_does_not_take_are_said(tracker: Tracker, tmp_path: Path) -> None:
    run = replace(tracked(), fingerprint=f"full-{tmp_path.name}", children=[])
    tracker.project(run)
    with pytest.raises(TrackingError, match=r"tracking at .* failed: .*absent\.html"):
        tracker.attach(run.fingerprint, [tmp_path / "absent.html"], content="a")


def test_a_store_of_artifacts_that_asks_for_something_else_is_said(
    tmp_path: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server may leave artifacts to its clients; this one's store wants credentials that are not there."""
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for variable in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(variable, str(tmp_path / "absent"))
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(variable, raising=False)
    tracker = Tracker(uri=None, experiment=f"store-{tmp_path.name}", workspace=workspace)
    elsewhere = client(tracker).create_experiment(f"elsewhere-{tmp_path.name}", artifact_location="s3://nobody/x")
    tracker.experiment_id = elsewhere
    page = tmp_path / "page.html"
    page.write_text("")
    with pytest.raises(TrackingError, match=r"do not take page\.html: .*--artifacts-destination"):
        tracker.project(replace(tracked(), children=[], artifacts=[page]))


@pytest.mark.service
def test_a_run_whose_making_was_not_answered_is_made_once(server: str, tmp_path: Path) -> None:
    """mlflow asks again, and the server has made it already."""
    with lossy_proxy(server) as proxy:
        tracker = Tracker(uri=proxy.uri, experiment=f"lost-{tmp_path.name}", workspace=tmp_path)
        proxy.losing = ["runs/create"] * 3
        ids = tracker.project(tracked())
    assert proxy.losing == []
    found = client(Tracker(uri=server, experiment=f"lost-{tmp_path.name}", workspace=tmp_path)).search_runs(
        [tracker.experiment_id]
    )
    assert {run.info.run_id for run in found} == set(ids.values())
    assert {run.info.status for run in found} == {"FINISHED", "FAILED"}


@pytest.mark.service
def test_the_environment_says_where_unless_something_is_named(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    assert Tracker(uri=None, experiment="named-by-the-environment", workspace=tmp_path).uri == server
    assert list(tmp_path.iterdir()) == []
    own = default_uri(tmp_path)
    assert address_of(own, tmp_path) == own
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert address_of(None, tmp_path) == own


def test_a_database_that_was_not_finished_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class KilledError(BaseException):
        pass

    def killed(engine: Any) -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE trace_info (half INTEGER)")
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("mlflow.store.db.utils._upgrade_db", killed)
        with pytest.raises(KilledError):
            Tracker(uri=None, experiment="cut", workspace=tmp_path)
    assert not (tmp_path / "mlflow.db").exists()
    Tracker(uri=None, experiment="cut", workspace=tmp_path)
    assert (tmp_path / "mlflow.db").is_file()


def test_drafts_of_the_dead_are_removed(tmp_path: Path) -> None:
    young, old = tmp_path / ".mlflow.db.young", tmp_path / ".mlflow.db.old"
    young.touch()
    old.touch()
    os.utime(old, (0, 0))
    Tracker(uri=None, experiment="drafts", workspace=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mlflow.db.young", "mlflow.db"]


def test_a_broken_database_is_said_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"not a database" * 100)
    with pytest.raises(TrackingError, match=r"mlflow\.db failed: .*remove a local database that is broken"):
        Tracker(uri=None, experiment="broken", workspace=tmp_path)


def test_nobody_there_is_said_at_once(tmp_path: Path) -> None:
    port = free_port()
    started = time.monotonic()
    with pytest.raises(TrackingError, match=rf"no tracking server answers at http://127.0.0.1:{port}.*tracking\.uri"):
        Tracker(uri=f"http://127.0.0.1:{port}", experiment="x", workspace=tmp_path)
    assert time.monotonic() - started < 30


def test_a_refused_name_is_explained(tracker: Tracker) -> None:
    run_id = tracker.project(tracked())["zh"]
    with pytest.raises(TrackingError, match=r"tracking at .* failed"):
        register(
            tracker, name="", weights_uri="/w", sha256="a", fingerprint="f", run_id=run_id, metrics={}, time_ms=STARTED
        )
