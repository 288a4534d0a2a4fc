"""Who is let in, and what is said to those who are not; servers of other versions; servers that go away."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from components.errors import TrackingError
from components.tracked import TrackedRun
from components.tracking import Registered, Registry, Tracker, TrackingUnavailableError
from components.tracking.promotions import Ledger
from components.tracking.server import require_reachable, talking
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


@contextlib.contextmanager
def answering(answer: Callable[[BaseHTTPRequestHandler], tuple[int, bytes]]) -> Iterator[str]:
    """The address of somebody who answers every GET like that."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, content = answer(self)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_address[1]}"
        listening.shutdown()


def test_a_server_of_another_major_version_is_refused(tmp_path: Path) -> None:
    import mlflow

    with (
        answering(lambda request: {"/health": (200, b"OK"), "/version": (200, b"2.22.4")}[request.path]) as uri,
        pytest.raises(TrackingError, match=rf"{uri} is MLflow 2\.22\.4, and this is MLflow {mlflow.__version__}: "),
    ):
        Tracker(uri=uri, experiment="x", workspace=tmp_path)


def test_a_proxy_that_wants_a_token_for_everything_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    def proxy(request: BaseHTTPRequestHandler) -> tuple[int, bytes]:
        let_in = request.headers.get("Authorization") == "Bearer the-token"
        return (200, mlflow.__version__.encode()) if let_in else (403, b"RBAC: access denied")

    with answering(proxy) as uri:
        with pytest.raises(TrackingError, match=r"denies you the rights .*\(403\).* set MLFLOW_TRACKING_USERNAME"):
            Registry(uri)
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "the-token")
        assert Registry(uri).uri == uri


def test_a_name_that_the_server_does_not_know_is_said_with_its_remedy() -> None:
    said = b"Invalid Host header - possible DNS rebinding attack detected"
    with answering(lambda _: (403, said)) as uri, pytest.raises(TrackingError, match="--allowed-hosts"):
        Registry(uri)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("http://localhost:abc", r"no address of a tracking server \(Port could not be cast"),
        ("http://host with space:5", "no address of a tracking server"),
        ("http://user:s3cret@mlflow:5000", r"http://…@mlflow:5000: .*set MLFLOW_TRACKING_USERNAME and"),
        ("http://s3cret@mlflow:5000", r"http://…@mlflow:5000: "),
        ("nonsense://s3cret@mlflow/x", r"tracking at nonsense://…@mlflow/x failed"),
        ("postgresql+nobody://u:s3cret@127.0.0.1/x", r"tracking at postgresql\+nobody://…@127\.0\.0\.1/x failed"),
        (
            "mssql+pymssql://u:s3cret@127.0.0.1/x",
            r"…@127\.0\.0\.1/x failed: No module named .*; install what is missing",
        ),
        ("mssql+pymssql://u:s3cret@127.0.0.1:abc/x", r"…@127\.0\.0\.1:abc/x failed: "),
    ],
)
def test_addresses_that_cannot_be_are_said_without_their_passwords(uri: str, said: str) -> None:
    with pytest.raises(TrackingError, match=said) as error:
        Registry(uri)
    assert "s3cret" not in str(error.value)


def test_a_port_that_speaks_something_else_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def greet(listening: socket.socket) -> None:
        for _ in range(2):
            with listening.accept()[0] as somebody:
                somebody.recv(4096)
                somebody.sendall(b"SSH-2.0-OpenSSH_9.0\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=greet, args=(listening,), daemon=True).start()
        uri = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(TrackingUnavailableError, match=rf"no tracking server answers at {uri} \(SSH-2\.0"):
            require_reachable(uri, tries=2, wait_s=0)


def test_what_is_set_for_the_whole_process_stays_until_the_last_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.utils.logging_utils import MLFLOW_LOGGING_STREAM

    def state() -> tuple[str | None, str | None, bool]:
        bounds = [os.environ.get(f"MLFLOW_HTTP_REQUEST_{what}") for what in ("TIMEOUT", "MAX_RETRIES")]
        return bounds[0], bounds[1], MLFLOW_LOGGING_STREAM.enabled

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    before = state()
    one, two = talking("sqlite:///x"), talking("sqlite:///x")
    one.__enter__()
    two.__enter__()
    assert state() == ("30", "1", False)
    one.__exit__(None, None, None)
    assert state() == ("30", "1", False)
    two.__exit__(None, None, None)
    assert state() == before == (None, "1", True)


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
