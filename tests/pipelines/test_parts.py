"""A run in parts: what follows from the graph, for a config whose models lie elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from components.errors import ConfigError
from pipelines.config import RunConfig, load_config
from pipelines.graph import expand
from pipelines.parts import Parts, levels, narrowed, parts_of, to_do
from tests.pipelines.pipelines import CONFIG, MERGE

WHERE = Path("config")


def far(text: str) -> RunConfig:
    return load_config(WHERE, far=text)


def test_a_far_config_is_held_to_all_but_what_lies_elsewhere(tmp_path: Path) -> None:
    assert far(CONFIG).finetunes[0].path == Path("/models/zh")
    (tmp_path / "zh").mkdir()
    bad = CONFIG.replace("/models/zh", "zh").replace("mask:", "mask:\n  colour: red")
    with pytest.raises(ConfigError) as caught:
        far(bad)
    found = str(caught.value).splitlines()
    assert len(found) == 2
    assert found[0].startswith("config:5: finetunes.0.path: zh is relative to this file, which stays here")
    assert "mask.colour: unknown key" in found[1]
    with pytest.raises(ConfigError, match="gate: over_refusal is not measured"):
        far(CONFIG.replace("metric: asr", "metric: over_refusal"))


def test_each_finetune_has_a_chain_and_the_run_has_its_own_steps() -> None:
    assert parts_of(far(CONFIG)) == Parts(
        mode="each",
        once=(("load", "evaluate"),),
        finetune=(
            ("load",), ("train_mask", "search_scale", "extract_delta"), ("fuse",), ("evaluate", "export_adapter"),
        ),
        joined=(("compare_deltas",),),
        merge=(),
    )  # fmt: skip


def test_merges_have_a_chain_after_that_of_their_finetunes() -> None:
    assert parts_of(far(MERGE)) == Parts(
        mode="merge",
        once=(("evaluate",),),
        finetune=(("load",), ("extract_delta", "evaluate")),
        joined=(("compare_deltas",),),
        merge=(("merge",), ("train_mask", "extract_delta"), ("fuse",), ("evaluate",)),
    )


def test_every_stage_of_a_run_is_in_a_part_and_after_what_it_stands_on() -> None:
    drawn = CONFIG + "landscape: {scans: [{name: random}]}\n"
    texts = [CONFIG, MERGE, CONFIG.replace("fusion: {", "fusion: {select: soft, "), drawn]
    for text in texts:
        config = far(text)
        parts = parts_of(config)
        merges = {merge.name for merge in config.merges}
        for node in expand(config, far=True):
            if node.step.kind == "action" or node.id == "load_aligned":
                continue
            loop = parts.merge if node.finetune in merges else parts.finetune
            place = loop if node.finetune else parts.joined if node.joins else parts.once
            [mine] = [i for i, level in enumerate(place) if node.step.stage in level]
            for _, parent in node.parents:
                same = [n for n in expand(config, far=True) if n.id == parent and n.finetune == node.finetune]
                for one in same if parent != "load_aligned" else ():
                    assert next(i for i, level in enumerate(place) if one.step.stage in level) <= mine, node.id


def test_a_pipeline_knows_what_another_config_would_need_of_it() -> None:
    has = parts_of(far(CONFIG))
    assert has.lacking(parts_of(far(CONFIG.replace("paper", "random_mask")))) == []
    assert parts_of(far(CONFIG.replace("interpolation, resta, ", ""))).lacking(has) == ["load", "search_scale"]


def test_levels_of_nothing_are_none() -> None:
    assert levels([]) == ()


def test_what_stands_on_something_lost_is_not_to_do() -> None:
    nodes = expand(far(CONFIG), far=True)

    def left(of: str | None, stages: set[str], *lost: str) -> set[str]:
        return {node.id for node in to_do(nodes, lost, of, stages)}

    assert left("zh", {"fuse"}) == {
        f"zh/fuse_{v}" for v in ("soft", "binary", "interpolation", "resta", "paper_soft", "paper_binary")
    }
    assert left("zh", {"fuse"}, "zh/train_mask_paper", "load_unaligned") == {
        "zh/fuse_soft", "zh/fuse_binary", "zh/fuse_interpolation",
    }  # fmt: skip
    assert left("zh", {"train_mask", "fuse", "evaluate", "export_adapter"}, "zh/load") == set()
    assert left("zh", {"evaluate"}, "hi/load") == left("zh", {"evaluate"})
    assert left(None, {"compare_deltas"}) == {"compare_deltas"}
    assert left(None, {"compare_deltas"}, "zh/load") == set()
    merged = expand(far(MERGE), far=True)
    assert to_do(merged, ["zh/load"], "both", {"merge"}) == []
    assert [node.id for node in to_do(merged, ["zh/evaluate_before"], "both", {"merge"})] == ["both/merge"]


def test_a_run_is_narrowed_to_some_of_its_finetunes() -> None:
    assert narrowed(CONFIG, " ") == CONFIG
    one = far(narrowed(CONFIG, "hi"))
    assert [finetune.name for finetune in one.finetunes] == ["hi"]
    assert parts_of(one).joined == ()
    three = MERGE.replace("mask:\n", "  - {name: en, path: /models/en, anchor: /x.jsonl}\nmask:\n", 1)
    two = yaml.safe_load(narrowed(three, "hi, zh"))
    assert [merge["name"] for merge in two["merges"]] == ["all"]
    found = "{method: masked, form: soft}"
    tuned = CONFIG.replace("fusion: {", f"fusion: {{tuned: {{zh: {found}, hi: {found}}}, ")
    assert list(far(narrowed(tuned, "zh")).fusion.tuned) == ["zh"]
    with pytest.raises(ConfigError, match=r"finetunes: en, fr is not in the config \(there: zh, hi\)"):
        narrowed(CONFIG, "en,zh,fr")
