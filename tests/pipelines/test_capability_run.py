"""Capability tasks in a run: hashed by what they ask, asked by the stage `evaluate`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from components.errors import ConfigError
from pipelines.config import load_config
from pipelines.graph import expand
from pipelines.roots import find_roots
from pipelines.specs import build_spec
from tests.pipelines.small import records, run, small_config, write_config


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    rows = [
        {"premise": f"天下雨了{i}。", "choice1": "我带伞。", "choice2": "我唱歌。", "question": "cause", "label": i % 2}
        for i in range(6)
    ]
    (tmp_path / "xcopa.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    data = small_config(tmp_path, finetunes=("zh",), steps=2)
    data["fusion"] = {"controls": []}
    data["evaluation"]["capability"] = {"tasks": [{"task": "xcopa_zh", "path": str(tmp_path / "xcopa.jsonl")}]}
    return data


def semantics(path: Path, tmp_path: Path) -> dict[str, Any]:
    loaded = load_config(path)
    roots = find_roots(loaded, tmp_path / "cache")
    [node] = [n for n in expand(loaded) if n.step.name == "evaluate_aligned"]
    spec = build_spec(node, config=loaded, roots=roots, parents={}, workspace=tmp_path)
    assert str(tmp_path) not in json.dumps(spec.semantics)
    return spec.semantics


def test_what_is_hashed_is_what_is_asked(config: dict[str, Any], tmp_path: Path) -> None:
    first = semantics(write_config(tmp_path, config), tmp_path)
    moved = shutil.copy(tmp_path / "xcopa.jsonl", tmp_path / "moved.jsonl")
    config["evaluation"]["capability"]["tasks"][0]["path"] = str(moved)
    assert semantics(write_config(tmp_path, config), tmp_path) == first
    Path(moved).write_text(Path(moved).read_text().replace("我带伞", "我跑"))
    assert semantics(write_config(tmp_path, config), tmp_path) != first
    config["evaluation"]["capability"]["tasks"] = ["coppa"]
    with pytest.raises(ConfigError, match="no task 'coppa'"):
        semantics(write_config(tmp_path, config), tmp_path)


@pytest.mark.slow
@pytest.mark.multiproc
def test_a_run_asks_them_of_every_model(config: dict[str, Any], tmp_path: Path) -> None:
    config["evaluation"]["capability"]["tasks"][0]["headline"] = True
    workspace = tmp_path / "workspace"
    done = run(write_config(tmp_path, config), workspace)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((workspace / "summary.json").read_text())
    [zh] = summary["finetunes"]
    for rates in (summary["aligned"], zh["before"], zh["after_soft"], zh["after_binary"]):
        assert rates["sets"]["xcopa_zh"]["task"]["n"] == 6
    own = zh["before"]["sets"]["zh"]["task"]["n"]
    assert zh["before"]["task"]["n"] == own + 6, "it counts"
    for form in ("soft", "binary"):
        apart = zh["comparisons"][f"{form}_vs_before"]["task"]
        assert apart["n"] == own + 6
        assert apart["diff"] == pytest.approx(zh[f"after_{form}"]["task"]["value"] - zh["before"]["task"]["value"])
    made = [record for record in records(workspace).values() if record["stage"] == "evaluate"]
    assert {record["metrics"]["capability"]["xcopa_zh"]["metric"] for record in made} == {"acc,none"}
    for record in made:
        told = record["metrics"]["capability"]["xcopa_zh"]["value"]
        assert record["metrics"]["test"]["sets"]["xcopa_zh"]["task"]["value"] == told
    assert not [
        p
        for p in workspace.rglob("*.json")
        if p.name == "record.json" and str(tmp_path / "xcopa") in json.dumps(json.loads(p.read_text())["semantics"])
    ]
