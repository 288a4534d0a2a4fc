"""A stage whose code changed and whose version did not would serve old results as new ones."""

from __future__ import annotations

import json
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
            f"the code of stage {stage} changed: raise its version in ray_jobs/stage.py, then run `make stage-lock`"
        )
        pytest.fail(f"stage {stage} has a new version: run `make stage-lock` and commit tests/stage_lock.json")
    assert now == locked


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
