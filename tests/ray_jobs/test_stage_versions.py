"""A stage whose code changed and whose version did not would serve old results as new ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ray_jobs.stage import VERSIONS
from tests import stage_lock


@pytest.mark.parametrize("stage", VERSIONS)
def test_code_and_version_change_together(stage: str) -> None:
    locked = json.loads(stage_lock.LOCK.read_text())[stage]
    now = {"version": VERSIONS[stage], "code": stage_lock.code_of(stage)}
    if now["code"] != locked["code"]:
        assert now["version"] > locked["version"], (
            f"the code of stage {stage} changed: raise its version in ray_jobs/stage.py (after the first release, see "
            "CONTRIBUTING.md), then run `make stage-lock`"
        )
        pytest.fail(f"stage {stage} has a new version: run `make stage-lock` and commit tests/stage_lock.json")
    assert now == locked


def test_the_lock_does_not_hide_code_that_changed_without_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / "stage_lock.json"
    monkeypatch.setattr(stage_lock, "LOCK", lock)
    now = stage_lock.current()
    old = {**now, "fuse": {"version": 1, "code": "0"}, "evaluate": {"version": 1, "code": "0"}}
    lock.write_text(json.dumps(old))
    monkeypatch.setitem(VERSIONS, "evaluate", 2)
    assert stage_lock.main([]) == 1
    assert "version did not: fuse; raise" in capsys.readouterr().err
    assert json.loads(lock.read_text()) == old
    monkeypatch.setitem(VERSIONS, "fuse", 2)
    assert stage_lock.main([]) == 0
    written = json.loads(lock.read_text())
    assert written == stage_lock.current()
    assert written["fuse"] == {"version": 2, "code": now["fuse"]["code"]}


def test_before_the_first_release_versions_need_not_rise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_lock, "LOCK", tmp_path / "stage_lock.json")
    (tmp_path / "stage_lock.json").write_text(json.dumps({"fuse": {"version": 1, "code": "0"}}))
    assert stage_lock.main(["--unreleased"]) == 0
    assert json.loads((tmp_path / "stage_lock.json").read_text()) == stage_lock.current()


def test_comments_do_not_count_and_code_does(tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"{i}.py" for i in range(3))
    first.write_text('"""Doc."""\nx = 1\n"""About x."""\n')
    second.write_text("# comment\nx   =   1\n")
    third.write_text("x = 2\n")
    assert stage_lock._normalised(first) == stage_lock._normalised(second) != stage_lock._normalised(third)


def test_a_stage_depends_on_what_it_imports_and_not_on_the_rest() -> None:
    closure = stage_lock._closure("ray_jobs.fuse")
    assert {"components.fusion.methods", "components.checkpoints.safetensors"} <= closure
    assert "components.evaluation.judges" not in closure


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("components/evaluation/capability/sandboxed.py", {"search_scale", "evaluate", "landscape"}),
        ("components/fusion/kernels.c", set(VERSIONS)),
    ],
)
def test_files_that_nothing_imports_count_where_they_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, stages: set[str]
) -> None:
    for package in ("components", "ray_jobs"):
        shutil.copytree(
            stage_lock.ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    before = stage_lock.current()
    monkeypatch.setattr(stage_lock, "ROOT", tmp_path)
    assert stage_lock.current() == before
    (tmp_path / file).write_text((tmp_path / file).read_text() + "\nint_ = 1;\n")
    after = stage_lock.current()
    assert {stage for stage in VERSIONS if after[stage] != before[stage]} == stages
