"""Who is let in, and what is said to those who are not; servers of other versions; servers that go away."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from components.errors import TrackingError
from components.tracked import TrackedRun
from components.tracking import Registered, Registry, Tracker, TrackingUnavailableError
from components.tracking.promotions import Ledger
from tests.mlflow_server import ADMIN, PASSWORD, MlflowServer, create_user

RUN = TrackedRun(name="run", fingerprint="0123456789abcdef0123", started_ms=1_700_000_000_000)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """With users ann and bob beside the administrator; everybody reads."""
    running = MlflowServer(tmp_path_factory.mktemp("mlflow"), authenticated=True).start()
    for name in ("ann", "bob"):
        create_user(running.uri, name)
    yield running
    running.kill()


def log_in(monkeypatch: pytest.MonkeyPatch, name: str, password: str = PASSWORD) -> None:
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)


def asked(name: str, run_id: str) -> Registered:
    return Registered(
        name=name, weights_uri="file:///w", sha256="aa", fingerprint="f1", run_id=run_id, metrics={"asr": 0.5}, time_ms=1
    )  # fmt: skip


@pytest.mark.service
def test_wrong_or_missing_names_are_said(server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_in(monkeypatch, "ann", "guessed")
    with pytest.raises(
        TrackingError, match=r"does not take the name and password of ann \(401\); correct MLFLOW_TRACK"
    ):
        Tracker(uri=server.uri, experiment="x", workspace=tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    monkeypatch.setenv("HOME", str(tmp_path))  # where mlflow's credentials file would lie
    with pytest.raises(TrackingError, match=r"asks who you are \(401\); set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACK"):
        Tracker(uri=server.uri, experiment="x", workspace=tmp_path)


@pytest.mark.service
def test_rights_that_are_missing_are_named_and_suffice_once_granted(
    server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.server.auth.client import AuthServiceClient

    log_in(monkeypatch, "ann")
    ann = Tracker(uri=server.uri, experiment="of-ann", workspace=tmp_path)
    run_id = ann.project(RUN)[""]
    assert ann.register(asked("of-ann", run_id)) == "1"
    ledger = Ledger(ann, "of-ann")
    assert ledger.put(1, ledger.service(), "promote") is not None

    log_in(monkeypatch, "bob")
    bob = Tracker(uri=server.uri, experiment="of-ann", workspace=tmp_path)
    with pytest.raises(TrackingError, match=r"denies bob the rights on the experiment of-ann \(403\); have EDIT on it"):
        bob.project(RUN, ended=False)
    other = Tracker(uri=server.uri, experiment="of-bob", workspace=tmp_path)
    other_run = other.project(RUN)[""]
    with pytest.raises(TrackingError, match=r"denies bob the rights on the registered model of-ann"):
        other.register(Registered(**{**vars(asked("of-ann", other_run)), "fingerprint": "f2"}))
    theirs = Ledger(bob, "of-ann")
    seen = theirs.service()
    assert seen.champion == 1, "everybody may look"
    with pytest.raises(TrackingError, match=r"the rights on the registered models of-ann and of-ann\.promotions"):
        theirs.put(1, seen, "promote")
    assert not bob.has_model("nobody-has-made-this")

    log_in(monkeypatch, *ADMIN)
    for model in ("of-ann", "of-ann.promotions"):
        AuthServiceClient(server.uri).grant_user_permission("bob", "registered_model", model, "EDIT")
    log_in(monkeypatch, "bob")
    version = other.register(Registered(**{**vars(asked("of-ann", other_run)), "fingerprint": "f2"}))
    assert version == "2"
    assert theirs.put(2, theirs.service(), "promote") is not None
    assert bob.aliases("of-ann") == {"candidate": 2, "champion": 2, "previous": 1}


class _OfVersion2(BaseHTTPRequestHandler):
    """Answers as MLflow 2 does to what is asked before anything else."""

    def do_GET(self) -> None:
        answers = {"/health": b"OK", "/version": b"2.22.4"}
        self.send_response(200 if self.path in answers else 404)
        self.end_headers()
        self.wfile.write(answers.get(self.path, b""))

    def log_message(self, *_: Any) -> None:
        pass


def test_a_server_of_another_major_version_is_refused(tmp_path: Path) -> None:
    import mlflow

    with ThreadingHTTPServer(("127.0.0.1", 0), _OfVersion2) as old:
        threading.Thread(target=old.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{old.server_address[1]}"
        with pytest.raises(
            TrackingError, match=rf"{uri} is MLflow 2\.22\.4, and this is MLflow {mlflow.__version__}: "
        ):
            Tracker(uri=uri, experiment="x", workspace=tmp_path)
        old.shutdown()


@pytest.mark.service
def test_a_server_that_goes_away_is_told_from_one_that_refuses(
    server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch, "ann")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    tracker = Tracker(uri=server.uri, experiment="away", workspace=tmp_path)
    first = tracker.project(RUN, ended=False)
    server.kill()
    with pytest.raises(TrackingUnavailableError, match=r"went away: .* run again when it is back"):
        tracker.project(RUN)
    with pytest.raises(TrackingUnavailableError, match="no tracking server answers at"):
        Registry(server.uri)
    server.start()
    assert tracker.project(RUN) == first
    assert tracker.client.get_run(first[""]).info.status == "FINISHED"
