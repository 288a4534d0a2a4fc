"""Presets, overrides and their errors; nothing heavy is imported to check a config."""

from __future__ import annotations

import subprocess
import sys

import pytest

from components.errors import ConfigError
from components.masks.presets import PRESETS, resolve
from components.masks.settings import MaskSettings


def test_the_paper_preset_is_the_papers() -> None:
    paper = PRESETS["paper"]
    assert {paper.temperature(step) for step in range(paper.steps)} == {0.5}
    assert (paper.init_logit, paper.rescale, paper.scale, paper.beta) == (0.0, "mean", 1.0, 0.1)
    assert (paper.anchor_weight, paper.reference, paper.relaxation, paper.loss) == (
        0.0,
        "aligned",
        "concrete",
        "sigmoid",
    )
    assert paper.density_weight == 0
    assert paper.stochastic


def test_the_default_anneals_geometrically_to_a_binary_mask() -> None:
    default = resolve()
    assert default == PRESETS["realign"]
    assert default.anchor_weight > 0
    assert default.init_logit > 0
    assert default.rescale == "none"
    settings = MaskSettings(steps=5, temperature_start=1.0, temperature_end=0.0625)
    assert [settings.temperature(s) for s in range(6)] == pytest.approx([1, 0.5, 0.25, 0.125, 0.0625, 0.0625])
    assert MaskSettings(steps=1).temperature(0) == 1.0


def test_overrides_replace_and_everything_wrong_is_listed() -> None:
    assert resolve("paper", {"steps": 7, "include": ["a.*"]}).model_dump() == {
        **PRESETS["paper"].model_dump(),
        "steps": 7,
        "include": ("a.*",),
    }
    with pytest.raises(ConfigError) as raised:
        resolve("realign", {"stepz": 7, "beta": -1, "rescale": "median"})
    for part in ("settings.stepz: unknown key (did you mean 'steps'?)", "settings.beta", "settings.rescale"):
        assert part in str(raised.value)
    with pytest.raises(ConfigError, match="the presets are paper, realign"):
        resolve("papr")
    with pytest.raises(ConfigError, match="no tensor would get a mask"):
        resolve("realign", {"include": []})


def test_the_fingerprint_changes_with_every_setting() -> None:
    base = MaskSettings()
    others = {
        "relaxation": "straight_through", "stochastic": False, "temperature_start": 2.0, "temperature_end": 0.1,
        "init_logit": 0.0, "rescale": "mean", "scale": 0.5, "beta": 0.2, "reference": "initial", "anchor_weight": 2.0,
        "chosen_weight": 0.7,
        "anchor_batch_size": 3, "anchor_new_tokens": 9, "anchor_full_vocabulary": 1, "anchor_top_k": 2,
        "anchor_holdout": 0.2, "density_weight": 0.1, "learning_rate": 0.2, "adam_beta1": 0.5, "adam_beta2": 0.9,
        "adam_epsilon": 1e-6, "clip_norm": 1.0, "steps": 3, "batch_size": 2, "max_length": 99, "include": ["x"],
        "pair_new_tokens": 7, "exclude": ["y"], "storage": "bits", "dtype": "bfloat16", "granularity": "row",
        "eval_every": 5, "eval_pairs": 5, "seed": 1,
        "loss": "ipo", "preference_weight": 0.5, "warmup_steps": 2, "schedule": "cosine", "keep_best": True, "patience": 3,
    }  # fmt: skip
    assert set(others) == set(MaskSettings.model_fields)
    prints = {resolve("realign", {"eval_every": 2, key: value}).fingerprint() for key, value in others.items()}
    assert len(prints | {base.fingerprint()}) == len(others) + 1


def test_no_heavy_import() -> None:
    modules = "components.masks.settings, components.masks.preferences, components.masks.data, components.masks.zero"
    code = f"import sys, {modules}; print(sorted({{'torch', 'numpy', 'transformers', 'datasets'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
