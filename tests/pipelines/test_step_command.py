"""`realign step`: what a part of a run answers, and what it makes of parts that are missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from components.reporting.schema import read_summary
from pipelines.step_command import CONFIG_VARIABLE, step_command
from ray_jobs.jobs import ANSWER
from tests.pipelines.small import records, small_config, write_config

pytestmark = [pytest.mark.multiproc, pytest.mark.xdist_group("run")]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    config = small_config(tmp_path, finetunes=("zh",), steps=2)
    (tmp_path / "empty").mkdir()
    config["finetunes"].append({**config["finetunes"][0], "name": "empty", "path": str(tmp_path / "empty")})
    config["fusion"] = {}
    return write_config(tmp_path, config)


def test_what_is_not_there_is_answered_with_what_is(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def error(*given: str, **named: Any) -> str:
        answer = step_command(given[0] if given else str(config), tmp_path / "w", **named)
        assert answer["status"] == "failed"
        return str(answer["error"])

    assert error(steps=["lode"]).startswith("ConfigError: no step lode; there are load, extract_delta")
    assert error(of="xy", steps=["load"]) == "ConfigError: no finetune or merge xy; there are empty, zh"
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)
    assert "REALIGN_CONFIG is empty" in error("-", steps=["plan"])
    monkeypatch.setenv(CONFIG_VARIABLE, "name: x\n")
    assert "REALIGN_CONFIG:1: aligned: missing" in error("-", steps=["plan"])
    assert not (tmp_path / "w" / "run-config.yaml").exists()  # another run's step may be in the same workspace


def test_a_step_runs_its_stages_and_what_they_stand_on_and_nothing_twice(config: Path, tmp_path: Path) -> None:
    def step(*more: str) -> tuple[int, dict[str, Any]]:
        command = [
            sys.executable,
            "-m",
            "pipelines.cli",
            "step",
            str(config),
            "--workspace",
            str(tmp_path / "w"),
            *more,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        [line] = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
        return done.returncode, json.loads(line.removeprefix(ANSWER))

    code, loaded = step("--of", "zh", "--steps", "load")
    assert (code, loaded["nodes"]) == (0, {"zh/load": "done"})
    assert sorted(name.split("/")[0] for name in records(tmp_path / "w")) == ["load", "load"]
    code, plan = step("--steps", "plan")
    assert (code, plan["nodes"]) == (0, {"load_aligned": "kept"})
    assert plan["finetunes"] == plan["targets"] == [{"name": "zh"}, {"name": "empty"}]
    code, failed = step("--of", "empty", "--steps", "load")
    assert (code, failed["status"]) == (2, "failed")
    assert failed["error"].startswith("empty/load: ")
    assert not (tmp_path / "w" / "run.json").exists()  # it would be that of the last part


def test_a_summary_is_made_of_what_there_is(config: Path, tmp_path: Path) -> None:
    answer = step_command(str(config), tmp_path / "w", steps=["gate"])
    assert answer["status"] == "done"
    assert answer["passed"] == {"zh": None, "empty": None}
    zh, empty = read_summary(tmp_path / "w" / "summary.json")["finetunes"]
    assert zh["status"] == empty["status"] == "failed"
    assert "was not made; the log of its step says why" in str(zh["error"])
    assert "| zh | failed |" in answer["table"]
    assert not list((tmp_path / "w").glob("*/*/record.json"))
