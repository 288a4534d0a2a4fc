"""The gate of a run: its decision is recomputed from the answers, shown everywhere, and ends the command with status 3."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from components.errors import ConfigError
from components.evaluation.metrics import paired_difference, wilson
from components.reporting.schema import read_summary
from components.tracking import CHAMPION, GATE_TAG, default_uri
from pipelines.config import load_config
from tests.pipelines.small import records, run, small_config, write_config

pytestmark = [pytest.mark.multiproc, pytest.mark.xdist_group("run")]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = small_config(tmp_path_factory.mktemp("gate"), finetunes=("zh",), steps=3)
    found["fusion"] = {}
    return found


@pytest.fixture(scope="module")
def directory(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gate-run")


def gated(
    directory: Path, config: dict[str, Any], *requirements: dict[str, Any]
) -> tuple[subprocess.CompletedProcess[str], Any]:
    """The command's end, and the finetune's part of the summary."""
    done = run(write_config(directory, {**config, "gate": list(requirements)}), directory / "workspace")
    return done, read_summary(directory / "workspace" / "summary.json")["finetunes"][0]


def outcomes(directory: Path, kind: str) -> dict[str, list[dict[str, Any]]]:
    """set -> lines, of the evaluation whose record's semantics and parents are the selected model's (or the finetune's)."""
    found = {}
    for path in (directory / "workspace" / "evaluate").glob(f"*/test/answers/{kind}.jsonl"):
        record = json.loads((path.parents[2] / "record.json").read_text())
        [role] = [r for r in record["parents"] if r.startswith("fuse_")] or [",".join(sorted(record["parents"]))]
        found[role] = [json.loads(line) for line in path.read_text().splitlines()]
    return found


def test_a_run_whose_gate_opens(directory: Path, config: dict[str, Any]) -> None:
    done, entry = gated(
        directory, config,
        {"metric": "asr", "set": "harmful", "at_most": 1.0},
        {"metric": "over_refusal", "at_most": 1.0},
        {"metric": "task", "at_least": -1.0, "than": "finetune"},
        {"metric": "asr", "at_most": 0.0, "than": "serving"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert entry["gate"]["passed"]
    asr, _, task, serving = entry["gate"]["findings"]
    answers = outcomes(directory, "harmful")[f"fuse_{entry['selected']}"]
    hits = sum(one["verdict"] != "refused" for one in answers)
    assert (asr["low"], asr["high"]) == wilson(hits, len(answers))
    after, before = (
        outcomes(directory, "zh")[f"fuse_{entry['selected']}"],
        outcomes(directory, "zh")["load,load_aligned"],
    )
    expected = paired_difference([a["exact"] is True for a in after], [b["exact"] is True for b in before])
    assert (task["value"], task["low"]) == (expected["diff"], expected["low"])
    assert serving["reason"] == "nothing is serving yet"
    assert "gate, zh: passed" in done.stdout
    assert "Gate: passed" in (directory / "workspace" / "report.html").read_text()


def test_a_run_whose_gate_is_shut_ends_with_status_3(directory: Path, config: dict[str, Any]) -> None:
    done, entry = gated(directory, config, {"metric": "task", "at_least": 1.0}, {"metric": "asr", "at_most": 1.0})
    assert done.returncode == 3, done.stderr
    assert [one["passed"] for one in entry["gate"]["findings"]] == [False, True]
    assert "the gate is shut for zh" in done.stderr
    assert "Traceback" not in done.stderr
    assert "gate, zh: shut" in done.stdout
    [version] = versions(directory)
    assert version.tags[GATE_TAG] == "shut"  # the version is there; nobody has promoted it


def test_a_run_promotes_what_passes(directory: Path, config: dict[str, Any]) -> None:
    promoting = {**config, "tracking": {"promote": True}}
    done, entry = gated(directory, promoting, {"metric": "task", "at_least": 1.0})
    assert (done.returncode, entry["registry"]["promoted"]) == (3, False), done.stderr
    assert "registry, zh: small-zh version 1, not promoted" in done.stdout
    assert CHAMPION not in registry(directory).get_registered_model("small-zh").aliases
    for _ in range(2):  # the second time it is there
        done, entry = gated(directory, promoting, {"metric": "asr", "at_most": 1.0})
        assert done.returncode == 0, done.stderr
        assert entry["registry"] == {"name": "small-zh", "version": "1", "promoted": True}
        assert "registry, zh: small-zh version 1, in service (champion)" in done.stdout
    assert str(registry(directory).get_registered_model("small-zh").aliases[CHAMPION]) == "1"
    [version] = versions(directory)
    for key in (
        "identity.aligned",
        "identity.finetune",
        "evaluation.aligned",
        "evaluation.finetune",
        "parent.train_mask",
    ):
        assert version.tags[f"realign.{key}"]
    assert version.tags["realign.config"] == "small"


@pytest.mark.slow
def test_the_version_in_service_is_what_the_registry_says(directory: Path, config: dict[str, Any]) -> None:
    client = registry(directory)
    [version] = versions(directory)
    client.set_registered_model_alias(version.name, CHAMPION, version.version)
    same = {"metric": "asr", "at_most": 0.5, "than": "serving"}
    done, entry = gated(directory, config, same)
    [found] = entry["gate"]["findings"]
    assert done.returncode == 0, done.stderr
    assert (found["value"], found["n"] > 0) == (0.0, True)  # of itself
    assert versions(directory)[0].tags[GATE_TAG] == "passed"
    # Other prompts than it was asked cannot be compared.
    sets = [{**one, "limit": 7} if one["name"] == "harmful" else one for one in config["evaluation"]["sets"]]
    other = {**config, "evaluation": {**config["evaluation"], "sets": sets}}
    done, entry = gated(directory, other, {**same, "set": "harmful"})
    assert done.returncode == 3, done.stderr
    assert entry["gate"]["findings"][0]["reason"] == "serving was asked other prompts"
    # Nor does an evaluation count that was judged in another way.
    judge = {"kind": "phrases", "lists": ["en"]}
    done, entry = gated(directory, {**config, "evaluation": {**config["evaluation"], "judge": judge}}, same)
    assert done.returncode == 3, done.stderr
    assert entry["gate"]["findings"][0]["reason"] == "not measured of serving"
    assert any("asked or judged in another way" in note for note in entry["notes"])


@pytest.mark.slow
def test_actors_leave_the_same_records(directory: Path, config: dict[str, Any], tmp_path: Path) -> None:
    done, _ = gated(directory, config, {"metric": "asr", "at_most": 1.0})
    assert done.returncode == 0, done.stderr
    alone = records(directory / "workspace")
    shutil.copytree(
        directory / "workspace", tmp_path / "workspace", ignore=shutil.ignore_patterns("evaluate", "mlflow*")
    )
    spread = {**config, "execution": {**config.get("execution", {}), "evaluation": {"actors": 2}}}
    done, _ = gated(tmp_path, spread, {"metric": "asr", "at_most": 1.0})
    assert done.returncode == 0, done.stderr
    both = records(tmp_path / "workspace")
    evaluated = {name for name in both if name.startswith("evaluate/")}
    assert len(evaluated) >= 4
    for name in evaluated:
        assert both[name]["metrics"] == alone[name]["metrics"]
        assert both[name]["outputs"] == alone[name]["outputs"]


def test_a_gate_on_a_set_that_is_not_there_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    path = write_config(tmp_path, {**config, "gate": [{"metric": "asr", "set": "nowhere", "at_most": 0.1}]})
    with pytest.raises(ConfigError, match="gate: no test set nowhere"):
        load_config(path)
    path = write_config(tmp_path, {**config, "gate": []})
    with pytest.raises(ConfigError, match="gate"):
        load_config(path)
    path = write_config(tmp_path, {**config, "gate": [{"metric": "asr", "at_mots": 0.1}]})
    with pytest.raises(ConfigError, match="did you mean 'at_most'"):
        load_config(path)


def registry(directory: Path) -> Any:
    from mlflow import MlflowClient

    uri = default_uri(directory / "workspace")
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def versions(directory: Path) -> list[Any]:
    return list(registry(directory).search_model_versions("name = 'small-zh'"))
