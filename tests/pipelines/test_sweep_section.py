"""The section `sweep`: what is taken, what is refused and why, and the config that comes out of a sweep."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from components.errors import ConfigError
from components.fusion.merge_settings import MergeSettings
from components.fusion.settings import FusionSettings
from components.sweeps.settings import Range
from components.sweeps.space import Tuning
from pipelines.config import load_config
from pipelines.graph import expand
from pipelines.sweep_section import defaults_of, settings_of, space_of
from pipelines.sweep_winner import tuned_yaml
from tests.pipelines.test_config import GOOD, place, problems  # noqa: F401 - a fixture
from tests.pipelines.test_graph import merging

DEV = """\
    - {name: benign, kind: benign, split: dev, path: harmful.jsonl}
    - {name: zh, kind: task, split: dev, path: zh.jsonl}
"""


def with_sweep(sweep: str, text: str = GOOD + DEV) -> str:
    return text.replace("mask:\n", f"sweep: {sweep}\nmask:\n", 1)


def test_what_is_not_said_is_what_makes_sense_for_the_run(place: Path) -> None:  # noqa: F811
    (place / "realign.yaml").write_text(with_sweep("{trials: 7}"))
    config = load_config(place / "realign.yaml")
    assert config.sweep is not None
    assert config.sweep.trials == 7
    assert [one.name for one in settings_of(config, "zh").objectives] == ["asr", "task", "over_refusal"]
    assert space_of(config, "zh")["method"] == ("masked", "interpolation")
    assert not config.needs_unaligned
    # Without a benign dev set nobody asked for over-refusal, and nobody misses it.
    (place / "realign.yaml").write_text(with_sweep("{}", GOOD + DEV.splitlines()[1] + "\n"))
    config = load_config(place / "realign.yaml")
    assert [one.name for one in settings_of(config, "zh").objectives] == ["asr", "task"]
    defaults = FusionSettings(method="masked", form="soft", rescale=defaults_of(config, "zh").fusion.rescale)
    assert defaults_of(config, "zh") == Tuning(fusion=defaults)


def test_the_unaligned_model_is_loaded_where_a_method_looks_at_it(place: Path) -> None:  # noqa: F811
    (place / "unaligned").mkdir()
    text = GOOD.replace("mask:\n", "unaligned: unaligned\nmask:\n", 1) + DEV
    for space, needed in (("{}", True), ("{space: {scale: {low: 0.5, high: 1}}}", False)):
        (place / "realign.yaml").write_text(with_sweep(space, text))
        config = load_config(place / "realign.yaml")
        assert config.needs_unaligned is needed
        assert ("load_unaligned" in {node.id for node in expand(config)}) is needed


def test_a_merges_own_settings_may_be_swept(place: Path) -> None:  # noqa: F811
    text = merging(place) + DEV
    space = "{space: {merge.density: {low: 0.1, high: 0.9}, merge.weights: {zh: {low: 0.2, high: 1}}, scale: [1.0]}}"
    (place / "realign.yaml").write_text(
        with_sweep(space, text).replace("method: task_arithmetic, scale: 0.4", "method: ties")
    )
    config = load_config(place / "realign.yaml")
    found = space_of(config, "pair")
    assert found["merge.density"] == Range(low=0.1, high=0.9)
    assert found["merge.weights.zh"] == Range(low=0.2, high=1)
    merge = defaults_of(config, "pair").merge
    assert merge is not None
    assert merge == MergeSettings(method="ties")


@pytest.mark.parametrize(
    ("sweep", "told"),
    [
        ("{space: {scal: {low: 0, high: 1}}}", "sweep.space: no setting 'scal' (there are method, "),
        ("{space: {merge.density: [0.2]}}", "merge.… is for mode: merge"),
        ("{space: {gamma: [0.2]}}", "sweep.space.gamma: no candidate has a use for it, only those of resta, lox"),
        ("{space: {method: [resta]}}", "sweep.space.method: resta needs `unaligned`"),
        ("{space: {scale: {low: 2, high: 1}}}", "low 2 is above high 1: the range is empty"),
        ("{trails: 3}", "sweep.trails: unknown key (did you mean 'trials'?)"),
        ("{objectives: [{metric: asr, at_most: 0.1}, {metric: asr, at_most: 0.2}]}", "asr is named 2 times"),
        ("{objectives: [{metric: task, at_most: 0.1}]}", "task is to grow and cannot be held to at_most 0.1"),
        ("{objectives: [{metric: asr, at_last: 0.1}]}", "unknown key (did you mean 'at_least'?)"),
        ("{objectives: [{metric: exact}]}", "sweep of zh: objective exact: no dev set that counts measures it"),
        ("{objectives: [{metric: asr, set: en}]}", "sweep of zh: objective asr/en: no dev set en (there: "),
    ],
)
def test_what_cannot_be_swept_is_refused_with_a_reason(place: Path, sweep: str, told: str) -> None:  # noqa: F811
    text = with_sweep(sweep)
    if "exact" in sweep:
        text = text.replace("kind: benign", "kind: harmful")
    found = "\n".join(problems(place, text))
    assert told in found, found


def test_adapters_factors_are_not_swept(place: Path) -> None:  # noqa: F811
    (place / "base").mkdir()
    for directory in ("aligned", "zh"):
        (place / directory / "adapter_config.json").write_text("{}")
    text = GOOD.replace("aligned: aligned\n", "aligned: aligned\naligned_base: base\n").replace(
        "mask:\n", "mask:\n  track: factors\n"
    )
    [found] = problems(place, with_sweep("{}", text + DEV))
    assert "sweep: mask.track: factors is not swept" in found


def test_what_was_found_is_the_same_config_with_it(place: Path) -> None:  # noqa: F811
    text = with_sweep("{space: {layers: {'*.mlp.*': {low: 0, high: 1}}, scale: [1.0, 2.0]}}")
    (place / "realign.yaml").write_text(text.replace("mask:\n", "fusion: {select: binary, max_asr: 0.1}\nmask:\n", 1))
    config = load_config(place / "realign.yaml")
    tuning = Tuning(
        fusion=FusionSettings(method="masked", form="soft", scale=0.5, layers=(("*.q_proj.*", 0.25), ("*", 1.5)))
    )
    elsewhere = place / "results"
    elsewhere.mkdir()
    (elsewhere / "tuned.yaml").write_text(tuned_yaml(config, {"zh": tuning}))
    found = load_config(elsewhere / "tuned.yaml")
    assert found.fusion.tuned["zh"].fusion == tuning.fusion
    assert found.fusion.select == "auto"
    assert found.fusion.max_asr == 0.1
    assert found.sweep is None
    same = found.model_copy(update={"fusion": config.fusion, "sweep": config.sweep})
    assert same == config
    # As people write it: patterns in their order, nothing that nobody chose.
    written = yaml.safe_load((elsewhere / "tuned.yaml").read_text())["fusion"]["tuned"]["zh"]
    assert written == {"method": "masked", "form": "soft", "scale": 0.5, "layers": {"*.q_proj.*": 0.25, "*": 1.5}}
    assert list(written["layers"]) == ["*.q_proj.*", "*"]


def test_a_tuned_merge_is_written_and_read(place: Path) -> None:  # noqa: F811
    (place / "realign.yaml").write_text(merging(place))
    config = load_config(place / "realign.yaml")
    merge = MergeSettings(method="ties", density=0.3, weights={"zh": 0.5, "hi": (("*.mlp.*", 2.0), ("*", 1.0))})
    tuning = Tuning(fusion=FusionSettings(method="interpolation", alpha=1.0), merge=merge)
    (place / "tuned.yaml").write_text(tuned_yaml(config, {"pair": tuning}))
    found = load_config(place / "tuned.yaml").fusion.tuned["pair"]
    assert (found.fusion, found.merge) == (tuning.fusion, merge)


def test_a_section_that_a_run_does_not_use_is_still_held_to_it(place: Path) -> None:  # noqa: F811
    (place / "realign.yaml").write_text(with_sweep("{space: {alpha: [2.0]}, pick: best}"))
    with pytest.raises(ConfigError, match=r"sweep\.pick: Input should be 'skill', 'knee' or 'safest'"):
        load_config(place / "realign.yaml")


def test_what_is_wrong_in_the_section_has_its_own_line(place: Path) -> None:  # noqa: F811
    lines = with_sweep("{}").splitlines()
    at = next(number for number, line in enumerate(lines, start=1) if line.startswith("sweep:"))
    text = "\n".join(
        [*lines[: at - 1], "sweep:", "  space:", "    formm: [soft]", "    form: [medium]", *lines[at:], ""]
    )
    assert [one.split(": ")[:2] for one in problems(place, text)] == [
        [str(at + 1), "sweep.space"],
        [str(at + 3), "sweep.space.form"],
    ]
    [found] = problems(place, text.replace("formm: [soft]", "scale: {low: 2, high: 1}").replace("medium", "soft"))
    assert found == f"{at + 2}: sweep.space.scale: low 2 is above high 1: the range is empty"
    wrong = text.replace("  space:\n    formm: [soft]\n    form: [medium]", "  objectives: [{metric: sped}]")
    [found] = problems(place, wrong)
    assert "sweep.objectives.0.metric" in found
