"""Jobs of a real Ray cluster with token authentication: submitted once, followed, found again, stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from components.checkpoints.identity import identify
from components.checkpoints.reference import open_checkpoint
from tests.families import minute_family
from tests.ray_head import RayHead, ray_head

pytestmark = [pytest.mark.service, pytest.mark.multiproc, pytest.mark.xdist_group("jobs")]

ASK = """
import sys
from ray_jobs.jobs import Job, run_job
address, entrypoint, name = sys.argv[1:4]
try:
    print(run_job(Job(address, entrypoint, name, **eval(sys.argv[4]))))
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


QUEUE = """
import json, sys
from ray_jobs.cluster import ClusterExecution
from ray_jobs.stage import StageSpec
from ray_jobs.submit import ray_runner
specs = [StageSpec.model_validate(spec) for spec in json.loads(sys.argv[1])]
answers = {}
with ray_runner(cluster=ClusterExecution(patience_s=1)) as runner:
    for spec in specs:
        runner.submit(spec)
    while len(answers) < len(specs):
        answers |= {spec.workspace: answer for spec, answer in runner.wait(1.0)}
print(json.dumps(answers))
"""

REMEMBER = """
import asyncio, sys, time
from ray._raylet import GcsClient
from ray.dashboard.modules.job.common import JobInfo, JobInfoStorageClient, JobStatus
async def put():
    jobs = JobInfoStorageClient(GcsClient(address=sys.argv[1]))
    for status in sys.argv[2:]:
        now = int(time.time() * 1000)
        lost = {"driver_agent_http_address": "http://127.0.0.1:1", "driver_node_id": "ff" * 28}
        await jobs.put_info(status, JobInfo(JobStatus(status), "true", start_time=now, end_time=now, **lost))
asyncio.run(put())
"""
"""Jobs (their id is their status) that ran on a head that is lost, as the one after it has them from Redis."""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    with ray_head(tmp_path_factory.mktemp("head"), cpus=1) as head:
        command = [sys.executable, "-c", REMEMBER, f"127.0.0.1:{head.gcs}", "RUNNING", "SUCCEEDED"]
        subprocess.run(command, env=head.environment, check=True)
        yield head


def client(head: RayHead, entrypoint: str, name: str, given: str = "{}", **environment: str) -> subprocess.Popen[str]:
    """In a process of its own, as steps are: Ray reads its token when it is imported."""
    command = [sys.executable, "-c", ASK, head.address, entrypoint, name, given]
    return subprocess.Popen(command, env={**head.environment, **environment}, stdout=subprocess.PIPE, text=True)


def asked(head: RayHead, entrypoint: str, name: str, given: str = "{}", **environment: str) -> str:
    out, _ = client(head, entrypoint, name, given, **environment).communicate(timeout=180)
    return out


def jobs(head: RayHead) -> dict[str, Any]:
    """Id -> status, as the server has it."""
    asking = urllib.request.Request(f"{head.address}/api/jobs/", headers={"Authorization": f"Bearer {head.token}"})
    with urllib.request.urlopen(asking, timeout=30) as answer:
        return {one["submission_id"]: one["status"] for one in json.load(answer)}


@pytest.mark.parametrize("status", ["RUNNING", "SUCCEEDED"])  # the first must be asked for before any other job
def test_a_job_that_was_lost_with_its_head_has_failed_and_can_be_begun_again(head: RayHead, status: str) -> None:
    assert jobs(head)[status] == status
    answer = """echo 'REALIGN-ANSWER {"rate": 0.5}'"""
    lost = asked(head, answer, status, "{'patience_s': 4.0}")
    assert "is there already" in lost
    assert "'status': 'failed', 'answer': {}" in lost
    assert "its log is lost with the node that it ran on" in lost
    assert "{'status': 'done', 'answer': {'rate': 0.5}" in asked(head, answer, status)


def test_a_job_that_somebody_stops_was_stopped(head: RayHead, tmp_path: Path) -> None:
    started = tmp_path / "started"
    step = client(head, f"touch {started}; sleep 600", "ended")
    waited(started.exists)
    stopping = [sys.executable, "-c", f"from ray_jobs.jobs import stop_jobs; print(stop_jobs({head.address!r}, 'end'))"]
    assert subprocess.run(stopping, env=head.environment, capture_output=True).stdout == b"['ended']\n"
    assert "{'status': 'stopped', 'answer': {}" in step.communicate(timeout=60)[0]


def test_a_job_is_run_once_and_its_log_and_answer_come_back(head: RayHead, tmp_path: Path) -> None:
    count = f"echo run >> {tmp_path / 'count'}; echo hello; echo 'REALIGN-ANSWER {{\"rate\": 0.5}}'"
    first, again = asked(head, count, "once"), asked(head, count, "once")
    assert "job once submitted" in first
    assert "job once is there already" in again
    for out in (first, again):
        assert "\nhello\n" in out
        assert out.splitlines()[-1] == "{'status': 'done', 'answer': {'rate': 0.5}, 'error': ''}"
        assert "\nREALIGN-ANSWER" not in out
    assert (tmp_path / "count").read_text() == "run\n"


def test_one_that_failed_says_why_and_is_run_again_when_asked_again(head: RayHead, tmp_path: Path) -> None:
    mended = tmp_path / "mended"
    entrypoint = f'test -e {mended} || {{ echo \'REALIGN-ANSWER {{"error": "no data"}}\'; exit 2; }}'
    assert "'status': 'failed', 'answer': {'error': 'no data'}, 'error': 'no data'" in asked(head, entrypoint, "mended")
    mended.touch()
    assert "'status': 'done'" in asked(head, entrypoint, "mended")


def test_a_client_that_is_cut_off_finds_its_job_again(head: RayHead, tmp_path: Path) -> None:
    count, go = tmp_path / "count", tmp_path / "go"
    entrypoint = f"echo run >> {count}; while ! test -e {go}; do sleep 0.2; done; echo went"
    cut = client(head, entrypoint, "cut")
    waited(count.exists)
    cut.kill()
    cut.wait()
    follower = client(head, entrypoint, "cut")
    time.sleep(2)
    assert jobs(head)["cut"] == "RUNNING"
    go.touch()
    out, _ = follower.communicate(timeout=60)
    assert "is there already" in out
    assert "\nwent\n" in out
    assert count.read_text() == "run\n"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_client_that_is_asked_to_end_stops_its_job(head: RayHead, tmp_path: Path, how: signal.Signals) -> None:
    started = tmp_path / "started"
    step = client(head, f"touch {started}; sleep 600", how.name)
    waited(started.exists)
    time.sleep(1)
    os.kill(step.pid, how)
    out, _ = step.communicate(timeout=60)
    assert f"job {how.name} was stopped" in out
    assert jobs(head)[how.name] == "STOPPED"


def test_a_token_is_needed_and_must_be_the_clusters(head: RayHead) -> None:
    none = asked(head, "true", "none", RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN="")
    assert none.startswith(f"ClusterError: the Ray head at {head.address} wants a token (401)")
    wrong = asked(head, "true", "wrong", RAY_AUTH_TOKEN="wrong")
    assert wrong.startswith(f"ClusterError: the Ray head at {head.address} refuses the token (403)")
    assert not {"none", "wrong"} & jobs(head).keys()


def test_a_stage_waits_for_its_turn_and_not_for_a_node_that_never_comes(head: RayHead, tmp_path: Path) -> None:
    """One CPU: of four stages three wait for longer than their patience, and for a node of 64 nobody waits long."""
    path = minute_family() / "aligned"
    semantics = {"role": "aligned", "identity": identify(open_checkpoint(path)).sha256}
    places = {"checkpoints": {"self": {"path": str(path)}}}
    specs = [
        {
            "stage": "load",
            "workspace": str(tmp_path / str(n)),
            "semantics": semantics,
            "execution": places | {"threads": n},
        }
        for n in (1, 1, 1, 64)
    ]
    specs = [{**spec, "workspace": f"{spec['workspace']}-{at}"} for at, spec in enumerate(specs)]
    environment = {**head.environment, "RAY_ADDRESS": f"127.0.0.1:{head.gcs}"}
    command = [sys.executable, "-c", QUEUE, json.dumps(specs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    *turns, large = (json.loads(done.stdout.splitlines()[-1])[spec["workspace"]] for spec in specs)
    assert [answer["status"] for answer in turns] == ["done"] * 3
    assert large["error"]["type"] == "ClusterError"
    assert (
        "no node took it within 1 s; it asks for 64 CPUs; nodes that are up: 1, with 1 CPU" in large["error"]["message"]
    )
    assert "(execution.cluster.patience_s)" in large["error"]["message"]


def test_a_head_that_is_away_is_waited_for_and_then_told(head: RayHead) -> None:
    from tests.mlflow_server import free_port

    command = [sys.executable, "-c", ASK, f"http://127.0.0.1:{free_port()}", "true", "away", "{'patience_s': 4.0}"]
    done = subprocess.run(command, env=head.environment, capture_output=True, text=True, timeout=120)
    assert "ClusterAwayError: no Ray head answers at" in done.stdout


def test_a_head_that_takes_requests_and_says_nothing_is_away(head: RayHead) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-c", ASK, address, "true", "silent", "{'patience_s': 2.0}"]
        done = subprocess.run(command, env=head.environment, capture_output=True, text=True, timeout=60)
    assert "ClusterAwayError: no Ray head answers at" in done.stdout


def waited(there: Callable[[], bool], seconds: float = 60.0) -> None:
    ends = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < ends
        time.sleep(0.1)
