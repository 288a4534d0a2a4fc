"""Settings of its own for a finetune or merge: what a config may say, what the run makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from components.checkpoints.reference import open_checkpoint
from components.checkpoints.source import read_whole
from components.evaluation.choose import choose_form
from components.masks.artifact import MaskArtifact
from components.reporting.schema import read_summary
from pipelines.config import load_config
from pipelines.graph import expand
from tests.pipelines.small import records, run, small_config, write_config
from tests.pipelines.test_config import GOOD, place, problems  # noqa: F401 - a fixture
from tests.pipelines.test_graph import merging

RATES = {"asr": {"value": 0.5}, "task": {"value": 0.1}, "over_refusal": {"value": 0.9}}
BETTER = {"asr": {"value": 0.0}, "task": {"value": 0.9}, "over_refusal": {"value": 0.0}}


def with_tuned(tuned: str, more: str = "") -> str:
    return GOOD.replace("mask:\n", f"{more}fusion: {{tuned: {tuned}}}\nmask:\n", 1)


def test_what_was_tuned_is_served_unless_a_form_is_named() -> None:
    dev = {"soft": BETTER, "binary": BETTER, "tuned": RATES}
    assert choose_form(dev, select="auto", max_asr=0.05) == "tuned"
    assert choose_form(dev, select="soft", max_asr=0.05) == "soft"
    assert choose_form({"soft": BETTER}, select="tuned", max_asr=0.05) is None


def test_only_what_has_settings_has_the_steps(place: Path) -> None:  # noqa: F811
    (place / "en").mkdir()
    two = with_tuned("{zh: {method: interpolation, alpha: 0.5}}").replace(
        "fusion:", "  - {name: en, path: en, anchor: anchor.jsonl}\nlandscape: {}\nfusion:"
    )
    (place / "realign.yaml").write_text(two)
    nodes = {node.id: node for node in expand(load_config(place / "realign.yaml"))}
    assert [name for name in nodes if "tuned" in name] == ["zh/fuse_tuned", "zh/evaluate_tuned"]
    # An interpolation looks at no mask, so another mask makes no other result.
    assert [role for role, _ in nodes["zh/fuse_tuned"].parents] == ["load_aligned", "load"]
    assert {"fuse_tuned", "evaluate_tuned"} <= set(dict(nodes["zh/landscape"].parents))
    assert not {"fuse_tuned", "evaluate_tuned"} & set(dict(nodes["en/landscape"].parents))
    assert dict(nodes["zh/register"].parents)["evaluate_tuned"] == "zh/evaluate_tuned"
    (place / "realign.yaml").write_text(two.replace("{tuned:", "{select: soft, tuned:"))
    nodes = {node.id: node for node in expand(load_config(place / "realign.yaml"))}
    assert "fuse_tuned" not in dict(nodes["zh/landscape"].parents)


def test_a_mask_and_the_unaligned_model_are_parents_where_they_are_used(place: Path) -> None:  # noqa: F811
    (place / "unaligned").mkdir()
    for tuned, roles in (
        ("{method: masked, form: soft, scale: 0.7}", ["load_aligned", "load", "train_mask"]),
        ("{method: lox, gamma: 0.5, rank: 2}", ["load_aligned", "load", "load_unaligned"]),
    ):
        (place / "realign.yaml").write_text(with_tuned(f"{{zh: {tuned}}}", "unaligned: unaligned\n"))
        nodes = {node.id: node for node in expand(load_config(place / "realign.yaml"))}
        assert [role for role, _ in nodes["zh/fuse_tuned"].parents] == roles


def test_a_merge_is_merged_anew_where_its_merge_was_tuned(place: Path) -> None:  # noqa: F811
    masked = "method: masked, form: soft"
    text = merging(place).replace(
        "mode: merge",
        f"fusion: {{tuned: {{sum: {{{masked}, merge: {{method: ties, density: 0.4}}}}, pair: {{{masked}}}}}}}\nmode: merge",
    )
    (place / "realign.yaml").write_text(text)
    nodes = {node.id: node for node in expand(load_config(place / "realign.yaml"))}
    assert [name for name in nodes if "merge_tuned" in name] == ["sum/merge_tuned"]
    assert dict(nodes["sum/fuse_tuned"].parents)["load"] == "sum/merge_tuned"
    assert dict(nodes["sum/fuse_tuned"].parents)["train_mask"] == "sum/train_mask"
    assert dict(nodes["pair/fuse_tuned"].parents)["load"] == "pair/merge"


@pytest.mark.parametrize(
    ("tuned", "told"),
    [
        (
            "{en: {method: interpolation, alpha: 0.5}}",
            "fusion.tuned names finetunes that are not there: en (there: zh)",
        ),
        ("{zh: {method: resta, gamma: 0.5}}", "fusion.tuned.zh: resta needs `unaligned`"),
        ("{zh: {method: interpolation}}", "fusion.tuned.zh: method interpolation needs alpha"),
        ("{zh: {method: masked, form: soft, alpha: 1}}", "fusion.tuned.zh: method masked has no use for alpha"),
        ("{zh: {method: masked, form: soft, scal: 2}}", "fusion.tuned.zh.scal: unknown key (did you mean 'scale'?)"),
        (
            "{zh: {method: masked, form: soft, merge: {method: ties}}}",
            "fusion.tuned.zh: merge is for mode: merge; remove it",
        ),
        ("{}, select: tuned", "fusion.select: tuned needs fusion.tuned of zh; give it, or select auto"),
    ],
)
def test_settings_that_cannot_be_are_refused(place: Path, tuned: str, told: str) -> None:  # noqa: F811
    found = problems(place, with_tuned(tuned))
    assert len(found) == 1
    assert told in found[0]


def test_a_tuned_merge_fits_its_finetunes(place: Path) -> None:  # noqa: F811
    tuned = "fusion: {tuned: {pair: {method: interpolation, alpha: 1, merge: {method: average}}}}"
    text = merging(place).replace("mode: merge", f"{tuned}\nmode: merge")
    wrong = text.replace("{method: average}", "{method: ties, weights: {en: 2.0}}")
    assert "fusion.tuned.pair: merge: weights names 'en', which is not there" in problems(place, wrong)[0]
    (place / "realign.yaml").write_text(text)
    assert load_config(place / "realign.yaml").fusion.tuned["pair"].merge is not None


def read(directory: str | Path, **options: Any) -> Any:
    return open_checkpoint(Path(directory), **options).source


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.xdist_group("run")
def test_a_run_makes_measures_and_serves_what_was_tuned(tmp_path: Path) -> None:
    config: dict[str, Any] = small_config(tmp_path, finetunes=("zh",), steps=3)
    config["fusion"] = {}
    workspace = tmp_path / "workspace"
    first = run(write_config(tmp_path, config), workspace)
    assert first.returncode == 0, first.stderr
    before = set(records(workspace))
    config["fusion"] = {"tuned": {"zh": {"method": "masked", "form": "soft", "scale": 0.5}}}
    done = run(write_config(tmp_path, config), workspace)
    assert done.returncode == 0, done.stderr
    made = {name.split("/")[0] for name in set(records(workspace)) - before}
    assert made == {"fuse", "evaluate"}, "all else was there"
    [zh] = read_summary(workspace / "summary.json")["finetunes"]
    assert zh["selected"] == "tuned"
    assert zh["registry"] == {"name": "small-zh", "version": "2"}
    assert zh["tuned"] == {"method": "masked", "form": "soft", "scale": 0.5}
    assert zh["after_tuned"]["asr"]["n"] == (zh["after_soft"] or {})["asr"]["n"]
    assert {"tuned_vs_soft", "tuned_vs_binary", "tuned_vs_before"} <= set(zh["comparisons"])
    assert any(line.split()[:2] == ["tuned", "★"] for line in done.stdout.splitlines()), done.stdout

    record = json.loads((Path(zh["fused"]["tuned"]).parent / "record.json").read_text())
    mask = MaskArtifact.open(workspace / record["parents"]["train_mask"] / "mask")
    fused, aligned, finetune = map(read, (zh["fused"]["tuned"], config["aligned"], config["finetunes"][0]["path"]))
    for name in fused.names():
        a, f = (read_whole(source, name).double() for source in (aligned, finetune))
        wanted = a + 0.5 * mask.soft(name, 0, a.numel()).double().reshape(a.shape) * (f - a)
        torch.testing.assert_close(read_whole(fused, name).double(), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.xdist_group("run")
def test_a_run_merges_anew_what_was_tuned_as_a_merge(tmp_path: Path) -> None:
    config: dict[str, Any] = small_config(tmp_path, steps=2)
    config |= {"mode": "merge", "merges": [{"name": "both", "method": "average"}]}
    merge = {"method": "task_arithmetic", "weights": {"zh": 0.3, "hi": 0.6}}
    config["fusion"] = {"tuned": {"both": {"method": "interpolation", "alpha": 1.0, "merge": merge}}}
    workspace = tmp_path / "workspace"
    done = run(write_config(tmp_path, config), workspace)
    assert done.returncode == 0, done.stderr
    [both] = read_summary(workspace / "summary.json")["merged"]
    assert both["selected"] == "tuned"
    fused, aligned = read(both["fused"]["tuned"]), read(config["aligned"])
    zh, hi = (read(one["path"], base=Path(config["aligned"])) for one in config["finetunes"])
    for name in fused.names():
        a, z, h = (read_whole(source, name).double() for source in (aligned, zh, hi))
        wanted = a + 0.3 * (z - a) + 0.6 * (h - a)
        torch.testing.assert_close(read_whole(fused, name).double(), wanted, rtol=1e-5, atol=1e-6)
