"""`realign pipeline submit|schedule|unschedule|list|cancel` with the real client library, against a stand-in server that holds
every request against Kubeflow's definitions (`tests/kubeflow_api.py`)."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from components.errors import RealignError
from pipelines.cli import app
from tests.kubeflow_api import KubeflowApi, kubeflow_api, misfits
from tests.mlflow_server import free_port
from tests.pipelines.pipelines import CONFIG, MERGE, compiled, written

pytestmark = pytest.mark.service


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variables of Kubeflow's, and no user's file of the library's."""
    for name in ("ENDPOINT", "UI_ENDPOINT", "DEFAULT_EXPERIMENT_NAME", "OVERRIDE_EXPERIMENT_NAME", "SA_TOKEN_PATH"):
        monkeypatch.delenv(f"KF_PIPELINES_{name}", raising=False)
    monkeypatch.setattr("kfp.client.Client._LOCAL_KFP_CONTEXT", str(tmp_path / "none.json"))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("package"))


@pytest.fixture
def api() -> Iterator[KubeflowApi]:
    with kubeflow_api() as state:
        yield state


def said(*arguments: object) -> str:
    """What the command prints. Raises what it raises."""
    done = CliRunner().invoke(app, ["pipeline", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def refused(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["pipeline", *map(str, arguments)])
    assert isinstance(done.exception, RealignError), done.output
    return f"{type(done.exception).__name__}: {done.exception}"


def test_a_run_is_started_with_its_parameters_and_its_address_told(
    api: KubeflowApi, package: Path, tmp_path: Path
) -> None:
    other = written(tmp_path, CONFIG.replace("at_most: 0.05", "at_most: 0.01"))
    given = ["--finetunes", "hi", "--workspace", "/workspace/x", "--ray-address", "http://ray:8265"]
    given += ["--service-account", "realign-pipeline"]
    told = said(
        "submit", package, "--host", api.host, "--name", "first", "--config", other, "--pending-seconds", 60, *given
    )
    [run] = api.runs.values()
    assert told == f"{run['run_id']} first\n{api.host}/#/runs/details/{run['run_id']}\n"
    assert run["runtime_config"]["parameters"] == {
        "config": other.read_text(), "finetunes": "hi", "workspace": "/workspace/x", "ray_address": "http://ray:8265",
        "pending_seconds": 60.0,
    }  # fmt: skip
    assert run["service_account"] == "realign-pipeline"
    assert [one["display_name"] for one in api.experiments.values()] == ["realign"]
    spec = run["pipeline_spec"]
    assert spec["pipeline_spec"]["pipelineInfo"]["name"] == "realign-trial"
    assert "exec-plan" in spec["platform_spec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    said("submit", package, "--host", api.host)
    assert len(api.experiments) == 1
    second = list(api.runs.values())[1]
    assert second["display_name"].startswith("realign-trial 2")
    assert not second["runtime_config"].get("parameters")


def test_kubeflows_own_variables_are_heard(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with kubeflow_api(token="secret", multi_user=True) as api:
        (tmp_path / "token").write_text("secret\n")
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", api.host)
        monkeypatch.setenv("KF_PIPELINES_UI_ENDPOINT", "https://kubeflow.example/pipeline")
        monkeypatch.setenv("KF_PIPELINES_DEFAULT_EXPERIMENT_NAME", "team")
        assert "refuses (401" in refused("submit", package, "--namespace", "me")
        monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
        assert "give --namespace" in refused("submit", package)
        told = said("submit", package, "--namespace", "me")
        assert "https://kubeflow.example/pipeline/#/runs/details/" in told
        assert [(e["display_name"], e["namespace"]) for e in api.experiments.values()] == [("team", "me")]
        (tmp_path / "token").write_text("another")
        assert "refuses (403" in refused("submit", package, "--namespace", "me")


def test_a_schedule_neither_overlaps_nor_catches_up_and_replaces_one_of_its_name(
    api: KubeflowApi, package: Path
) -> None:
    at = ("--host", api.host)
    said("schedule", package, *at, "--name", "other", "--cron", "0 0 1 * * *")
    first = said("schedule", package, *at, "--name", "weekly", "--cron", "0 3 * * 1")
    old = next(one for one in api.recurring.values() if one["display_name"] == "weekly")
    assert "weekly (0 0 3 * * 1)" in first
    assert (old["max_concurrency"], old["no_catchup"], old["mode"]) == ("1", True, "ENABLE")
    assert not old.get("service_account"), "Kubeflow gives the installation's own"
    begun = len(api.asked)
    told = said("schedule", package, *at, "--name", "weekly", "--cron", "0 4 * * 1", "--finetunes", "zh")
    assert f"replaced {old['recurring_run_id']}" in told
    assert sorted(one["display_name"] for one in api.recurring.values()) == ["other", "weekly"]
    new = next(one for one in api.recurring.values() if one["display_name"] == "weekly")
    assert new["trigger"]["cron_schedule"]["cron"] == "0 0 4 * * 1"
    assert new["runtime_config"]["parameters"] == {"finetunes": "zh"}
    steps = [name.split("_recurring_run")[0] for name, *_ in api.asked[begun:] if "_run_service_" in name]
    assert [name.removeprefix("recurring_run_service_") for name in steps] == ["list", "disable", "create", "delete"]
    assert f"removed {new['recurring_run_id']}" in said("unschedule", "weekly", *at)
    assert "there is no schedule weekly in the experiment realign (there: other)" in refused(
        "unschedule", "weekly", *at
    )


def test_a_schedule_that_cannot_be_made_leaves_the_old_one_in_force(api: KubeflowApi, package: Path) -> None:
    at = ("--host", api.host, "--name", "weekly", "--cron")
    said("schedule", package, *at, "0 3 * * 1")
    api.broken.add("recurring_run_service_create_recurring_run")
    assert "answers 500: Internal server error: out of order" in refused("schedule", package, *at, "0 4 * * 1")
    [left] = api.recurring.values()
    assert (left["status"], left["trigger"]["cron_schedule"]["cron"]) == ("ENABLED", "0 0 3 * * 1")


def test_a_schedule_that_is_interrupted_leaves_the_old_one_in_force(
    api: KubeflowApi, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = ("--host", api.host, "--name", "weekly", "--cron")
    said("schedule", package, *at, "0 3 * * 1")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kfp.client.Client.create_recurring_run", interrupted)
    CliRunner().invoke(app, ["pipeline", "schedule", str(package), *at, "0 4 * * 1"])
    assert "recurring_run_service_disable_recurring_run" in {name for name, *_ in api.asked}
    [left] = api.recurring.values()
    assert (left["status"], left["trigger"]["cron_schedule"]["cron"]) == ("ENABLED", "0 0 3 * * 1")


def test_runs_and_schedules_are_listed_over_pages_the_latest_first(package: Path) -> None:
    with kubeflow_api(page=2) as api:
        at = ("--host", api.host)
        assert said("list", *at) == "runs: none\nschedules: none\n"
        for name in "abcde":
            said("submit", package, *at, "--name", name)
            said("schedule", package, *at, "--name", f"s{name}", "--cron", "0 3 * * *")
        said("submit", package, *at, "--name", "elsewhere", "--experiment", "another")
        found = json.loads(said("list", *at, "--json"))
        assert [one["name"] for one in found["runs"]] == ["e", "d", "c", "b", "a"]
        assert {one["state"] for one in found["runs"]} == {"PENDING"}
        assert [one["name"] for one in found["schedules"]] == ["sa", "sb", "sc", "sd", "se"]
        shown = said("list", *at, "--limit", 3).splitlines()
        assert [line.split()[0] for line in shown] == [
            "runs:",
            "e",
            "d",
            "c",
            "schedules:",
            "sa",
            "sb",
            "sc",
            "sd",
            "se",
        ]
        assert shown[5].split()[1:8] == ["ENABLED", "0", "0", "3", "*", "*", "*"]


def test_a_run_is_ended(api: KubeflowApi, package: Path) -> None:
    name = said("submit", package, "--host", api.host).split()[0]
    assert said("cancel", name, "--host", api.host) == f"{name} is asked to end\n"
    assert api.runs[name]["state"] == "CANCELING"
    assert "CANCELING" in said("list", "--host", api.host)
    assert "answers 404: Run nobody not found." in refused("cancel", "nobody", "--host", api.host)


def test_what_is_wrong_is_said_before_anything_is_asked(api: KubeflowApi, package: Path, tmp_path: Path) -> None:
    assert "where is Kubeflow Pipelines? Give --host" in refused("list")
    assert "begins with http://" in refused("list", "--host", "kubeflow:8080")
    nobody = f"http://127.0.0.1:{free_port()}"
    assert f"does not answer at {nobody}" in refused("list", "--host", nobody)
    at = ("--host", api.host)
    assert "no such" in refused("submit", tmp_path / "none.yaml", *at).lower()
    assert "is no compiled pipeline" in refused("submit", written(tmp_path), *at)
    relative = written(tmp_path, CONFIG.replace("/models/zh", "zh"))
    assert "zh is relative to this file" in refused("submit", package, *at, "--config", relative)
    assert "finetunes: en is not in the config (there: zh, hi)" in refused("submit", package, *at, "--finetunes", "en")
    merges = written(tmp_path, MERGE)
    assert "with these finetunes:" in refused("submit", package, *at, "--config", merges, "--finetunes", "zh")
    assert "is no cron expression" in refused("schedule", package, "--host", nobody, "--name", "x", "--cron", "daily")
    assert api.asked == [] or {name for name, *_ in api.asked} == {"healthz_service_get_healthz"}


def test_the_stand_in_finds_what_does_not_fit() -> None:
    run = {
        "display_name": 3, "state": "RUNING", "colour": "red", "runtime_config": {"parameters": [], "root": ""},
        "state_history": [{"state": "FAILED"}, {"status": "FAILED"}],
    }  # fmt: skip
    assert len(misfits(run, "V2beta1Run", "run")) == 6
    fine = {"display_name": "x", "max_concurrency": "1", "no_catchup": True, "mode": "ENABLE"}
    assert misfits(fine, "V2beta1RecurringRun", "schedule") == []
    with pytest.raises(AssertionError, match="jobs is no operation"), kubeflow_api() as api:
        said_nothing(f"{api.host}/apis/v2beta1/jobs")


def said_nothing(url: str) -> None:
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(url)
