"""The one stage entry: status instead of exceptions, nothing run twice, the same from Python and from the shell."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from components.checkpoints.identity import identify
from components.checkpoints.reference import open_checkpoint
from ray_jobs.stage import StageSpec, run_stage
from tests.families import minute_family


def load_spec(workspace: Path, *, identity: str | None = None) -> StageSpec:
    path = minute_family() / "aligned"
    return StageSpec(
        stage="load",
        workspace=str(workspace),
        semantics={"role": "aligned", "identity": identity or identify(open_checkpoint(path)).sha256},
        execution={"checkpoints": {"self": {"path": str(path)}}},
    )


def test_a_stage_is_run_once_and_its_record_tells_all(tmp_path: Path) -> None:
    spec = load_spec(tmp_path)
    answer = run_stage(spec)
    assert answer["status"] == "done"
    record = answer["record"]
    assert (record["stage"], record["fingerprint"]) == ("load", spec.fingerprint)
    described = json.loads((tmp_path / "load" / spec.fingerprint / "checkpoint.json").read_text())
    assert described["identity"] == spec.semantics["identity"]
    assert described["kind"] == "full"
    assert record["metrics"]["parameters"] == described["parameters"] > 0
    assert {"python", "torch", "transformers"} <= set(record["environment"])
    written = (tmp_path / "load" / spec.fingerprint / "record.json").stat().st_mtime_ns
    assert run_stage(spec) == answer
    assert (tmp_path / "load" / spec.fingerprint / "record.json").stat().st_mtime_ns == written
    assert not (tmp_path / "load" / f".state-{spec.fingerprint}").exists()


def test_execution_does_not_change_the_fingerprint_and_semantics_do(tmp_path: Path) -> None:
    spec = load_spec(tmp_path)
    moved = spec.model_copy(update={"execution": {"checkpoints": {"self": {"path": "/elsewhere"}}, "threads": 8}})
    assert moved.fingerprint == spec.fingerprint
    assert load_spec(tmp_path, identity="0" * 64).fingerprint != spec.fingerprint
    child = spec.model_copy(update={"parents": {"load_aligned": "load/abc"}})
    assert child.fingerprint != spec.fingerprint
    assert child.fingerprint == spec.model_copy(update={"parents": {"load_aligned": "moved/load/abc"}}).fingerprint


def test_what_the_user_must_mend_is_a_status_and_a_file_never_a_record(tmp_path: Path) -> None:
    spec = load_spec(tmp_path, identity="0" * 64)
    answer = run_stage(spec)
    assert answer["status"] == "failed"
    assert answer["error"]["type"] == "CheckpointError"
    assert "has changed since this run began" in answer["error"]["message"]
    assert (
        json.loads((tmp_path / "load" / f".state-{spec.fingerprint}" / "failure.json").read_text()) == answer["error"]
    )
    assert not (tmp_path / "load" / spec.fingerprint).exists()


def test_an_unknown_stage_and_a_missing_parent_are_said(tmp_path: Path) -> None:
    spec = load_spec(tmp_path)
    answer = run_stage(spec.model_copy(update={"parents": {"load_aligned": "load/feed"}}))
    assert "no record load/feed (parent 'load_aligned')" in answer["error"]["message"]
    with pytest.raises(ValidationError, match="no stage 'bake'; there are load, "):
        StageSpec.model_validate({**spec.model_dump(), "stage": "bake"})


@pytest.mark.multiproc
def test_the_command_gives_the_same_answer(tmp_path: Path) -> None:
    spec = load_spec(tmp_path / "workspace")
    file = tmp_path / "spec.json"
    file.write_text(spec.model_dump_json())
    entry = [sys.executable, "-m", "ray_jobs.main"]
    good = subprocess.run([*entry, str(file)], capture_output=True, text=True, check=False)
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout.splitlines()[-1]) == run_stage(spec)
    file.write_text(load_spec(tmp_path / "workspace", identity="0" * 64).model_dump_json())
    bad = subprocess.run([*entry, str(file)], capture_output=True, text=True, check=False)
    assert bad.returncode == 2
    assert json.loads(bad.stdout.splitlines()[-1])["status"] == "failed"
    file.write_text("{}")
    garbage = subprocess.run([*entry, str(file)], capture_output=True, text=True, check=False)
    assert garbage.returncode == 2
    assert "is not a stage spec" in garbage.stderr
