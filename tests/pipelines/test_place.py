"""Where MLflow is, for every command alike, and known before any work begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.errors import ConfigError
from components.tracking import Tracker, default_uri
from pipelines.cli_registry import _registry
from pipelines.place import settled
from tests.pipelines.small import run, small_config, write_config


def test_only_what_the_environment_decides_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert settled(None, tmp_path) == default_uri(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://u:s3cret@db/mlflow")
    assert settled("http://named:5000", tmp_path) == "http://named:5000"
    assert capsys.readouterr().err == ""
    assert settled(None, tmp_path) == "postgresql://u:s3cret@db/mlflow"
    assert capsys.readouterr().err == "realign: MLflow is at postgresql://…@db/mlflow (MLFLOW_TRACKING_URI)\n"


def test_the_registry_is_where_runs_are_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("workspace", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", default_uri(tmp_path / "elsewhere"))
    tracker = Tracker(uri=None, experiment="x", workspace=tmp_path / "workspace")
    assert _registry(tmp_path / "workspace", None).uri == tracker.uri == default_uri(tmp_path / "elsewhere")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(ConfigError, match=r"workspace has no mlflow\.db"):
        _registry(tmp_path / "workspace", None)
    assert _registry(tmp_path / "elsewhere", None).uri == tracker.uri


def test_what_is_no_address_keeps_a_run_from_starting(tmp_path: Path) -> None:
    config = small_config(tmp_path, finetunes=("zh",))
    config["tracking"] = {"uri": "http://user:s3cret@mlflow:5000"}
    done = run(write_config(tmp_path, config), tmp_path / "workspace")
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("realign: http://…@mlflow:5000: an address is shown and logged")
