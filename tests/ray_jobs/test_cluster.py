"""A run as a job of a cluster of several nodes, submitted from outside: training spread over nodes, one of which is lost."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from components.reporting.schema import read_summary
from tests.pipelines.small import records, small_config, write_config
from tests.ray_head import RayHead, ray_head
from tests.ray_jobs.test_jobs import ASK, waited

pytestmark = [pytest.mark.service, pytest.mark.multiproc, pytest.mark.xdist_group("jobs")]

STEPS = 60


def submitted(head: RayHead, command: str, name: str) -> subprocess.Popen[str]:
    """`realign` as a job; from a process that knows the head's address and the token alone."""
    entrypoint = f"{sys.executable} -m pipelines.cli {command}"
    asking = [sys.executable, "-c", ASK, head.address, entrypoint, name, "{}"]
    return subprocess.Popen(asking, env=head.environment, stdout=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[str, dict[str, Any]]:
    """The log, and what `run_job` returned."""
    out, _ = process.communicate(timeout=500)
    try:
        return out, eval(out.splitlines()[-1])
    except SyntaxError:
        raise AssertionError(out) from None


def step_of(workspace: Path) -> int:
    """How far training is."""
    try:
        [found] = workspace.glob("train_mask/.state-*/progress.json")
        return int(json.loads(found.read_text()).get("done", 0))
    except (ValueError, FileNotFoundError):
        return 0


@pytest.mark.slow
def test_a_run_outlives_the_node_that_half_of_its_training_is_on(tmp_path: Path) -> None:
    config = small_config(tmp_path, finetunes=("zh",), steps=STEPS)
    config["fusion"] = {}
    config["execution"] = {"threads": 1, "mask": {"ranks": 2, "stage": 3, "checkpoint_seconds": 0}}
    path, workspace = write_config(tmp_path, config), tmp_path / "workspace"
    directory = tmp_path / "head"
    directory.mkdir()
    with ray_head(directory, cpus=0) as head:
        nodes = [head.add_node(1), head.add_node(1)]  # a CPU each: two ranks cannot share one
        job = submitted(head, f"run {path} --workspace {workspace}", "run")
        waited(lambda: step_of(workspace) >= 5, 240)
        head.kill(nodes[0])
        assert step_of(workspace) < STEPS
        head.add_node(1)  # as an autoscaler does
        out, end = ended(job)
        assert end["status"] == "done", out

        too_large = small_config(tmp_path, finetunes=("zh",))
        too_large["execution"] = {"threads": 64}
        (tmp_path / "large").mkdir()
        large = write_config(tmp_path / "large", too_large)
        began = time.monotonic()
        command = f"step {large} --workspace {tmp_path / 'large' / 'w'} --steps plan --patience 3"
        _, end = ended(submitted(head, command, "large"))
        assert end["status"] == "failed"
        assert "no node took it within 3 s; it asks for 64 CPUs; nodes that are up: 3, with " in end["error"]
        assert "1 CPU" in end["error"]
        assert time.monotonic() - began < 120

    [zh] = read_summary(workspace / "summary.json")["finetunes"]
    assert zh["status"] == "done"
    assert zh["selected"] in ("soft", "binary")
    trained = [record for name, record in records(workspace).items() if name.startswith("train_mask/")]
    assert len(trained) == 1
    assert trained[0]["execution"]["mask"]["ranks"] == 2
