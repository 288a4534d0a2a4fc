"""`kill -9` of the driver at random moments, its workers writing on for seconds: a rerun ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.pipelines.small import command, records, run, small_config, write_config

pytestmark = [pytest.mark.multiproc, pytest.mark.xdist_group("run")]


def results(workspace: Path) -> dict[str, dict[str, str]]:
    """Every result's outputs with their hashes. Search and evaluation are in it too: all of them are deterministic."""
    return {
        reference: {name: file["sha256"] for name, file in record["outputs"].items()}
        for reference, record in records(workspace).items()
    }


def assert_nothing_half_made(workspace: Path) -> None:
    for stage in workspace.iterdir():
        if stage.is_dir() and not stage.name.startswith(".") and stage.name not in ("mlartifacts", "figures"):
            for result in stage.iterdir():
                if not result.name.startswith("."):
                    record = json.loads((result / "record.json").read_text())
                    for name, file in record["outputs"].items():
                        assert (result / name).stat().st_size == file["bytes"]


def kill_after(config: Path, workspace: Path, seconds: float) -> bool:
    """Start a run and kill its driver. False when it had ended before."""
    with subprocess.Popen(
        command(config, workspace), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as driver:
        try:
            driver.wait(seconds)
        except subprocess.TimeoutExpired:
            os.kill(driver.pid, signal.SIGKILL)
            driver.wait()
            return True
    return False


@pytest.mark.parametrize(("kills", "finetunes"), [(1, ("hi",)), pytest.param(10, ("zh", "hi"), marks=pytest.mark.slow)])
def test_killed_runs_end_as_an_unbroken_one(tmp_path: Path, kills: int, finetunes: tuple[str, ...]) -> None:
    config = write_config(tmp_path, small_config(tmp_path, finetunes=finetunes))
    started = time.monotonic()
    reference = run(config, tmp_path / "unbroken")
    took = time.monotonic() - started
    assert reference.returncode == 0, reference.stderr
    expected = results(tmp_path / "unbroken")
    moments = random.Random(2)  # late at first, so that there is something to go on with
    broken, killed = tmp_path / "broken-0", 0
    for i in range(1, 4 * kills):
        # Each kill meets the run where the last one left it; when a run gets through, the next one starts afresh, and as this
        # machine may have been slower before, its kill comes sooner.
        if kill_after(config, broken, moments.uniform(0.2, 0.8) * took):
            killed += 1
        else:
            assert results(broken) == expected
            took *= 0.7
            broken = tmp_path / f"broken-{i}"
        if broken.is_dir():
            assert_nothing_half_made(broken)
        if killed == kills:
            break
    assert killed == kills
    assert records(broken)
    last = run(config, broken)
    assert last.returncode == 0, last.stderr
    assert results(broken) == expected
    leftovers = [p for p in broken.glob("*/.*") if p.name.startswith((".attempt-", ".state-"))]
    assert leftovers == []


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_run_that_is_asked_to_end_says_how_to_go_on(tmp_path: Path, number: signal.Signals, word: str) -> None:
    config = write_config(tmp_path, small_config(tmp_path, finetunes=("hi",)))
    workspace = tmp_path / "workspace"
    with subprocess.Popen(
        command(config, workspace),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as driver:
        deadline = time.monotonic() + 120
        while not records(workspace) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(driver.pid, number)
        _, told = driver.communicate(timeout=60)
    assert driver.returncode == 128 + number
    assert told.splitlines()[-1] == f"realign: {word}; the same command continues"
    assert "Traceback" not in told
    assert "***" not in told
    assert_nothing_half_made(workspace)
