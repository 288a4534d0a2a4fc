"""What a failure means for a finetune: its own steps make it fail, a control only makes the control missing."""

from __future__ import annotations

from pathlib import Path

from components.storage import Workspace
from pipelines.config import load_config
from pipelines.driver import NodeState, RunState
from pipelines.graph import expand
from pipelines.roots import Roots
from pipelines.summary import failures, summarise
from tests.pipelines.test_config import GOOD, place  # noqa: F401 - a fixture


def state(place: Path, *failed: str, en: str = "") -> RunState:  # noqa: F811
    """A run of two finetunes in which these nodes failed, and nothing else has a record."""
    two = GOOD.replace("mask:\n", f"  - {{name: en, path: en, anchor: anchor.jsonl{en}}}\nmask:\n", 1)
    two = two.replace("mask:\n", "unaligned: aligned\nfusion: {controls: [paper, resta]}\nmask:\n", 1)
    (place / "en").mkdir(exist_ok=True)
    (place / "realign.yaml").write_text(two)
    config = load_config(place / "realign.yaml")
    nodes = {node.id: NodeState(node) for node in expand(config)}
    for name, node in nodes.items():
        if name in failed:
            node.status, node.error = "failed", {"type": "CheckpointError", "message": "it is broken"}
    ended = [n for n in nodes.values() if n.status == "failed"]
    for node in nodes.values():
        if any(nodes[parent] in ended for _, parent in node.node.parents) and not node.node.joins:
            node.status = "skipped"
            ended.append(node)
    return RunState(config, Workspace(place / "workspace"), Roots({}, {}, {}), nodes)


def test_a_failed_control_is_missing_and_the_finetune_is_not_failed(place: Path) -> None:  # noqa: F811
    run = state(place, "zh/train_mask_paper")
    summary = summarise(run)
    zh, en = summary["finetunes"]
    assert (zh["status"], zh["error"], en["notes"]) == ("done", None, [])
    assert zh["notes"] == ["control paper is missing: train_mask_paper: it is broken"]
    assert failures(run) == ["zh: control paper is missing: train_mask_paper: it is broken"]


def test_a_control_whose_input_is_broken_is_missing_for_all(place: Path) -> None:  # noqa: F811
    run = state(place, "load_unaligned")
    summary = summarise(run)
    assert [f["status"] for f in summary["finetunes"]] == ["done", "done"]
    assert failures(run) == ["zh, en: control resta is missing: load_unaligned: it is broken"]


def test_a_finetune_fails_by_its_own_steps_and_by_what_it_stands_on(place: Path) -> None:  # noqa: F811
    run = state(place, "zh/fuse_soft")
    summary = summarise(run)
    assert [f["status"] for f in summary["finetunes"]] == ["failed", "done"]
    assert failures(run) == ["zh failed at fuse_soft: it is broken"]


def test_a_broken_aligned_model_is_said_once(tmp_path: Path, place: Path) -> None:  # noqa: F811
    assert failures(state(place, "load_aligned")) == ["zh, en failed at load_aligned: it is broken"]


def test_what_fails_for_no_finetune_is_said_too(place: Path) -> None:  # noqa: F811
    run = state(place, "compare_deltas")
    assert [f["status"] for f in summarise(run)["finetunes"]] == ["done", "done"]
    assert failures(run) == ["compare_deltas: it is broken"]


def test_a_finetune_fails_with_the_mask_that_it_takes(place: Path) -> None:  # noqa: F811
    run = state(place, "zh/train_mask", en=", mask_of: zh")
    assert failures(run) == ["zh, en failed at train_mask: it is broken"]
    assert summarise(run)["finetunes"][1]["notes"] == ["the mask was trained on zh"]
    run = state(place, "zh/fuse_soft", en=", mask_of: zh")
    assert failures(run) == ["zh failed at fuse_soft: it is broken"]
