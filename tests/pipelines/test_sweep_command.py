"""`realign sweep` on real small models: from a run config to models that are served with what was found."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from components.leases import try_acquire
from components.reporting.schema import read_summary
from components.tracking import default_uri
from pipelines.config import load_config
from tests.pipelines.small import records, small_config, write_config

pytestmark = [pytest.mark.multiproc, pytest.mark.xdist_group("run")]


def sweep(config: Path, workspace: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.cli", "sweep", str(config), "--workspace", str(workspace), *more]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@dataclass(frozen=True)
class Swept:
    config: dict[str, Any]
    path: Path
    workspace: Path
    process: subprocess.CompletedProcess[str]

    @property
    def result(self) -> Any:
        return json.loads((self.workspace / "sweeps" / "sweep.json").read_text())


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """One good finetune, one that cannot be read."""
    directory = tmp_path_factory.mktemp("sweep")
    config = small_config(directory, finetunes=("zh",), steps=3)
    (directory / "empty").mkdir()
    config["finetunes"].append({**config["finetunes"][0], "name": "empty", "path": str(directory / "empty")})
    config["fusion"] = {}
    config["sweep"] = {"trials": 5, "sample": 4, "space": {"scale": {"low": 0.2, "high": 1.2}}}
    path = write_config(directory, config)
    return Swept(config, path, directory / "workspace", sweep(path, directory / "workspace", "--actors", "1"))


def test_the_winner_is_run_in_full_and_served_and_the_broken_finetune_is_told(swept: Swept) -> None:
    assert swept.process.returncode == 2, swept.process.stderr
    assert "Traceback" not in swept.process.stderr
    assert "realign: empty: " in swept.process.stderr
    [found] = swept.result["targets"]
    assert found["name"] == "zh"
    assert len(found["trials"]) == 5
    assert [one["candidate"] for one in found["own"]] == [{}, {"form": "binary"}]
    lines = swept.process.stdout.splitlines()
    assert lines[0].startswith("zh: 5 candidates, ")
    assert any(line.startswith("★") for line in lines)

    tuned = load_config(swept.workspace / "sweeps" / "tuned.yaml")
    assert list(tuned.fusion.tuned) == ["zh"]
    zh = next(f for f in read_summary(swept.workspace / "summary.json")["finetunes"] if f["name"] == "zh")
    assert zh["selected"] == "tuned"
    said = found["picked"]["settings"]["fusion"]
    assert zh["tuned"] == said
    record = json.loads((Path(zh["fused"]["tuned"]).parent / "record.json").read_text())
    assert {key: record["semantics"]["fusion"][key] for key in said} == said
    # On the same dev prompts the written model has the rates that the sweep saw in memory.
    evaluated = next(
        one for one in records(swept.workspace).values()
        if f"fuse/{record['fingerprint']}" in one["parents"].values() and one["stage"] == "evaluate"
    )  # fmt: skip
    for metric, rate in found["picked"]["rates"].items():
        assert evaluated["metrics"]["dev"][metric]["value"] == rate["value"], metric


def test_no_candidate_left_a_checkpoint(swept: Swept) -> None:
    fused = [one["semantics"]["fusion"] for one in records(swept.workspace).values() if one["stage"] == "fuse"]
    [found] = swept.result["targets"]
    assert len(fused) <= 3
    assert len(fused) < len(found["trials"])
    kept = [path.name for path in (swept.workspace / "sweeps").rglob("*") if path.is_file()]
    assert sorted(kept) == ["front.csv", "started", "sweep.json", "trials.jsonl", "tuned.yaml", "zh.png"]


def test_the_front_stands_in_files_and_in_mlflow(swept: Swept) -> None:
    from mlflow import MlflowClient

    [found] = swept.result["targets"]
    rows = list(csv.DictReader((swept.workspace / "sweeps" / "front.csv").open()))
    assert {int(row["number"]) for row in rows if row["on_front"] == "True"} == {
        one["number"] for one in found["front"]
    }
    [picked] = [row for row in rows if row["picked"] == "True"]
    assert float(picked["asr"]) == found["picked"]["rates"]["asr"]["value"]
    assert json.loads(picked["candidate"]) == found["picked"]["candidate"]

    client = MlflowClient(tracking_uri=default_uri(swept.workspace))
    runs = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    [top] = [run for run in runs if run.data.tags.get("realign.sweep") == "true"]
    below = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == top.info.run_id]
    assert len(below) == len(found["front"])
    assert top.data.metrics["zh/picked/dev/asr"] == found["picked"]["rates"]["asr"]["value"]
    assert {"front.csv", "sweep.json", "zh.png"} <= {one.path for one in client.list_artifacts(top.info.run_id)}


def test_a_second_sweep_waits_says_so_and_writes_nothing_in_mlflow_that_is_there(swept: Swept) -> None:
    store = swept.workspace / "mlflow.db"
    before = store.read_bytes()
    [state] = [path.parent for path in (swept.workspace / "sweeps" / "zh").glob("*/trials.jsonl")]
    command = [sys.executable, "-m", "pipelines.cli", "sweep", str(swept.path), "--workspace", str(swept.workspace)]
    with try_acquire(state / ".lease") as lease:  # type: ignore[union-attr]
        second = subprocess.Popen([*command, "--actors", "1", "--only"], stderr=subprocess.PIPE, text=True)
        assert second.stderr is not None
        said = next(line for line in second.stderr if "waiting" in line)
        lease.check()
    _, rest = second.communicate(timeout=120)
    assert said == "realign: zh: another process sweeps it in this workspace; waiting for its end\n"
    assert second.returncode == 2, rest  # for the broken one
    assert store.read_bytes() == before


@pytest.mark.slow
def test_going_on_tries_only_what_is_new_and_other_prompts_begin_with_what_did_well(swept: Swept) -> None:
    [before] = swept.result["targets"]
    more = sweep(swept.path, swept.workspace, "--trials", "6", "--actors", "1", "--only")
    assert more.returncode == 2, more.stderr  # for the broken one
    [found] = swept.result["targets"]
    assert [one["candidate"] for one in found["trials"][:5]] == [one["candidate"] for one in before["trials"]]
    assert len(found["trials"]) == 6
    [state] = [path.parent for path in (swept.workspace / "sweeps" / "zh").glob("*/trials.jsonl")]

    other = json.loads(json.dumps(swept.config))
    other["sweep"] |= {"seed": 1, "trials": 8}  # another order is another study of the same models
    path = swept.path.with_name("other.yaml")
    path.write_text(json.dumps(other))
    again = sweep(path, swept.workspace, "--actors", "1", "--only")
    assert again.returncode == 2, again.stderr
    [found] = swept.result["targets"]
    [fresh] = [one for one in (swept.workspace / "sweeps" / "zh").glob("*/trials.jsonl") if one.parent != state]
    assert fresh.parent.name.split("-")[0] == state.name.split("-")[0]
    tried = [json.loads(line)["candidate"] for line in fresh.read_text().splitlines()]
    assert tried[:2] == [{}, {"form": "binary"}]
    well = [one["candidate"] for one in before["front"] if one["candidate"] not in tried[:2]]
    assert all(one in tried[2:4] for one in well[:2])


def test_what_cannot_be_is_refused_before_any_work(tmp_path: Path) -> None:
    config = small_config(tmp_path, finetunes=("zh",))
    config["evaluation"]["sets"] = [one for one in config["evaluation"]["sets"] if one["split"] != "dev"]
    config["fusion"] = {"select": "soft"}
    shutil.rmtree(tmp_path / "w", ignore_errors=True)
    refused = sweep(write_config(tmp_path, config), tmp_path / "w")
    assert refused.returncode == 2
    assert "sweep of zh: objective asr: no dev set" in refused.stderr
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_of_a_merge_its_own_settings_are_found_too(tmp_path: Path) -> None:
    config = small_config(tmp_path, steps=2)
    config |= {"mode": "merge", "merges": [{"name": "both", "method": "ties"}], "fusion": {}}
    space = {
        "merge.density": {"low": 0.1, "high": 0.9},
        "merge.weights": {"zh": {"low": 0.3, "high": 1.0}},
        "scale": [1.0],
    }
    config["sweep"] = {"trials": 4, "space": space, "objectives": [{"metric": "task"}, {"metric": "asr"}]}
    done = sweep(write_config(tmp_path, config), tmp_path / "w", "--actors", "1", "--only")
    assert done.returncode == 0, done.stderr
    [found] = json.loads((tmp_path / "w" / "sweeps" / "sweep.json").read_text())["targets"]
    tried = [one["candidate"] for one in found["trials"]]
    assert tried[:2] == [{}, {"form": "binary"}]
    assert all({"merge.density", "merge.weights.zh"} <= one.keys() for one in tried[2:])
    tuned = load_config(tmp_path / "w" / "sweeps" / "tuned.yaml").fusion.tuned["both"]
    assert tuned.merge is not None
    assert tuned.merge.method == "ties"
    chosen = found["picked"]["candidate"]
    assert tuned.merge.density == chosen.get("merge.density", 0.2)
