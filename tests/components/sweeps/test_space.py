"""Spaces, candidates and settings, with optuna's own trials."""

from __future__ import annotations

from typing import Any

import optuna
import pytest

from components.errors import ConfigError
from components.fusion.merge_settings import MergeSettings
from components.fusion.settings import FusionSettings
from components.sweeps.checking import Given, complete_space, options, space_problems
from components.sweeps.settings import Range, Space, SweepSettings
from components.sweeps.space import Tuning, expressed, same_tuning, suggest, tuning_of

SOFT = Tuning(fusion=FusionSettings(method="masked", form="soft", rescale="mean"))
MERGE = Tuning(
    fusion=FusionSettings(method="masked", form="binary"),
    merge=MergeSettings(method="ties", scale=0.4, weights={"zh": 0.7}, layers={"*.mlp.*": 2.0}),
)
BOTH = Given(mask=True, unaligned=True)
MERGED = Given(finetunes=("zh", "hi"))
WIDE = {
    "method": ["masked", "interpolation", "resta", "lox", "safe_lora"],
    "form": ["soft", "binary"],
    "scale": {"low": 0.3, "high": 1.5},
    "threshold": {"low": -2, "high": 2},
    "temperature": {"low": 0.25, "high": 4, "log": True},
    "layers": {"*.mlp.*": {"low": 0, "high": 1.5}},
    "rounding": "stochastic",
    "output_dtype": ["bfloat16"],
}


def space_of(**given: Any) -> Space:
    return SweepSettings(space=given).space


def study() -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))


def test_a_candidate_has_the_keys_that_its_method_has_a_use_for_and_makes_settings() -> None:
    space = complete_space(space_of(**WIDE), BOTH, SOFT)
    own = {
        "interpolation": {"alpha"},
        "resta": {"gamma"},
        "lox": {"gamma", "rank"},
        "safe_lora": {"similarity"},
        "soft": {"form", "scale", "temperature", "layers.*.mlp.*"},
        "binary": {"form", "scale", "threshold", "layers.*.mlp.*"},
    }
    ran, seen = study(), set()
    for _ in range(80):
        candidate = suggest(space, ran.ask(), SOFT)
        kind = candidate.get("form", candidate["method"])
        seen.add(kind)
        assert set(candidate) == {"method", "rounding", "output_dtype"} | own[str(kind)]
        fusion = tuning_of(candidate, SOFT).fusion
        said = {key: value for key, value in candidate.items() if "." not in key}
        assert {key: getattr(fusion, key) for key in said} == said
        assert fusion.rescale == ("mean" if fusion.method == "masked" else "none")
        if fusion.method == "masked":
            assert fusion.layers == (("*.mlp.*", candidate["layers.*.mlp.*"]),)
    assert seen == set(own)


@pytest.mark.parametrize("log", [False, True])
def test_values_lie_in_their_range_and_whole_ones_are_whole(log: bool) -> None:
    space: Space = {"method": ("lox",), "rank": Range(low=2, high=9, log=log), "gamma": Range(low=0.5, high=0.5)}
    ran = study()
    drawn = [suggest(space, ran.ask(), SOFT) for _ in range(60)]
    assert {one["rank"] for one in drawn} == set(range(2, 10))
    assert all(type(one["rank"]) is int for one in drawn)
    assert {one["gamma"] for one in drawn} == {0.5}


def test_no_candidate_is_the_runs_own_settings() -> None:
    assert tuning_of({}, SOFT) == SOFT
    assert tuning_of({}, MERGE) == MERGE


def test_what_a_candidate_does_not_say_is_as_it_was_where_the_method_is_the_same() -> None:
    cold = Tuning(
        fusion=FusionSettings(method="masked", form="soft", temperature=0.5, scale=0.8, layers={"a": 2.0, "b": 3.0})
    )
    found = tuning_of({"form": "binary", "layers.b": 0.5}, cold).fusion
    assert found == FusionSettings(method="masked", form="binary", scale=0.8, layers={"b": 0.5, "a": 2.0})
    assert tuning_of({"method": "interpolation", "alpha": 0.3}, cold).fusion.model_dump(exclude_defaults=True) == {
        "method": "interpolation",
        "alpha": 0.3,
    }
    lowest = Tuning(fusion=FusionSettings(method="safe_lora", lowest=3))
    assert tuning_of({"similarity": 0.5}, lowest).fusion == FusionSettings(method="safe_lora", similarity=0.5)


def test_merges_are_tuned_beside_the_mask() -> None:
    found = tuning_of({"threshold": 0.5, "merge.density": 0.4, "merge.weights.hi": 0.9, "merge.layers.*": 1.5}, MERGE)
    assert found.fusion == FusionSettings(method="masked", form="binary", threshold=0.5)
    assert found.merge == MergeSettings(
        method="ties", scale=0.4, density=0.4, weights={"hi": 0.9, "zh": 0.7}, layers={"*": 1.5, "*.mlp.*": 2.0}
    )
    other = tuning_of({"merge.method": "task_arithmetic", "merge.scale": 0.5}, MERGE)
    assert other.merge == MergeSettings(method="task_arithmetic", scale=0.5)


def test_settings_that_do_not_fit_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"candidate \(method: resta, alpha: 1\): method resta has no use for alpha"):
        tuning_of({"method": "resta", "alpha": 1}, SOFT)


def test_the_runs_own_settings_are_a_candidate_where_the_space_has_them() -> None:
    space = complete_space(
        space_of(**{k: v for k, v in WIDE.items() if k not in ("rounding", "output_dtype")}), BOTH, SOFT
    )
    found = expressed(SOFT, space, SOFT)
    assert found == {"method": "masked", "form": "soft", "scale": 1.0, "temperature": 1.0, "layers.*.mlp.*": 1.0}
    assert same_tuning(tuning_of(found, SOFT), SOFT)
    assert not same_tuning(tuning_of({**found, "scale": 0.9}, SOFT), SOFT)
    assert expressed(SOFT, {**space, "scale": Range(low=1.1, high=2)}, SOFT) is None
    assert expressed(SOFT, {**space, "form": ("binary",)}, SOFT) is None
    merged = expressed(
        MERGE, {"merge.density": Range(low=0.1, high=1), "merge.weights.hi": Range(low=0, high=2)}, MERGE
    )
    assert merged == {"merge.density": 0.2, "merge.weights.hi": 1.0}
    assert expressed(MERGE, {"merge.weights.zh": Range(low=0.8, high=2)}, MERGE) is None


def test_whatever_is_suggested_is_found_again_by_its_settings_and_in_a_wider_space() -> None:
    space = complete_space(space_of(**WIDE), BOTH, SOFT)
    wider, narrower = {**space, "scale": Range(low=0.1, high=3)}, {**space, "scale": Range(low=0.9, high=1)}
    ran = study()
    outside = 0
    for _ in range(80):
        candidate = suggest(space, ran.ask(), SOFT)
        tuning = tuning_of(candidate, SOFT)
        assert expressed(tuning, space, SOFT) == candidate
        assert expressed(tuning, wider, SOFT) == candidate
        inside = expressed(tuning, narrower, SOFT)
        assert inside == (candidate if 0.9 <= float(candidate.get("scale", 1)) <= 1 else None)
        outside += inside is None
    assert 0 < outside < 80


@pytest.mark.parametrize(
    ("given", "there", "defaults"),
    [({}, Given(), SOFT), ({}, BOTH, SOFT), ({}, MERGED, MERGE), ({"method": ["masked", "lox"]}, BOTH, SOFT)],
)
def test_a_complete_space_is_one(given: dict[str, Any], there: Given, defaults: Tuning) -> None:
    space = complete_space(space_of(**given), there, defaults)
    assert space_problems(space, there, defaults) == []
    ran = study()
    methods = {tuning_of(suggest(space, ran.ask(), defaults), defaults).fusion.method for _ in range(30)}
    assert methods == set(space["method"])  # type: ignore[arg-type]


def test_without_a_mask_or_the_unaligned_model_nothing_needs_them() -> None:
    plain = Tuning(fusion=FusionSettings(method="interpolation", alpha=1.0))
    assert complete_space({}, Given(mask=False), plain) == {"method": ("interpolation",)}
    merge = Tuning(fusion=plain.fusion, merge=MergeSettings(method="task_arithmetic"))
    found = complete_space({}, Given(mask=False, finetunes=("zh", "hi")), merge)
    assert list(found) == ["method", "merge.scale", "merge.weights.zh", "merge.weights.hi"]


ONE_OF = (
    "method, alpha, form, gamma, layers.<pattern>, lowest, output_dtype, rank, rescale, rounding, safe_share, scale"
)


@pytest.mark.parametrize(
    ("given", "there", "defaults", "message"),
    [
        ({"lambda": [1]}, Given(), SOFT, f"space: no setting 'lambda' (there are {ONE_OF}"),
        ({"merge.scale": [1]}, Given(), SOFT, "'merge.scale' (merge.… is for mode: merge; there are"),
        ({"merge.weights.en": [1]}, MERGED, MERGE, "no setting 'merge.weights.en' (there are"),
        ({"method": ["soft"]}, Given(), SOFT, "space.method: 'soft': there are masked, interpolation, resta"),
        ({"method": ["random_mask"]}, Given(), SOFT, "space.method: 'random_mask': there are masked"),
        ({"form": {"low": 0, "high": 1}}, Given(), SOFT, "space.form: a range has no meaning; give a list of soft, binary"),
        ({"form": ["hard"]}, Given(), SOFT, "space.form: 'hard': there are soft, binary"),
        ({"scale": {"low": 0, "high": 1}}, Given(), SOFT, "space.scale: 0.0: Input should be greater than 0"),
        ({"scale": []}, Given(), SOFT, "space.scale: an empty list"),
        ({"scale": [1, 1]}, Given(), SOFT, "space.scale: a value stands in the list twice"),
        ({"method": ["lox"], "rank": {"low": 0.5, "high": 2}}, BOTH, SOFT, "space.rank: whole numbers only, not 0.5 … 2"),
        ({"merge.densities.zh": [1.5]}, MERGED, MERGE, "space.merge.densities.zh: 1.5: Input should be less"),
        ({"method": ["masked"]}, Given(mask=False), SOFT, "masked needs a trained mask, and this run trains none"),
        ({"method": ["resta"]}, Given(), SOFT, "resta needs `unaligned`"),
        ({"merge.method": ["slerp"]}, Given(finetunes=("a", "b", "c")), MERGE, "slerp is between two models, and 3 are merged"),
        ({"similarity": [0.1], "lowest": [2]}, BOTH, SOFT, "similarity and lowest say the same in two ways"),
        ({"threshold": [0.5]}, Given(), SOFT, "space.threshold: no candidate has a use for it, only those of masked with"),
        ({"alpha": [0.5]}, Given(), SOFT, "space.alpha: no candidate has a use for it, only those of interpolation"),
        ({"merge.aggregate": ["sum"], "merge.method": ["dare"]}, MERGED, MERGE, "only those of ties, dare_ties"),
    ],
)  # fmt: skip
def test_refused(given: dict[str, Any], there: Given, defaults: Tuning, message: str) -> None:
    problems = space_problems(space_of(**given), there, defaults)
    assert message in "; ".join(problems)


def test_every_option_is_a_key() -> None:
    keys = [key.replace("<pattern>", "*").replace("<finetune>", "zh") for key in options(MERGED)]
    assert "merge.weights.zh" in keys
    values: dict[str, Any] = {"form": "soft", "rescale": "mean", "rounding": "nearest", "output_dtype": "float32"}
    values |= {"merge.threshold": "model", "merge.aggregate": "sum", "method": "masked", "merge.method": "dare"}
    problems = space_problems(space_of(**{key: [values.get(key, 1)] for key in keys}), MERGED, MERGE)
    assert [p for p in problems if "two ways" not in p] == []
