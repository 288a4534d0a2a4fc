"""The compiled pipeline: against golden files, and what Kubeflow would stumble over.

After a change that is meant: `python -m tests.pipelines.test_kubeflow` writes the golden files anew.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.errors import ConfigError, RealignError
from pipelines.config import load_config
from pipelines.kubeflow import compile_pipeline
from pipelines.kubeflow_steps import Place, jobs_of_run, parts_json, plan, submission_id, verdict
from pipelines.parts import parts_of
from tests.pipelines.pipelines import CONFIG, IMAGE, MERGE, compiled, written

GOLDEN = Path(__file__).parent / "golden"
CASES = {"each": CONFIG, "merge": MERGE}


def stable(path: Path) -> str:
    """Without the versions of what compiled it."""
    lines = path.read_text().splitlines(keepends=True)
    return "".join(line for line in lines if not line.lstrip().startswith(("sdkVersion:", "schemaVersion:")))


def documents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    spec, platform = yaml.safe_load_all(path.read_text())
    return spec, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


@pytest.mark.parametrize("case", CASES)
def test_the_pipeline_is_the_one_that_was_looked_at(case: str, tmp_path: Path) -> None:
    assert stable(compiled(tmp_path, CASES[case])) == (GOLDEN / f"{case}.yaml").read_text()


def test_steps_run_our_image_with_a_token_little_room_and_more_tries(tmp_path: Path) -> None:
    spec, pods = documents(compiled(tmp_path))
    executors = spec["deploymentSpec"]["executors"]
    assert len(executors) == 10
    for name, one in executors.items():
        container = one["container"]
        assert container["image"] == IMAGE
        assert container["resources"]["resourceMemoryLimit"] == "1Gi"
        assert "pip install" not in " ".join(container["command"])
        assert pods[name]["securityContext"] == {"runAsNonRoot": True}
        if name == "exec-verdict":
            assert "secretAsEnv" not in pods[name]
            continue
        assert container["env"] == [{"name": "RAY_AUTH_MODE", "value": "token"}]
        [secret] = pods[name]["secretAsEnv"]
        assert (secret["secretName"], secret["keyToEnv"]) == (
            "realign-ray-token", [{"secretKey": "auth_token", "envVar": "RAY_AUTH_TOKEN"}],
        )  # fmt: skip
    tasks = [task for dag in _dags(spec) for task in dag["tasks"].items() if "Iterator" not in str(task[1])]
    assert {name for name, task in tasks if "retryPolicy" not in task} == {"verdict"}
    assert not any(task["cachingOptions"].get("enableCache") for _, task in tasks)


def test_none_of_the_traps_is_in_it(tmp_path: Path) -> None:
    for text in CASES.values():
        spec, _ = documents(compiled(tmp_path, text))
        for dag in _dags(spec):
            for name, task in dag["tasks"].items():
                assert "triggerPolicy" not in task, f"{name} has a condition, or is an exit handler"
                loops = task.get("parameterIterator", {})
                assert loops.get("items", {}).get("inputParameter", "Output").endswith("Output")
        loop_items = str(spec).count("-loop-item--subvar")
        assert loop_items == 0, "an item is taken apart"


def _dags(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec["root"]["dag"], *(one["dag"] for one in spec["components"].values() if "dag" in one)]


def test_parameters_have_the_config_that_was_compiled_in(tmp_path: Path) -> None:
    spec, _ = documents(compiled(tmp_path, parallel=3))
    given = {name: one["defaultValue"] for name, one in spec["root"]["inputDefinitions"]["parameters"].items()}
    assert given == {
        "config": CONFIG, "finetunes": "", "workspace": "/workspace/trial", "pending_seconds": 0.0,
        "ray_address": "http://realign-head-svc.realign.svc:8265",
    }  # fmt: skip
    assert spec["root"]["dag"]["tasks"]["for-loop-1"]["iteratorPolicy"] == {"parallelismLimit": 3}


def test_what_cannot_be_a_pipeline_is_refused(tmp_path: Path) -> None:
    def refused(text: str, out: str = "out.yaml") -> str:
        with pytest.raises(ConfigError) as caught:
            compile_pipeline(written(tmp_path, text), tmp_path / out, image=IMAGE)
        return str(caught.value)

    assert "name it so" in refused(CONFIG, "out.json")
    assert "relative to this file" in refused(CONFIG.replace("/models/hi", "hi"))
    assert "more than 80000 characters" in refused(CONFIG + "# \n" * 30000)
    with pytest.raises(ConfigError, match="cannot be read"):
        compile_pipeline(tmp_path / "none.yaml", tmp_path / "out.yaml", image=IMAGE)
    assert not (tmp_path / "out.yaml").exists()


def test_the_command_wants_a_digest_and_help_waits_for_nothing(tmp_path: Path) -> None:
    def realign(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-X", "importtime", "-m", "pipelines.cli", "pipeline", *arguments]
        environment = {**os.environ, "COLUMNS": "200"}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    shown = realign("--help")
    assert {"compile", "submit", "schedule", "unschedule", "list", "cancel"} <= set(shown.stdout.split())
    imported = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines()}
    assert not imported & {"kfp", "kfp_server_api", "ray", "torch", "pipelines.config"}
    arguments = ("compile", str(written(tmp_path)), "-o", str(tmp_path / "out.yaml"), "--image")
    moving = realign(*arguments, "ghcr.io/example/realign:latest")
    assert moving.returncode == 2
    assert "a tag can move" in moving.stderr
    assert realign(*arguments, "realign:dev", "--allow-tag").stdout == f"{tmp_path / 'out.yaml'}\n"


def test_a_job_has_one_id_in_all_tries_of_a_step_and_in_no_other_run_or_step() -> None:
    asked = [("run", "zh", ["fuse"]), ("run", "hi", ["fuse"]), ("run", "zh", ["evaluate"]), ("run 2", "zh", ["fuse"]),
             ("run", "z-h", ["fuse"]), ("run", "", ["zh", "fuse"])]  # fmt: skip
    ids = [submission_id(*one) for one in asked]
    assert ids == [submission_id(*one) for one in asked]
    assert len(set(ids)) == len(asked)
    assert [one.startswith(jobs_of_run("run")) for one in ids] == [True, True, True, False, True, True]
    assert ids[0].startswith(f"{jobs_of_run('run')}zh-fuse-")


def test_the_verdict_has_every_line_and_is_silent_where_all_is_well() -> None:
    verdict({"passed": {"zh": "passed", "hi": "none"}, "failed": []})
    with pytest.raises(RealignError, match=r"^hi failed at load: x; the gate is shut for zh, en$"):
        verdict({"passed": {"zh": "shut", "hi": "none", "en": "shut"}, "failed": ["hi failed at load: x"]})


def test_a_pipeline_refuses_a_config_that_it_was_not_made_for() -> None:
    def asked(compiled_for: str, given: str) -> str:
        place = Place("run", given, "", "/workspace", "http://nobody:1", 0.0)
        with pytest.raises(ConfigError) as caught:
            plan(place, parts_json(parts_of(load_config(Path("config"), far=compiled_for))))
        return str(caught.value)

    fewer = CONFIG.replace("controls: [interpolation, resta, paper]", "controls: []")
    assert "asks for stages that the pipeline does not have: load, search_scale; it was" in asked(fewer, CONFIG)
    assert "asks for mode: each" in asked(MERGE, fewer.replace(", adapter: {}", ""))


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for case, text in CASES.items():
        with tempfile.TemporaryDirectory() as directory:
            (GOLDEN / f"{case}.yaml").write_text(stable(compiled(Path(directory), text)))
