"""An MLflow server and a local store, for all tests of tracking."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from components.tracking import Tracker
from tests.mlflow_server import MlflowServer


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    running = MlflowServer(tmp_path_factory.mktemp("mlflow-server")).start()
    yield running.uri
    running.kill()


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One local store for all tests: making its tables takes many seconds."""
    return tmp_path_factory.mktemp("mlflow-local")


@pytest.fixture(params=["sqlite", pytest.param("server", marks=pytest.mark.service)])
def tracker(
    request: pytest.FixtureRequest, tmp_path: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> Tracker:
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    uri = request.getfixturevalue("server") if request.param == "server" else None
    return Tracker(uri=uri, experiment=f"realign-{tmp_path.name}", workspace=workspace)
