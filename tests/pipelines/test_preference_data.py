"""Preference data from a run config to the mask: what identifies it, what stops a run, and that other forms of the same rows
train the same mask."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from components.masks.artifact import MaskArtifact
from components.records import file_sha256
from pipelines.config import load_config
from pipelines.graph import expand
from pipelines.roots import find_roots
from pipelines.specs import build_spec
from ray_jobs.stage import StageAnswer, StageSpec, run_stage
from tests.pipelines.small import records, small_config, write_config
from tests.pipelines.test_bad_input import fails

COMMIT = "0123456789abcdef0123456789abcdef01234567"
STEPS = ("load_aligned", "hi/load", "hi/train_mask")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    config = small_config(tmp_path, finetunes=("hi",), steps=3)
    config["mask"]["settings"] |= {"batch_size": 4, "anchor_batch_size": 4, "pair_new_tokens": 12}
    config["fusion"] = {"controls": []}
    return config


def short(config: dict[str, Any], tmp_path: Path, rows: int = 20) -> list[dict[str, Any]]:
    """The first rows of the config's preferences, anchors and dev pairs in place of all; those of the preferences."""
    kept: dict[str, list[str]] = {}
    places = {"preferences": config["mask"], "preferences_dev": config["mask"], "anchor": config["finetunes"][0]}
    for key, section in places.items():
        kept[key] = Path(section[key]).read_text().splitlines()[:rows]
        section[key] = str(tmp_path / f"{key}.jsonl")
        Path(section[key]).write_text("\n".join(kept[key]) + "\n")
    return [json.loads(line) for line in kept["preferences"]]


def specs(config: dict[str, Any], tmp_path: Path, name: str) -> tuple[list[StageSpec], list[StageAnswer]]:
    """The stages up to the mask of one finetune, made in this process."""
    (tmp_path / name).mkdir()
    loaded = load_config(write_config(tmp_path / name, config))
    workspace = tmp_path / name / "workspace"
    roots = find_roots(loaded, workspace / ".identities")
    nodes = {node.id: node for node in expand(loaded)}
    made: dict[str, StageSpec] = {}
    answers = []
    for step in STEPS:
        parents = {role: made[parent].reference for role, parent in nodes[step].parents}
        made[step] = build_spec(nodes[step], config=loaded, roots=roots, parents=parents, workspace=workspace)
        answers.append(run_stage(made[step]))
    return list(made.values()), answers


def mask(spec: StageSpec) -> Path:
    return Path(spec.workspace) / spec.reference / "mask"


def test_the_same_rows_in_other_forms_train_the_same_mask(
    tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = short(config, tmp_path)
    made, answers = specs(config, tmp_path, "jsonl")
    assert answers[-1]["status"] == "done", answers[-1]
    assert answers[-1]["record"]["notes"] == []
    # What other finetunes of the aligned model will find.
    kept = [json.loads(p.read_text()) for p in (tmp_path / "jsonl/workspace/.reference").iterdir()]
    assert [entry["key"]["model"] for entry in kept] == [
        [made[0].semantics["identity"]]
    ] * 2  # training and held-out pairs

    flagged = [
        {"prompt": r["prompt"], "response_0": r["rejected"], "response_1": r["chosen"]}
        | {"is_response_0_safe": False, "is_response_1_safe": True, "safer_response_id": 1}
        for r in rows
    ]
    extra = {**flagged[0], "is_response_0_safe": True}
    dataset = tmp_path / "owner/pairs/train.parquet"
    dataset.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist([*flagged, extra]), dataset)
    monkeypatch.chdir(tmp_path)
    config["mask"]["preferences"] = {"hub": "owner/pairs", "revision": COMMIT}
    again, answers = specs(config, tmp_path, "hub")
    assert answers[-1]["status"] == "done", answers[-1]
    known = again[-1].semantics["preferences"]
    assert {**known, "rows": ""} == {"hub": "owner/pairs", "revision": COMMIT, "rows": ""}
    assert again[-1].fingerprint != made[-1].fingerprint
    assert answers[-1]["record"]["notes"] == [
        "preference rows left out: 1 (and 0 held-out ones); both responses are safe"
    ]
    assert answers[-1]["record"]["metrics"]["data"]["pairs_both_safe"] == 1
    for name in ("mask.safetensors", "metrics.jsonl"):
        assert (mask(again[-1]) / name).read_bytes() == (mask(made[-1]) / name).read_bytes()

    # A dataset that is no longer what the run found is refused by the stage.
    stale = again[-1].model_copy(update={"semantics": {**again[-1].semantics, "seed": 1}})
    pyarrow.parquet.write_table(pa.Table.from_pylist(flagged[1:]), dataset)
    answer = run_stage(stale)
    assert answer["status"] == "failed"
    assert "its rows are not those of SHA-256" in answer["error"]["message"]


def test_pairs_are_made_of_prompts_alone(tmp_path: Path, config: dict[str, Any]) -> None:
    rows = short(config, tmp_path)
    prompts = tmp_path / "prompts.csv"
    with prompts.open("w", newline="") as file:
        csv.writer(file).writerows([["goal"], *([row["prompt"]] for row in rows)])
    config["mask"]["preferences"] = {"prompts": str(prompts)}
    made, answers = specs(config, tmp_path, "prompts")
    assert answers[-1]["status"] == "done", answers[-1]
    assert made[-1].semantics["preferences"] == {"prompts": file_sha256(prompts)}
    assert made[-1].execution["files"]["preferences"] == {"prompts": str(prompts)}
    data = answers[-1]["record"]["metrics"]["data"]
    assert data["pairs"] + data["pairs_no_difference"] == len(rows)
    assert data["pairs"] > 0
    figures = MaskArtifact.open(mask(made[-1])).figures()
    assert figures["data"] == data
    assert figures["tokens_sha256"] == answers[-1]["record"]["metrics"]["tokens_sha256"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("pairs.csv", b"question,good,bad\na,b,c\n", ["no preference pairs in columns bad, good, question"]),
        ("pairs.parquet", b"PAR1 not really", ["not a readable parquet file"]),
        ("pairs.json", b'[{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a"}]', ["item 2: no 'chosen'"]),
        ("pairs.txt", b"a", ["rows are read from .jsonl"]),
    ],
)
def test_broken_files_stop_the_run_before_it_starts(
    tmp_path: Path,
    config: dict[str, Any],
    name: str,
    content: bytes,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = tmp_path / name
    bad.write_bytes(content)
    config["mask"]["preferences_dev"] = str(bad)
    workspace = tmp_path / "workspace"
    lines = fails(["run", str(write_config(tmp_path, config)), "--workspace", str(workspace)], monkeypatch, capsys)
    assert len(lines) == 1
    assert str(bad) in lines[0]
    assert all(word in lines[0] for word in words), lines
    assert records(workspace) == {}


def test_broken_prompts_and_an_unknown_dataset_are_told_together(
    tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    config["mask"] |= {
        "preferences": {"hub": "owner/absent", "revision": COMMIT},
        "preferences_dev": {"prompts": str(prompts)},
    }
    workspace = tmp_path / "workspace"
    lines = fails(["run", str(write_config(tmp_path, config)), "--workspace", str(workspace)], monkeypatch, capsys)
    assert len(lines) == 2
    assert f"owner/absent at {COMMIT}: cannot be read from the hub" in lines[0]
    assert f"{prompts}: line 2: no 'messages', 'prompt'" in lines[1]
    assert records(workspace) == {}
