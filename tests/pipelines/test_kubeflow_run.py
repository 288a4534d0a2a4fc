"""The pipeline run whole under `kfp.local`, its steps submitting real jobs to a real Ray head with token authentication."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kfp import local
from ray._private.authentication_test_utils import reset_auth_token_state
from typer.testing import CliRunner

from components.reporting.schema import check_summary, read_summary
from pipelines.cli import app
from pipelines.kubeflow import make_pipeline
from pipelines.kubeflow_steps import Place, jobs_of_run, run_stages, submission_id
from ray_jobs.jobs import stop_jobs
from tests.mlflow_server import free_port
from tests.pipelines.pipelines import IMAGE
from tests.pipelines.small import command, records, small_config, write_config
from tests.ray_head import RayHead, ray_head

pytestmark = [pytest.mark.service, pytest.mark.multiproc, pytest.mark.xdist_group("jobs")]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    try:
        with pytest.MonkeyPatch.context() as patch:
            # Jobs say `realign`, which is this interpreter's neighbour.
            patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
            with ray_head(tmp_path_factory.mktemp("head"), cpus=2) as head:
                for name, value in head.environment.items():  # as a step's pod has them
                    patch.setenv(name, value)
                reset_auth_token_state()  # another test may have imported Ray, which reads its token once
                yield head
    finally:
        reset_auth_token_state()


@dataclass(frozen=True)
class Run:
    """What a run of the pipeline leaves."""

    out: Path
    workspace: Path
    failed: str

    def output(self, task: str, name: str = "Output") -> Any:
        """What a step says."""
        [path] = self.out.glob(f"*/{task}/executor_output.json")
        return json.loads(path.read_text())["parameterValues"][name]

    def artifact(self, task: str, name: str) -> Path:
        [path] = self.out.glob(f"*/{task}/{name}")
        return path

    def metrics(self) -> dict[str, float]:
        [path] = self.out.glob("*/gate/executor_output.json")
        [found] = json.loads(path.read_text())["artifacts"]["rates"]["artifacts"]
        return found["metadata"]


@pytest.fixture(autouse=True)
def _print(monkeypatch: pytest.MonkeyPatch) -> None:
    """`kfp.local` indents what is printed while a step runs, by a `print` of its own; steps at once put back the wrong one."""
    monkeypatch.setattr(builtins, "print", builtins.print)


def run_pipeline(head: RayHead, directory: Path, config: dict[str, Any], **given: Any) -> Run:
    made = make_pipeline(write_config(directory, config), image=IMAGE)
    out, workspace, failed = directory / "out", directory / "pipeline", ""
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(out))
    try:
        made(workspace=str(workspace), ray_address=head.address, **given)
    except RuntimeError as error:
        failed = str(error)
    return Run(out, workspace, failed)


def jobs(head: RayHead) -> dict[str, str]:
    """Id -> status, as the server has it."""
    asking = urllib.request.Request(f"{head.address}/api/jobs/", headers={"Authorization": f"Bearer {head.token}"})
    with urllib.request.urlopen(asking, timeout=30) as answer:
        return {one["submission_id"]: one["status"] for one in json.load(answer) if one["submission_id"]}


def emptied(config: dict[str, Any], directory: Path, name: str) -> dict[str, Any]:
    """A finetune of nothing."""
    (directory / name).mkdir()
    return {**config["finetunes"][0], "name": name, "path": str(directory / name)}


@pytest.mark.slow
def test_a_run_whose_finetunes_are_all_broken_has_its_summary_and_fails_last(head: RayHead, tmp_path: Path) -> None:
    config = small_config(tmp_path, finetunes=("zh",))
    config["finetunes"] = [emptied(config, tmp_path, "empty"), emptied(config, tmp_path, "left-out")]
    config["evaluation"]["sets"] = [
        {**one, "limit": 2} for one in config["evaluation"]["sets"] if one["kind"] == "harmful"
    ]
    config["finetunes"] = [{**one, "sets": []} for one in config["finetunes"]]
    config["fusion"] = {"controls": []}
    before = set(jobs(head))
    run = run_pipeline(head, tmp_path, config, finetunes="empty")
    assert "verdict" in run.failed
    summary = check_summary(json.loads(run.artifact("publish", "summary").read_text()), where="the artifact")
    assert [(one["name"], one["status"]) for one in summary["finetunes"]] == [("empty", "failed")]
    assert summary["aligned"] is not None
    assert summary == read_summary(run.workspace / "summary.json")
    assert "empty failed" in run.artifact("gate", "table").read_text()
    assert "<html" in run.artifact("publish", "report").read_text()
    [line] = run.output("publish")["failed"]
    assert line.startswith("empty failed at load:")
    # What stands on the failed load has no job.
    made = {name.split("-", 2)[2].rsplit("-", 1)[0] for name in set(jobs(head)) - before}
    assert made == {"run-plan", "run-evaluate", "empty-load", "run-gate", "run-publish"}
    lost = run.output("for-loop-1-iteration-0/stages-5")["lost"]
    assert (lost["empty/load"], lost["empty/evaluate_soft"]) == ("failed", "skipped")


STEP = """
import json, sys
from pipelines.kubeflow_steps import Place, run_stages
print(json.dumps(run_stages(Place(**json.loads(sys.argv[1])), ["load"], {"name": ""})))
"""


def test_a_step_that_is_killed_finds_its_job_again(head: RayHead, tmp_path: Path) -> None:
    config = small_config(tmp_path, finetunes=("zh",))
    place = {
        "run": "the-run", "config": write_config(tmp_path, config).read_text(), "finetunes": "",
        "workspace": str(tmp_path / "workspace"), "ray_address": head.address, "pending_seconds": 0.0,
    }  # fmt: skip
    asking = [sys.executable, "-c", STEP, json.dumps(place)]
    name = submission_id("the-run", "", ["load"])
    first = subprocess.Popen(asking, stdout=subprocess.DEVNULL, env=head.environment)
    ends = time.monotonic() + 120
    while name not in jobs(head):
        assert time.monotonic() < ends
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    again = subprocess.run(asking, capture_output=True, text=True, check=True, env=head.environment)
    assert f"job {name} is there already; following it" in again.stdout, again.stdout
    assert json.loads(again.stdout.splitlines()[-1]) == {"name": "", "lost": {}, "errors": []}, again.stdout
    assert [one for one in jobs(head) if one.startswith(jobs_of_run("the-run"))] == [name]


def test_a_job_whose_driver_is_gone_is_begun_again_and_given_up_with_a_status(
    head: RayHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, small_config(tmp_path, finetunes=("zh",))).read_text()
    # The driver dies at once, as one that the kernel kills for its memory: there is no answer.
    place = Place("gone", config, "", "/dev/null/$(kill -9 $$)", head.address, 0.0)
    monkeypatch.setattr(
        "pipelines.kubeflow_steps.shlex.join", lambda words: f"echo begun >> {tmp_path}/count; kill -9 $$"
    )
    found = run_stages(place, ["load", "evaluate"], {"name": "zh"})
    assert (tmp_path / "count").read_text() == "begun\n" * 3
    assert found["lost"]["zh/load"] == "failed"
    [line] = found["errors"]
    assert "-9" in line or "signal" in line.lower()


def test_a_job_that_is_stopped_is_not_begun_again(
    head: RayHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, small_config(tmp_path, finetunes=("zh",))).read_text()
    monkeypatch.setattr(
        "pipelines.kubeflow_steps.shlex.join", lambda words: f"echo begun >> {tmp_path}/count; sleep 600"
    )
    with ThreadPoolExecutor() as pool:
        step = pool.submit(run_stages, Place("cut", config, "", "/w", head.address, 0.0), ["load"], {"name": "zh"})
        ends = time.monotonic() + 120
        while not (tmp_path / "count").exists():
            assert time.monotonic() < ends
            time.sleep(0.2)
        assert stop_jobs(head.address, jobs_of_run("cut")) == [submission_id("cut", "zh", ["load"])]
        assert step.result(timeout=120)["lost"] == {"zh/load": "failed"}
    assert (tmp_path / "count").read_text() == "begun\n"


def test_the_jobs_of_one_run_are_stopped_and_no_others(head: RayHead) -> None:
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(head.address)
    mine = [submission_id("mine", of, ["fuse"]) for of in ("zh", "hi")]
    other = submission_id("other", "zh", ["fuse"])
    for name in (*mine, other):
        client.submit_job(entrypoint="sleep 600", submission_id=name)
    nobody = f"http://127.0.0.1:{free_port()}"
    done = CliRunner().invoke(app, ["pipeline", "cancel", "mine", "--host", nobody, "--ray-address", head.address])
    assert f"does not answer at {nobody}" in str(done.exception)
    assert sorted(done.stdout.removeprefix("stopped ").strip().split(", ")) == sorted(mine)
    ends = time.monotonic() + 60
    while {jobs(head)[name] for name in mine} != {"STOPPED"}:
        assert time.monotonic() < ends
        time.sleep(0.2)
    assert jobs(head)[other] in ("PENDING", "RUNNING")
    assert stop_jobs(head.address, jobs_of_run("mine")) == []
    client.stop_job(other)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["each", "merge"])
def test_it_leaves_what_the_same_run_leaves_without_kubeflow(head: RayHead, tmp_path: Path, mode: str) -> None:
    config = small_config(tmp_path)
    config["finetunes"].append(emptied(config, tmp_path, "empty"))
    if mode == "merge":
        config["mode"], config["fusion"] = "merge", {"controls": []}
        config["merges"] = [
            {"name": "both", "method": "average", "of": ["zh", "hi"]},
            {"name": "all", "method": "ties"},
        ]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = write_config(tmp_path, config)
    done = subprocess.run(command(path, tmp_path / "alone"), capture_output=True, text=True, check=False, env=alone)
    assert done.returncode == 2, done.stderr
    run = run_pipeline(head, tmp_path, config)
    assert "verdict" in run.failed
    assert set(records(run.workspace)) == set(records(tmp_path / "alone"))
    expected, found = (read_summary(where / "summary.json") for where in (tmp_path / "alone", run.workspace))
    assert found["aligned"] == expected["aligned"]
    models = {"each": ("finetunes",), "merge": ("finetunes", "merged")}[mode]
    kept = (
        "name",
        "status",
        "error",
        "selected",
        "before",
        "after_soft",
        "after_binary",
        "controls",
        "registry",
        "notes",
    )
    for kind in models:
        for one, other in zip(found[kind], expected[kind], strict=True):  # type: ignore[literal-required]
            assert {key: one.get(key) for key in kept} == {key: other.get(key) for key in kept}
    states = {one["name"]: one["status"] for kind in models for one in found[kind]}  # type: ignore[literal-required]
    assert states == {"zh": "done", "hi": "done", "empty": "failed"} | (
        {"both": "done", "all": "failed"} if mode == "merge" else {}
    )
    target = "both" if mode == "merge" else "zh"
    rates = next(one for kind in models for one in found[kind] if one["name"] == target)["after_soft"]  # type: ignore[literal-required]
    assert run.metrics()[f"{target}/after_soft/asr"] == rates["asr"]["value"]
    assert f"- {target}: small-{target} version 1" in run.artifact("publish", "links").read_text()
    shutil.rmtree(run.workspace)
