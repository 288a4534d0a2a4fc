"""mergekit YAMLs as people write them, read into settings; and what has no counterpart refused by line and key."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.errors import ConfigError
from components.fusion.merge_settings import MergeSettings, merge_problems
from components.fusion.mergekit import read_recipe
from components.fusion.mergekit_parameters import first_match, parse_setting, patterned, positions, resolve
from components.fusion.mergekit_recipe import ModelReference

LAYERS = 5
NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(LAYERS) for part in ("self_attn.q_proj", "mlp.up_proj", "norm")),
    "model.norm.weight",
    "lm_head.weight",
]


def recipe(path: Path, text: str) -> Any:
    (path / "config.yml").write_text(text)
    return read_recipe(path / "config.yml")


def carried(found: Any) -> dict[str, Any]:
    """The settings of a recipe, which the merge itself takes."""
    settings: dict[str, Any] = found.settings(NAMES)
    assert merge_problems(MergeSettings(**settings), list(found.finetunes), NAMES) == []
    return settings


def refusal(path: Path, text: str, names: list[str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        recipe(path, text).settings(names or NAMES)
    return [line.removeprefix(f"{path}/config.yml:") for line in str(caught.value).splitlines()]


def value(factor: Any, name: str) -> float | None:
    return factor if isinstance(factor, float) else first_match(factor, name)


TIES = """
models:
  - model: base-org/llama-13b          # the base needs no parameters
  - model: orca/mini-13b
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: platypus/13b@v2
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: ./wizard/math/
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: base-org/llama-13b
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""


def test_a_ties_merge_with_gradients_and_filters(tmp_path: Path) -> None:
    found = recipe(tmp_path, TIES)
    assert found.aligned == ModelReference("base-org/llama-13b")
    assert {name: str(model) for name, model in found.finetunes.items()} == {
        "mini-13b": "orca/mini-13b", "13b": "platypus/13b@v2", "math": "./wizard/math/",
    }  # fmt: skip
    assert (found.output_dtype, found.vocabulary) == ("float16", "error")
    assert any("int8_mask" in note for note in found.notes)
    assert any("fp32" in note for note in found.notes)
    merge = carried(found)
    assert (merge["method"], merge["aggregate"], merge["scale"]) == ("ties", "mean", 1.0)
    assert merge["weights"]["mini-13b"] == 1.0
    assert merge["densities"]["13b"] == 0.5
    # Five layers: the middle one stands in the middle of the list, outside the layers the first number holds.
    densities = merge["densities"]["mini-13b"]
    assert [value(densities, f"model.layers.{i}.norm.weight") for i in range(5)] == pytest.approx(
        [1, 0.85, 0.7, 0.4, 0.1]
    )
    assert value(densities, "lm_head.weight") == 1.0
    weights = merge["weights"]["13b"]
    assert [value(weights, f"model.layers.{i}.mlp.up_proj.weight") for i in range(5)] == pytest.approx(
        [0, 0.225, 0.5, 0.775, 1]
    )
    assert merge["weights"]["math"] == {"model.layers.*.mlp.up_proj.weight": 0.5, "*": 0.0}


SLERP = """
slices:
  - sources:
      - model: a/first
        layer_range: [0, 5]
      - model: a/second
        layer_range: [0, 5]
merge_method: slerp
base_model: a/first
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
"""


def test_a_slerp_of_one_whole_slice(tmp_path: Path) -> None:
    found = recipe(tmp_path, SLERP)
    assert str(found.aligned) == "a/first"
    assert list(found.finetunes) == ["second"]
    merge = carried(found)
    assert merge.keys() == {"method", "t"}
    assert [value(merge["t"], f"model.layers.{i}.self_attn.q_proj.weight") for i in range(5)] == [0, 0.5, 0.3, 0.7, 1]
    assert [value(merge["t"], f"model.layers.{i}.mlp.up_proj.weight") for i in range(5)] == [1, 0.5, 0.7, 0.3, 0]
    assert {value(merge["t"], name) for name in NAMES if "norm" in name or "head" in name} == {0.5}
    short = refusal(tmp_path, SLERP, [name for name in NAMES if ".4." not in name])
    assert short == ["7: layer_range: [0, 5] of 4 layers; only whole models are merged here: give [0, 4]"]


def test_normalize_divides_the_weights_by_their_sum(tmp_path: Path) -> None:
    text = """
merge_method: task_arithmetic
base_model: base
models:
  - {model: one, parameters: {weight: 1.5}}
  - {model: two, parameters: {weight: [0.5, 2.5]}}
parameters: {normalize: true, lambda: 0.7}
dtype: float32
out_dtype: torch.bfloat16
"""
    merge = carried(recipe(tmp_path, text))
    assert merge["scale"] == 0.7
    for i, other in enumerate((0.5, 1.0, 1.5, 2.0, 2.5)):
        name = f"model.layers.{i}.norm.weight"
        assert value(merge["weights"]["one"], name) == pytest.approx(1.5 / (1.5 + other))
        assert value(merge["weights"]["two"], name) == pytest.approx(other / (1.5 + other))
    assert recipe(tmp_path, text).output_dtype == "bfloat16"
    plain = carried(recipe(tmp_path, text.replace("normalize: true, ", "")))
    assert plain["weights"]["one"] == 1.5
    opposite = "merge_method: task_arithmetic\nbase_model: b\nparameters: {normalize: true}\nmodels:\n"
    opposite += "".join(f"  - {{model: m{w}, parameters: {{weight: {w}}}}}\n" for w in (1, -1))
    assert carried(recipe(tmp_path, opposite))["weights"] == {"m1": 1.0, "m-1": -1.0}  # a sum of 0 is left alone


def test_linear_is_the_mean_of_all_its_models(tmp_path: Path) -> None:
    text = "merge_method: linear\nmodels:\n" + "".join(
        f"  - {{model: m{w}, parameters: {{weight: {w}}}}}\n" for w in (1, 2, 5)
    )
    found = recipe(tmp_path, text)
    assert str(found.aligned) == "m1"
    assert carried(found)["method"] == "task_arithmetic"
    assert carried(found)["weights"] == {"m2": 0.25, "m5": 0.625}
    # A base that is not in the list is merged too, with the weight that is for all.
    outside = recipe(tmp_path, text + "base_model: b\nparameters: {weight: 2}\n")
    assert carried(outside)["weights"] == {"m1": 0.1, "m2": 0.2, "m5": 0.5}
    missing = refusal(tmp_path, text + "base_model: b\n")
    assert len(missing) == 1
    assert missing[0].startswith(
        "1: b has no weight for 18 of 18 tensors (first model.embed_tokens.weight); give it one"
    )
    assert "sum to 8" in refusal(tmp_path, text + "parameters: {normalize: false}\n")[0]
    assert "sum to zero" in refusal(tmp_path, text.replace("weight: 1", "weight: -7"))[0]


@pytest.mark.parametrize(("rescale", "weight"), [("true", 0.5), ("false", 0.3)])
def test_dare_without_rescale_is_a_smaller_weight(tmp_path: Path, rescale: str, weight: float) -> None:
    text = f"""
merge_method: dare_linear
base_model: base
models: [{{model: one}}, {{model: base+lora/one}}]
parameters: {{weight: 0.5, density: 0.6, rescale: {rescale}}}
tokenizer: {{source: union}}
"""
    found = recipe(tmp_path, text)
    assert carried(found) == {
        "method": "dare", "scale": 1.0, "density": 0.6, "weights": {"one": weight, "one-2": weight},
    }  # fmt: skip
    assert found.finetunes["one-2"] == ModelReference("base", "lora/one")
    assert found.vocabulary == "pad"


def test_names_are_the_last_parts_of_references_made_unique(tmp_path: Path) -> None:
    models = "[{model: here/x}, {model: there/x@main}, {model: runs/safe/}, {model: 'a b/ü !'}, {model: ./...}]"
    found = recipe(tmp_path, f"merge_method: ties\nbase_model: b\nparameters: {{weight: 1}}\nmodels: {models}\n")
    assert list(found.finetunes) == ["x", "x-2", "safe-2", "ü", "model"]
    assert list(carried(found)["weights"]) == list(found.finetunes)


def test_dare_ties_sums_as_mergekit_does(tmp_path: Path) -> None:
    text = "merge_method: dare_ties\nbase_model: b\nmodels: [{model: one}, {model: two}]\n"
    found = recipe(tmp_path, text + "parameters: {weight: 1e-1, lambda: [0.5, 1]}\ntokenizer_source: base\n")
    merge = carried(found)
    assert (merge["method"], merge["aggregate"], merge["density"]) == ("dare_ties", "sum", 1.0)
    assert merge["weights"] == {"one": 0.1, "two": 0.1}
    assert "scale" not in merge
    assert value(merge["layers"], "model.layers.4.norm.weight") == 1.0
    assert value(merge["layers"], "lm_head.weight") == 0.5
    assert found.vocabulary == "truncate"


def test_everything_that_cannot_be_carried_over_is_said_at_once(tmp_path: Path) -> None:
    found = refusal(
        tmp_path,
        """merge_method: ties
base_model: base
models:
  - model: one
    parameters:
      wieght: 1
      normalize: true
  - model: one
    parameters: {weight: [0.1, oops]}
  - model: a+b+c
parameters:
  rescale: true
  epsilon: 0.1
  density: []
dtype: float64
chat_template: auto
tokeniser: base
tokenizer: {source: one, tokens: {x: {source: base}}}
""",
    )
    assert [line.split(":")[0] for line in found] == [
        "6",
        "7",
        "8",
        "9",
        "10",
        "12",
        "13",
        "14",
        "15",
        "16",
        "17",
        "18",
        "18",
    ]
    text = "\n".join(found)
    for part in (
        "models.0.parameters.wieght: ties has no such parameter",
        "models.0.parameters.normalize: has no effect under a model",
        "one is given twice",
        "not a number: 'oops'",
        "'a+b+c' is no `model` and no `model+adapter`",
        "ties keeps the largest as they are",
        "parameters.epsilon: ties has no such parameter",
        "an empty list",
        "float64 cannot be written",
        "chat_template: the chat template that belongs",
        "tokeniser: did you mean 'tokenizer'?",
        "tokenizer.tokens: rows are not moved",
        "not another model's",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("merge_method: della\nbase_model: b\nmodels: [{model: a}]", "della is mergekit's only; both have linear"),
        ("base_model: b\nmodels: [{model: a}]", "merge_method: missing"),
        ("merge_method: ties\nmodels: [{model: a}]\nparameters: {weight: 1}", "base_model is missing"),
        ("merge_method: ties\nbase_model: b\nmodels: [{model: b}]", "nothing to merge"),
        ("merge_method: ties\nbase_model: b\nmodels: [{model: a}]", "1: a has no weight for 18 of 18 tensors"),
        ("merge_method: ties\nbase_model: b", "give models, or one slice"),
        ("merge_method: ties\nbase_model: b\nmodules: {text: {}}", "several modules"),
        ("merge_method: ties\nbase_model: b\nmodels: {model: a}", "a list of mappings"),
        ("merge_method: ties\nbase_model: b\nmodels: [{model: {path: a}}]", "write the model as text"),
        ("merge_method: ties\nbase_model: b\nmodels: [{model: a}]\nparameters: [1]", "a mapping of parameters"),
        ("merge_method: ties\nbase_model: b\nmodels: [{model: a}]\nparameters: {normalize: [true]}", "true or false"),
        (
            "merge_method: ties\nbase_model: b\nmodels: [{model: a}]\nparameters: {weight: -1}",
            "negative weight under normalize",
        ),
        (
            "merge_method: ties\nbase_model: b\nmodels: [{model: a}]\nparameters: {weight: 1, density: 0}",
            "density of 0",
        ),
        (
            "merge_method: ties\nbase_model: b\nmodels: [{model: a}]\nparameters: {weight: 1, lambda: -1}",
            "lambda is -1",
        ),
        (
            "merge_method: dare_ties\nbase_model: b\nmodels: [{model: a}]\nparameters: {rescale: false}",
            "always makes up",
        ),
        (
            "merge_method: slerp\nbase_model: b\nmodels: [{model: a}, {model: c}]\nparameters: {t: 0.5}",
            "there are 2 others",
        ),
        ("merge_method: slerp\nbase_model: b\nmodels: [{model: a}]\nparameters: {t: 1.5}", "outside 0 … 1"),
        (
            "merge_method: slerp\nbase_model: b\nmodels: [{model: a}]\nparameters: {t: [{filter: mlp, value: 1}]}",
            "t says nothing of 13 of 18 tensors",
        ),
        (
            "merge_method: slerp\nbase_model: b\nslices: [{sources: [{model: a, layer_range: [2, 5]}]}]",
            "slices.0.sources.0.layer_range: give [0, number of layers]",
        ),
        (
            "merge_method: ties\nbase_model: b\nslices: [{sources: [{model: a, layer_range: [0, 2]}]}, {sources: []}]",
            "2 slices make a model of other layers",
        ),
        ("- a", "a mergekit config is a mapping"),
    ],
)
def test_each_refusal_has_its_reason(tmp_path: Path, text: str, reason: str) -> None:
    assert reason in "\n".join(refusal(tmp_path, text))


numbers = st.sampled_from([0.0, 0.25, 0.5, 1.0])


@given(st.lists(numbers, min_size=len(NAMES), max_size=len(NAMES)))
@settings(max_examples=100, deadline=None)
def test_patterns_say_the_same_as_the_values_they_are_made_of(values: list[float]) -> None:
    wanted = dict(zip(NAMES, values, strict=True))
    found = patterned(wanted)
    assert {name: value(found, name) for name in NAMES} == wanted


def test_a_star_that_would_catch_another_tensor_is_not_used() -> None:
    wanted = {"m.0.mlp.w": 1.0, "m.1.mlp.w": 1.0, "m.0.expert.mlp.w": 2.0, "m.1.expert.mlp.w": 3.0, "x": 2.0, "y": 2.0}
    found = patterned(wanted)
    assert {name: value(found, name) for name in wanted} == wanted


@given(st.lists(st.tuples(st.sampled_from([None, "*", "mlp", "layers.1.", "weight", "zzz"]), st.lists(numbers, min_size=1,
       max_size=4)), min_size=1, max_size=4))  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_conditions_are_worked_out_one_tensor_at_a_time(conditions: list[tuple[str | None, list[float]]]) -> None:
    """Against a loop that reads the rules off one by one, in exact places of the list."""
    setting = parse_setting([{"filter": f, "value": v if len(v) > 1 else v[0]} for f, v in conditions])
    found = resolve([setting], positions(NAMES))
    for name in NAMES:
        parts = name.split(".")
        layer = int(parts[2]) if parts[1] == "layers" else 0
        wanted = None
        for only, values in conditions:
            if only in (None, "*") or only in name:
                whole, rest = divmod(layer * (len(values) - 1), LAYERS - 1)
                after = values[min(whole + 1, len(values) - 1)]
                wanted = values[whole] + (after - values[whole]) * rest / (LAYERS - 1)
                break
        assert (name in found) == (wanted is not None)
        assert wanted is None or found[name] == pytest.approx(wanted)


def test_a_model_of_one_layer_takes_the_end_of_a_gradient() -> None:
    assert positions(["model.layers.0.w", "head"]) == {"model.layers.0.w": 1.0, "head": 0.0}


def test_reading_a_recipe_needs_no_torch() -> None:
    code = "import sys, components.fusion.mergekit; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
