"""Ray on this machine: answers come back, a bug is not tried again, nobody else may submit a job."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from components.checkpoints.identity import identify
from components.checkpoints.reference import open_checkpoint
from ray_jobs.stage import StageSpec
from ray_jobs.submit import RayRunner, _Pending
from tests.families import minute_family

pytestmark = [pytest.mark.multiproc, pytest.mark.xdist_group("jobs")]

DRIVER = """
import json, os, sys, time, urllib.error, urllib.request
from ray_jobs.stage import StageSpec
from ray_jobs.submit import ray_runner

specs = [StageSpec.model_validate(spec) for spec in json.load(open(sys.argv[1]))]
body = {"data": b'{"entrypoint": "true"}', "headers": {"Content-Type": "application/json"}}
request = urllib.request.Request("http://127.0.0.1:52365/api/job_agent/jobs/", **body)
answers = {}

def stranger():
    "What the job agent answers to a request without the token, once it answers at all: it is slow to start."
    last = "nobody asked"
    for _ in range(30):
        try:
            return urllib.request.urlopen(request, timeout=10).status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError as error:  # nobody yet, or the agent of another test's Ray, which has the same port and ends
            last = "nobody listens" if "refused" in str(error) else f"no answer: {error}"
            time.sleep(1)
    return last

with ray_runner(1) as runner:
    for spec in specs:
        runner.submit(spec)
    while len(answers) < len(specs):
        answers |= {spec.fingerprint: answer for spec, answer in runner.wait(1.0)}
    seen = {"answers": answers, "token": len(os.environ["RAY_AUTH_TOKEN"]), "stranger": stranger()}
with ray_runner(1) as runner:  # a second start in one process, as benchmarks do
    runner.submit(specs[0])
    again = []
    while not again:
        again = runner.wait(1.0)
print(json.dumps({**seen, "again": again[0][1]["status"]}))
"""


@pytest.mark.parametrize(
    ("stage", "execution", "request_"),
    [
        ("load", {}, {"CPU": 4}),
        ("train_mask", {"spread": 2}, {"CPU": 0}),
        ("evaluate", {"spread": 0}, {"CPU": 4}),
        ("evaluate", {"spread": 2}, {"CPU": 0}),
        ("evaluate", {"spread": 2, "judge_models": 1}, {"CPU": 4}),
        ("evaluate", {"spread": 2, "judge_models": 1, "judge": {"device": "cuda:0"}}, {"CPU": 4, "GPU": 1}),
        ("evaluate", {"judge": {"device": "cuda"}}, {"CPU": 4}),
        ("landscape", {"spread": 2, "judge_models": 1, "judge": {"device": "cuda"}}, {"CPU": 0}),
    ],
)
def test_who_only_waits_for_others_takes_nothing_of_a_cluster(
    stage: str, execution: dict[str, object], request_: dict[str, float]
) -> None:
    given = {"threads": 4, "judge": {"device": "cpu"}, **execution}
    spec = StageSpec(stage=stage, workspace="w", semantics={}, execution=given)
    assert RayRunner(cpus=2)._request(_Pending(spec, 1)) == request_


def test_answers_come_back_and_strangers_are_refused(tmp_path: Path) -> None:
    path = minute_family() / "aligned"
    good = StageSpec(
        stage="load",
        workspace=str(tmp_path / "workspace"),
        semantics={"role": "aligned", "identity": identify(open_checkpoint(path)).sha256},
        execution={"checkpoints": {"self": {"path": str(path)}}},
    )
    crashes = good.model_copy(update={"semantics": {}})  # a bug: its key is missing
    (tmp_path / "specs.json").write_text(json.dumps([good.model_dump(), crashes.model_dump()]))
    (tmp_path / "driver.py").write_text(DRIVER)
    # In a process of its own, as drivers are: Ray reads its token when it is imported.
    command = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path / "specs.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["answers"][good.fingerprint]["status"] == "done"
    fault = seen["answers"][crashes.fingerprint]
    assert (fault["status"], fault["error"]["type"]) == ("failed", "Fault")
    assert "KeyError" in fault["error"]["message"]
    assert "(tries: 1)" in fault["error"]["message"]
    assert seen["token"] == 64
    assert seen["again"] == "done"
    assert seen["stranger"] in (401, 403, "nobody listens")
