"""A tracking server that goes away while a run goes on: the run does not mind, and nothing is lost."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.mlflow_server import MlflowServer
from tests.pipelines.small import command, records, run, small_config, write_config

pytestmark = [pytest.mark.slow, pytest.mark.service, pytest.mark.multiproc, pytest.mark.xdist_group("run")]


def wait_for(what: str, found: Any, process: subprocess.Popen[bytes]) -> None:
    for _ in range(6000):
        if found():
            return
        assert process.poll() is None, f"the run ended before {what}"
        time.sleep(0.1)
    raise AssertionError(f"{what} did not come")


def shown(server: MlflowServer, experiment: str) -> dict[str, Any]:
    """run name -> MLflow run, of an experiment; empty where there is none."""
    from mlflow import MlflowClient

    client = MlflowClient(server.uri, server.uri)
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id]) if found is not None else []
    return {one.info.run_name: one for one in runs}


def measured(runs: dict[str, Any]) -> dict[str, dict[str, float]]:
    """run name -> metrics, but for those of the registered version, which stay with the run that registered it."""
    return {
        name: {key: value for key, value in one.data.metrics.items() if not key.startswith("test/")}
        for name, one in runs.items()
    }


def test_what_was_logged_while_the_server_was_away_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    server = MlflowServer(tmp_path).start()
    config = small_config(tmp_path, finetunes=("zh",), steps=5)
    config["fusion"] = {}
    config["tracking"] = {"uri": server.uri, "experiment": "first", "every_s": 1, "patience_s": 600}
    workspace, log = tmp_path / "workspace", tmp_path / "stderr"
    with log.open("w") as stderr:
        process = subprocess.Popen(command(write_config(tmp_path, config), workspace), stdout=stderr, stderr=stderr)
    try:
        wait_for("a first look at the run", lambda: "small" in shown(server, "first"), process)
        assert shown(server, "first")["small"].info.status == "RUNNING"
        server.kill()
        ended = len(records(workspace))
        wait_for("the end of its stages", lambda: "waiting up to" in log.read_text(), process)
        # Everything went on: stages ended while nobody answered, and their end is told before the wait for the server.
        assert len(records(workspace)) > ended
        assert log.read_text().index("zh/evaluate_binary done") < log.read_text().index("waiting up to")
        assert log.read_text().count("waiting up to") == 1
        server.start()
        assert process.wait(timeout=600) == 0, log.read_text()
    finally:
        process.kill()
        server.kill()
    server.start()
    try:
        found = shown(server, "first")
        assert {name: one.info.status for name, one in found.items()} == {"small": "FINISHED", "zh": "FINISHED"}
        client = MlflowClient(server.uri, server.uri)
        points = client.get_metric_history(found["zh"].info.run_id, "train_mask/loss")
        assert sorted(point.step for point in points) == list(range(5)), "each once"
        assert client.get_model_version_by_alias("small-zh", "candidate").tags["realign.form"] in ("soft", "binary")

        # Away for longer than the run's patience: said, with what to do; running again shows everything.
        server.kill()
        config["tracking"] |= {"experiment": "second", "patience_s": 1}
        path = write_config(tmp_path, config)
        done = run(path, workspace)
        assert done.returncode == 2
        [said] = [line for line in done.stderr.splitlines() if line.startswith("realign: tracking:")]
        assert f"no tracking server answers at {server.uri}" in said
        assert "Traceback" not in done.stderr
        server.start()
        del config["tracking"]["uri"]  # the environment may say it as well
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        done = run(write_config(tmp_path, config), workspace)
        assert done.returncode == 0, done.stderr
        assert f"realign: MLflow is at {server.uri} (MLFLOW_TRACKING_URI)" in done.stderr
        assert not (workspace / "mlflow.db").exists()
        assert measured(shown(server, "second")) == measured(found)
    finally:
        server.kill()
