"""Ranks on Ray Train: killed ones come back where the last state stood, and the driver's death is no other case."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from components.checkpoints.reference import open_checkpoint
from components.checkpoints.source import read_whole
from components.masks.artifact import MaskArtifact
from components.reporting.schema import read_summary
from tests.pipelines.small import command, records, run, small_config, write_config

pytestmark = [pytest.mark.multiproc, pytest.mark.slow, pytest.mark.xdist_group("jobs")]
STEPS = 60


def config_of(tmp_path: Path, name: str, **mask: Any) -> Path:
    config = small_config(tmp_path, finetunes=("hi",), steps=STEPS)
    config["fusion"] = {"controls": []}
    config["execution"] = {"mask": {"checkpoint_seconds": 0.0, **mask}}
    (tmp_path / name).mkdir()
    return write_config(tmp_path / name, config)


def ranks_of(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def steps_done(workspace: Path) -> int:
    states = list(workspace.glob("train_mask/.state-*/LATEST.json"))
    try:
        return int(json.loads(states[0].read_text())["step"]) if states else 0
    except (OSError, ValueError):
        return 0


def run_and_strike(config: Path, workspace: Path, at_step: int, strike: Callable[[subprocess.Popen[str]], None]) -> int:
    """Start a run, strike once when so many steps are saved, and wait; the driver's exit code."""
    with subprocess.Popen(
        command(config, workspace), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as driver:
        while steps_done(workspace) < at_step and driver.poll() is None:
            time.sleep(0.05)
        assert driver.poll() is None, "the run ended before the blow"
        strike(driver)
        return driver.wait(300)


def mask_of(workspace: Path) -> tuple[list[float], Path]:
    """Losses of every step, and the mask's directory."""
    [record] = [r for r in records(workspace) if r.startswith("train_mask/")]
    directory = workspace / record / "mask"
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()], directory


def assert_same_mask(workspace: Path, reference: Path) -> None:
    (got, ours), (expected, theirs) = mask_of(workspace), mask_of(reference)
    # Near the end the temperature is 0.02: rounding that moves one logit across 0 moves a late loss by a thousandth.
    assert got == pytest.approx(expected, rel=5e-3)
    left, right = MaskArtifact.open(ours), MaskArtifact.open(theirs)
    numel = sum(left.numel(name) for name in left.names())
    differing = sum(int((left.binary(name) != right.binary(name)).sum()) for name in left.names())
    assert differing / numel < 1e-3


def test_killed_ranks_and_a_killed_driver_end_as_an_unbroken_run(tmp_path: Path) -> None:
    reference = tmp_path / "one"
    assert run(config_of(tmp_path, "one-rank"), reference).returncode == 0

    def kill_a_rank(driver: subprocess.Popen[str]) -> None:
        ranks = ranks_of(driver)
        assert len(ranks) == 2
        ranks[1].kill()

    two = config_of(tmp_path, "two-ranks", ranks=2, stage=3)
    assert run_and_strike(two, tmp_path / "rank", 15, kill_a_rank) == 0
    assert_same_mask(tmp_path / "rank", reference)

    # The driver dies at two ranks of ZeRO-3; the run goes on at one that spreads nothing.
    broken = tmp_path / "driver"
    assert run_and_strike(two, broken, 15, lambda driver: os.kill(driver.pid, signal.SIGKILL)) == -signal.SIGKILL
    assert 15 <= steps_done(broken) < STEPS
    assert run(config_of(tmp_path, "again"), broken).returncode == 0
    assert_same_mask(broken, reference)

    # What came out is a model like any other: bit for bit a select.
    [fused] = [f["fused"]["binary"] for f in read_summary(tmp_path / "rank/summary.json")["finetunes"]]
    source = open_checkpoint(Path(fused)).source
    assert all(bool(read_whole(source, name).isfinite().all()) for name in source.names())


def test_ranks_train_the_mask_of_a_merge(tmp_path: Path) -> None:
    masks = []
    for ranks in (1, 2):
        config = small_config(tmp_path, steps=12)
        config |= {
            "fusion": {"controls": []},
            "mode": "merge",
            "merges": [{"name": "both", "method": "ties", "density": 0.5}],
        }
        config["execution"] = {"mask": {"ranks": ranks, "stage": 3}}
        workspace = tmp_path / f"ranks-{ranks}"
        done = run(write_config(tmp_path, config), workspace)
        assert done.returncode == 0, done.stderr
        masks.append(workspace)
    assert_same_mask(masks[1], masks[0])


def test_an_offload_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    path = config_of(tmp_path, "bad", ranks=2, stage=1, offload="nvme", offload_dir=str(tmp_path / "files"))
    (tmp_path / "files").write_text("in the way")
    done = run(path, tmp_path / "workspace")
    assert done.returncode == 2
    assert "hi failed at train_mask: " in done.stderr
    assert "execution.mask.offload_dir" in done.stderr


def test_what_a_user_must_mend_comes_back_as_it_was(tmp_path: Path) -> None:
    path = config_of(tmp_path, "bad", ranks=2, stage=1)
    config = yaml.safe_load(path.read_text())
    config["mask"]["settings"]["max_length"] = 8
    done = run(write_config(path.parent, config), tmp_path / "workspace")
    assert done.returncode == 2
    assert "hi failed at train_mask: " in done.stderr
    assert "every pair is longer than mask.max_length = 8 tokens; raise it" in done.stderr
