"""The stage graph: an order that works, no dangling parents, nothing that nobody asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.errors import ConfigError
from pipelines.config import load_config
from pipelines.graph import STEPS, expand, steps_of
from ray_jobs.stage import VERSIONS
from tests.pipelines.test_config import GOOD, place  # noqa: F401 - a fixture


def test_parents_stand_before_children_and_stages_exist() -> None:
    seen: set[tuple[str, str]] = set()
    for step in STEPS:
        assert set(step.parents) <= {name for name, _ in seen}, step.name
        assert (step.name, step.scope) not in seen
        seen.add((step.name, step.scope))
        assert step.kind == "action" or step.stage in VERSIONS


@pytest.mark.usefixtures("place")
def test_a_run_has_what_it_asks_for(place: Path) -> None:  # noqa: F811
    (place / "en").mkdir()
    two = GOOD.replace("mask:\n", "  - {name: en, path: en, anchor: anchor.jsonl}\nmask:\n", 1)
    (place / "realign.yaml").write_text(two)
    config = load_config(place / "realign.yaml")
    names = {step.name for step in steps_of(config)}
    assert {"fuse_soft", "fuse_binary", "evaluate_before", "compare_deltas"} <= names
    assert not names & {"load_unaligned", "search_resta", "train_mask_paper", "fuse_random_mask"}
    nodes = {node.id: node for node in expand(config)}
    assert nodes["zh/fuse_soft"].parents == (
        ("load_aligned", "load_aligned"), ("load", "zh/load"), ("train_mask", "zh/train_mask"),
    )  # fmt: skip
    assert nodes["compare_deltas"].joins
    assert dict(nodes["compare_deltas"].parents) == {
        "load_aligned": "load_aligned", "load:zh": "zh/load", "load:en": "en/load",
    }  # fmt: skip


def test_one_finetune_has_nothing_to_compare(place: Path) -> None:  # noqa: F811
    (place / "realign.yaml").write_text(GOOD.replace("mask:\n", "fusion: {controls: [paper]}\nmask:\n", 1))
    names = {step.name for step in steps_of(load_config(place / "realign.yaml"))}
    assert "compare_deltas" not in names
    assert {"train_mask_paper", "fuse_paper_soft", "evaluate_paper_binary"} <= names


def test_a_finetune_can_take_another_ones_mask(place: Path) -> None:  # noqa: F811
    (place / "en").mkdir()
    two = GOOD.replace("mask:\n", "  - {name: en, path: en, mask_of: zh}\nfusion: {controls: [paper]}\nmask:\n", 1)
    (place / "realign.yaml").write_text(two)
    nodes = {node.id: node for node in expand(load_config(place / "realign.yaml"))}
    assert "en/train_mask" not in nodes
    assert "en/train_mask_paper" not in nodes
    assert dict(nodes["en/fuse_soft"].parents)["train_mask"] == "zh/train_mask"
    assert dict(nodes["en/fuse_soft"].parents)["load"] == "en/load"
    assert dict(nodes["en/fuse_paper_soft"].parents)["train_mask_paper"] == "zh/train_mask_paper"
    for wrong in ("en", "it"):
        (place / "realign.yaml").write_text(two.replace("mask_of: zh", f"mask_of: {wrong}"))
        with pytest.raises(ConfigError, match=f"mask_of names {wrong}, which trains no mask .* that do: zh"):
            load_config(place / "realign.yaml")


MERGES = """
mode: merge
merges:
  - {name: sum, method: task_arithmetic, scale: 0.4}
  - {name: pair, method: ties, of: [zh, hi]}
mask:
"""


def merging(directory: Path) -> str:
    for name in ("en", "hi"):
        (directory / name).mkdir()
    more = "  - {name: en, path: en, anchor: anchor.jsonl}\n  - {name: hi, path: hi, anchor: anchor.jsonl}"
    return GOOD.replace("mask:\n", more + MERGES, 1)


def test_merges_are_realigned_in_place_of_their_finetunes(place: Path) -> None:  # noqa: F811
    (place / "realign.yaml").write_text(merging(place))
    config = load_config(place / "realign.yaml")
    nodes = {node.id: node for node in expand(config)}
    assert {n.split("/")[1] for n in nodes if n.startswith("zh/")} == {"load", "extract_delta", "evaluate_before"}
    assert dict(nodes["sum/merge"].parents) == {
        "load_aligned": "load_aligned", "load:zh": "zh/load", "load:en": "en/load", "load:hi": "hi/load",
    }  # fmt: skip
    assert set(dict(nodes["pair/merge"].parents)) == {"load_aligned", "load:zh", "load:hi"}
    assert nodes["pair/train_mask"].parents == (("load_aligned", "load_aligned"), ("load", "pair/merge"))
    assert nodes["pair/evaluate_before"].parents == (("fuse_before", "pair/fuse_before"),)
    assert dict(nodes["zh/evaluate_before"].parents)["load"] == "zh/load"
    assert nodes["sum/register"].step.kind == "action"
    assert [f.name for f in config.members("pair")] == ["zh", "hi"]
    order = list(nodes)
    assert all(order.index(parent) < order.index(id) for id, node in nodes.items() for _, parent in node.parents)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("mode: merge", "mode: each", "`merges` needs `mode: merge`"),
        ("name: pair", "name: zh", "merge zh has the name of another merge or of a finetune"),
        ("of: [zh, hi]", "of: [zh, it]", r"merge pair names finetunes that are not there: it \(there"),
        ("of: [zh, hi]", "of: [hi]", "merge pair is of fewer than two finetunes"),
        ("of: [zh, hi]", "of: [zh, hi], weights: {en: 2}", r"not there: en \(there: zh, hi\)"),
        ("scale: 0.4", "density: 0.4", "task_arithmetic has no use for density"),
        ("task_arithmetic, scale: 0.4", "slerp, t: 0.4", "merge sum: slerp is between two models"),
        ("path: hi, anchor: anchor.jsonl", "path: hi, mask_of: zh", "mask_of has no meaning in mode: merge"),
        ("path: hi, anchor: anchor.jsonl", "path: hi", "finetunes without `anchor`: hi"),
        ("mode: merge", "fusion: {adapter: {}}\nmode: merge", "mode: merge: remove fusion.adapter"),
    ],
)
def test_merges_that_make_no_sense_are_refused(place: Path, old: str, new: str, complaint: str) -> None:  # noqa: F811
    text = merging(place)
    assert old in text
    (place / "realign.yaml").write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=complaint):
        load_config(place / "realign.yaml")


def test_a_merge_needs_merges(place: Path) -> None:  # noqa: F811
    (place / "realign.yaml").write_text(GOOD + "mode: merge\n")
    with pytest.raises(ConfigError, match="mode: merge needs `merges`"):
        load_config(place / "realign.yaml")


def test_only_what_came_as_an_adapter_leaves_as_one(place: Path) -> None:  # noqa: F811
    (place / "en").mkdir()
    (place / "en" / "adapter_config.json").write_text("{}")
    two = GOOD.replace("mask:\n", "  - {name: en, path: en, anchor: anchor.jsonl}\nfusion: {adapter: {}}\nmask:\n", 1)
    (place / "realign.yaml").write_text(two)
    nodes = {node.id: node for node in expand(load_config(place / "realign.yaml"))}
    assert [name for name in nodes if "adapter" in name] == ["en/export_adapter", "en/evaluate_adapter"]
    assert dict(nodes["en/export_adapter"].parents)["evaluate_binary"] == "en/evaluate_binary"
    (place / "realign.yaml").write_text(two.replace("fusion: {adapter: {}}\n", ""))
    assert not [n for n in expand(load_config(place / "realign.yaml")) if "adapter" in n.id]
