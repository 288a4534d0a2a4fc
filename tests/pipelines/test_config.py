"""The run config: everything wrong with it at once, with line and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.errors import ConfigError
from components.masks.presets import resolve
from pipelines.config import load_config

GOOD = """\
name: trial
aligned: aligned
finetunes:
  - name: zh
    path: zh
    anchor: anchor.jsonl
    sets: [zh]
mask:
  preferences: pairs.jsonl
evaluation:
  sets:
    - {name: harmful, kind: harmful, path: harmful.jsonl}
    - {name: harmful, kind: harmful, split: dev, path: harmful.jsonl}
    - {name: zh, kind: task, path: zh.jsonl}
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for directory in ("aligned", "zh"):
        (tmp_path / directory).mkdir()
    for file in ("pairs.jsonl", "harmful.jsonl", "zh.jsonl", "anchor.jsonl"):
        (tmp_path / file).write_text("{}\n")
    return tmp_path


def problems(place: Path, text: str) -> list[str]:
    path = place / "realign.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return [line.removeprefix(f"{path}:") for line in str(caught.value).splitlines()]


def test_a_good_config_has_absolute_paths_and_defaults(place: Path) -> None:
    (place / "realign.yaml").write_text(GOOD)
    config = load_config(place / "realign.yaml")
    assert config.aligned == place / "aligned"
    assert config.evaluation.sets[0].path == place / "harmful.jsonl"
    assert config.mask.resolved.temperature_end < config.mask.resolved.temperature_start
    assert [s.name for s in config.sets_of(config.finetunes[0].name)] == ["harmful", "harmful", "zh"]
    assert config.tracking.register_models is True


def test_preferences_are_a_path_a_dataset_or_prompts(place: Path) -> None:
    commit = "0123456789" * 4
    dataset = f"{{hub: owner/name, revision: '{commit}', split: test, config: en}}"
    text = GOOD.replace("pairs.jsonl", f"{dataset}\n  preferences_dev: {{prompts: anchor.jsonl}}")
    (place / "realign.yaml").write_text(text)
    mask = load_config(place / "realign.yaml").mask
    assert mask.preferences.to_json() == {"hub": "owner/name", "revision": commit, "split": "test", "config": "en"}
    assert mask.preferences_dev is not None
    assert mask.preferences_dev.prompts == place / "anchor.jsonl"
    (place / "realign.yaml").write_text(GOOD)
    assert load_config(place / "realign.yaml").mask.preferences.file == place / "pairs.jsonl"


def test_the_published_control_keeps_its_settings_and_takes_the_number_format(place: Path) -> None:
    changed = GOOD.replace("mask:\n", "mask:\n  settings: {steps: 7, dtype: bfloat16}\n", 1)
    (place / "realign.yaml").write_text(changed)
    mask = load_config(place / "realign.yaml").mask
    assert mask.resolved.steps == 7
    assert mask.published == resolve("paper", {"dtype": "bfloat16"})


def test_where_a_training_is_offloaded_to_is_relative_to_the_config(place: Path) -> None:
    (place / "realign.yaml").write_text(GOOD + "execution: {mask: {offload: nvme, offload_dir: fast}}\n")
    assert load_config(place / "realign.yaml").execution.mask.offload_dir == place / "fast"


@pytest.mark.parametrize(
    ("execution", "told"),
    [
        ("{ranks: 2, offload: cpu}", "offload: cpu, but with device: cpu they are there already"),
        ("{ranks: 1, offload_weights: nvme}", "offload_weights needs several ranks"),
        ("{ranks: 2, stage: 2, offload_weights: nvme}", "offload_weights needs stage 3"),
    ],
)
def test_offloads_that_do_nothing_are_refused(place: Path, execution: str, told: str) -> None:
    [problem] = problems(place, GOOD + f"execution:\n  mask: {execution}\n")
    assert problem.startswith("16: ")
    assert told in problem


def test_everything_wrong_is_said_at_once_with_its_line(place: Path) -> None:
    text = GOOD.replace("aligned: aligned", "aligned: nowhere\naligend: x").replace(
        "preferences:", "preferences: no.jsonl #"
    )
    text = text.replace("sets: [zh]", "sets: zh")
    found = problems(place, text)
    assert [line.split(":")[0] for line in found] == ["2", "3", "8", "10"]
    assert "no directory" in found[0]
    assert "aligend: unknown key (did you mean 'aligned'?)" in found[1]
    assert "finetunes.0.sets" in found[2]
    assert "no file" in found[3]
    assert "no.jsonl" in found[3]


@pytest.mark.parametrize(
    ("change", "line", "text"),
    [
        (("name: trial\n", ""), 1, "name: missing"),
        (("mask:\n", "mask:\n  preset: papr\n"), 9, "'realign' or 'paper'"),
        (
            ("mask:\n", "mask:\n  settings: {stepz: 3, steps: -1}\n"),
            8,
            "settings.stepz: unknown key (did you mean 'steps'?)",
        ),
        (("mask:\n", "cluster: {nodes: 2}\nmask:\n"), 8, "cluster: unknown key"),
        (
            ("mask:\n", "landscape: {point: 21}\nmask:\n"),
            8,
            "landscape.point: unknown key (there are: scans, sets, limit,",
        ),
        (("mask:\n", "execution: {landscape: {actrs: 2}}\nmask:\n"), 8, "unknown key (did you mean 'actors'?)"),
        (("mask:\n", "mode: merge\nmask:\n"), 8, "mode: merge needs `merges`"),
        (("sets: [zh]", "sets: [zz]"), 1, r"names task sets that are not there: ['zz'] (there: zh)"),
        (("mask:\n", "fusion: {controls: [resta]}\nmask:\n"), 1, "resta needs `unaligned`"),
        (("kind: harmful, split: dev", "kind: benign, split: dev"), 1, "chooses on dev sets"),
        (("kind: harmful, split: dev", "kind: harmful, headline: false, split: dev"), 1, "split dev that counts"),
        (("{name: harmful, kind: harmful, path", "{name: a_hard, kind: harmful, path"), 10, "nobody looks at safety"),
        (("    anchor: anchor.jsonl\n", ""), 1, "finetunes without `anchor`: zh"),
        (("mask:\n", "mask:\n  settings: {storage: bits}\n"), 9, "storage: bits keeps no soft mask"),
        (("mask:\n", "mask:\n  settings: {beta: .inf}\n"), 8, "finite number"),
        (("mask:\n", "fusion: {adapter: {}}\nmask:\n"), 8, "fusion.adapter: no finetune is a LoRA adapter"),
        (("mask:\n", "fusion: {adapter: {ranc: 3}}\nmask:\n"), 8, "unknown key (did you mean 'rank'?)"),
        (("mask:\n", "fusion: {candidates: []}\nmask:\n"), 8, "at least 1 item"),
        (("mask:\n", "fusion: {candidates: [.nan]}\nmask:\n"), 8, "finite number"),
        (("name: zh\n", "name: a/b\n"), 4, "finetunes.0.name"),
        (
            ("mask:\n", "fusion: {controls: [random_mask]}\nmask:\n  settings: {granularity: tensor}\n"),
            1,
            "random_mask is the",
        ),
        (("mask:\n", "aligned_base_equal: true\nmask:\n"), 8, "aligned_base_equal: for mask.track: factors only"),
        (("pairs.jsonl", "{prompts: no.csv}"), 9, "no.csv; give a path relative to the config file"),
        (("pairs.jsonl", "{file: pairs.jsonl, prompts: anchor.jsonl}"), 9, "not file and prompts together"),
        (("pairs.jsonl", "{hub: owner/name}"), 9, "owner/name has no revision; pin it to a commit"),
        (("pairs.jsonl", "{hub: owner/name, revision: main}"), 9, "mask.preferences.revision: String should match"),
        (("pairs.jsonl", "{hub: owner/name, revison: main}"), 9, "unknown key (did you mean 'revision'?)"),
        (("pairs.jsonl", "pairs.jsonl\n  preferences_dev: {prompts: x.json}"), 10, "mask.preferences_dev: no file"),
        (
            ("pairs.jsonl", "{prompts: anchor.jsonl}\n  settings: {pair_new_tokens: 64, max_length: 64}"),
            8,
            "pair_new_tokens (64) leaves no prompt any room in settings.max_length (64)",
        ),
        (("kind: harmful, path", "kind: harmful, path: x, pth"), 12, "unknown key (did you mean 'path'?)"),
    ],
)
def test_each_mistake_has_its_line_and_remedy(place: Path, change: tuple[str, str], line: int, text: str) -> None:
    assert change[0] in GOOD
    found = problems(place, GOOD.replace(*change))
    assert any(f.startswith(f"{line}: ") and text in f for f in found), found


def test_keys_given_twice_and_broken_yaml_are_refused(place: Path) -> None:
    assert "'name' (line 15)" in problems(place, GOOD + "name: other\n")[0]
    assert "not YAML" in problems(place, "a: [1\n")[0]
    assert "mapping of sections" in problems(place, "- 1\n")[0]
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(place / "absent.yaml")


def test_the_lora_track_wants_adapters_over_one_base(place: Path) -> None:
    base = "aligned: aligned\naligned_base: base\n"
    factors = GOOD.replace("mask:\n", "mask:\n  track: factors\n")
    found = "\n".join(
        problems(place, factors.replace("mask:\n", "fusion: {controls: [resta, interpolation], adapter: {}}\nmask:\n"))
    )
    assert "mask.track: factors needs `aligned_base`" in found
    assert "mask.track: factors is for LoRA adapters, and these are none: zh, aligned" in found
    assert "remove the controls interpolation, resta: weights are products" in found
    assert "remove fusion.adapter, adapters come out as they are" in found
    (place / "base").mkdir()
    [found] = problems(place, GOOD.replace("aligned: aligned\n", base))
    assert "aligned_base: for mask.track: factors only; remove it" in found
    (place / "aligned" / "adapter_config.json").write_text("{}")
    [found] = problems(place, GOOD)
    assert "aligned is a LoRA adapter: set mask.track: factors and aligned_base" in found
    (place / "zh" / "adapter_config.json").write_text("{}")
    (place / "realign.yaml").write_text(factors.replace("aligned: aligned\n", base))
    config = load_config(place / "realign.yaml")
    assert config.base == place / "base"
    assert config.finetunes[0].is_adapter


@pytest.mark.parametrize(
    ("tracking", "told"),
    [
        ("{promote: true}", "tracking.promote needs `gate`, which says when a model may serve"),
        ("{promote: true, register: false}", "may serve and tracking.register: true"),
    ],
)
def test_promotion_needs_a_gate_and_a_registry(place: Path, tracking: str, told: str) -> None:
    [problem] = problems(place, GOOD + f"tracking: {tracking}\n")
    assert told in problem
