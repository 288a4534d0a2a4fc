"""The section `landscape`: what it refuses, with line and remedy, and which stages a run has for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.config import RunConfig, load_config
from pipelines.graph import expand
from pipelines.roots import Roots
from pipelines.specs import build_spec, sets_asked
from tests.pipelines.test_config import GOOD, place, problems  # noqa: F401 - a fixture
from tests.pipelines.test_graph import merging

TOWARDS = "scans: [{name: a, axes: [{kind: towards, model: %s}]}]"


def with_landscape(body: str, *, gate: str = "") -> str:
    return GOOD + f"landscape: {{{body}}}\n" + (f"gate: [{gate}]\n" if gate else "")


def loaded(place: Path, text: str) -> RunConfig:  # noqa: F811
    (place / "realign.yaml").write_text(text)
    return load_config(place / "realign.yaml")


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (TOWARDS % "zh", "scan a leads to zh; in a run an axis leads to aligned, finetune, realigned, unaligned"),
        (TOWARDS % "unaligned", "scan a needs `unaligned`, the model that the aligned one was made from"),
        (
            "models: [finetune], " + TOWARDS % "realigned",
            "scan a leads to realigned and is drawn of none of the models finetune",
        ),
        ("models: [aligned], " + TOWARDS % "aligned", "a model is not drawn towards itself"),
        ("sets: [harmful, poems]", "landscape.sets: no test set poems (there: harmful, zh)"),
        ("sets: [zh]", "landscape.sets: none of kind harmful"),
        ("models: [aligned, zh]", "landscape.models.1: Input should be 'aligned', 'finetune' or 'realigned'"),
        ("models: []", "landscape.models: Tuple should have at least 1 item"),
        ("scans: [{axes: [{kind: random, lwo: 1}]}]", "unknown key (did you mean 'low'?)"),
        ("scans: [{axes: [{kind: random, low: 1}]}]", "an axis goes from low to high, not from 1 to 0.5"),
        ("scans: [{axis: []}]", "landscape.scans.0.axis: unknown key (did you mean 'axes'?)"),
        ("scans: [{points: 2}]", "greater than or equal to 3"),
        ("limit: 0", "greater than or equal to 1"),
        ("scans: [{}, {}]", "scans with the same name: random; rename one"),
    ],
)
def test_each_mistake_has_its_remedy(place: Path, body: str, told: str) -> None:  # noqa: F811
    found = problems(place, with_landscape(body))
    assert any(told in line for line in found), found


@pytest.mark.parametrize(
    ("body", "gate", "told"),
    [
        ("models: [aligned]", "{metric: visage, at_least: 60}", "needs landscape.models with realigned"),
        (
            "models: [realigned]",
            "{metric: visage, at_least: 0, than: finetune}",
            "needs landscape.models with finetune",
        ),
        (TOWARDS % "finetune", "{metric: visage, at_least: 60}", "gate: visage needs a scan of random axes"),
        ("", "{metric: visage, set: zh, at_least: 60}", "the landscape asks no harmful set zh (it asks harmful)"),
        ("", "{metric: visage, at_least: 101}", "a bound lies between 0 and 100, not 101"),
        ("", "{metric: visage, at_least: 0, than: serving}", "no landscape of serving is kept"),
    ],
)
def test_a_visage_gate_that_nothing_would_meet(place: Path, body: str, gate: str, told: str) -> None:  # noqa: F811
    found = problems(place, with_landscape(body, gate=gate))
    assert any(told in line for line in found), found


def test_visage_without_a_landscape_and_merges_with_one_are_refused(place: Path) -> None:  # noqa: F811
    assert (
        "visage needs the section `landscape`" in problems(place, GOOD + "gate: [{metric: visage, at_least: 9}]\n")[0]
    )
    assert "mode: merge: remove landscape" in problems(place, merging(place) + "landscape: {}\n")[0]


def test_tasks_of_lm_eval_are_asked_where_they_are_named(place: Path) -> None:  # noqa: F811
    def written(body: str) -> RunConfig:
        text = with_landscape(body).replace(
            "evaluation:\n", "evaluation:\n  capability: {tasks: [{task: copa, path: zh.jsonl}]}\n"
        )
        return loaded(place, text)

    named, unnamed = written("sets: [harmful, copa]"), written("")
    for config, asked in ((named, ["copa"]), (unnamed, [])):
        assert config.landscape is not None
        chosen = config.landscape.capability_of(config.evaluation.capability)
        assert [task.name for task in chosen.tasks] == asked if chosen is not None else asked == []
        assert "copa" not in [one.name for one in config.landscape.sets_of(config.evaluation.sets, whose="zh")]


def drawn(config: RunConfig) -> dict[str, dict[str, str]]:
    """Landscape nodes -> their parents."""
    return {node.id: dict(node.parents) for node in expand(config) if node.step.stage == "landscape"}


def test_each_model_is_drawn_where_its_axes_lead_somewhere(place: Path) -> None:  # noqa: F811
    assert set(drawn(loaded(place, with_landscape("")))) == {"landscape_aligned", "zh/landscape_before", "zh/landscape"}
    chosen = {"fuse_soft", "fuse_binary", "evaluate_soft", "evaluate_binary"}
    found = drawn(loaded(place, with_landscape("scans: [{}, {name: b, axes: [{kind: towards, model: finetune}]}]")))
    assert set(found) == {"landscape_aligned", "zh/landscape_before", "zh/landscape_between", "zh/landscape"}
    assert found["landscape_aligned"] == {"load_aligned": "load_aligned"}
    assert found["zh/landscape_before"] == {"load_aligned": "load_aligned", "load": "zh/load"}
    assert set(found["zh/landscape_between"]) == {"load_aligned", "load", *chosen}
    assert found["zh/landscape"]["fuse_soft"] == "zh/fuse_soft"
    assert set(drawn(loaded(place, with_landscape("models: [realigned]")))) == {"zh/landscape"}
    assert drawn(loaded(place, GOOD)) == {}


def test_the_unaligned_model_is_loaded_for_axes_that_lead_to_it(place: Path) -> None:  # noqa: F811
    text = with_landscape(TOWARDS % "unaligned").replace("aligned: aligned\n", "aligned: aligned\nunaligned: zh\n", 1)
    config = loaded(place, text)
    assert config.needs_unaligned
    assert "load_unaligned" in {node.id for node in expand(config)}
    assert all(parents["load_unaligned"] == "load_unaligned" for parents in drawn(config).values())
    # With a control that needs it, landscapes that do not lead there stay what they were.
    resta = text.replace(TOWARDS % "unaligned", "").replace("mask:\n", "fusion: {controls: [resta]}\nmask:\n", 1)
    assert all("load_unaligned" not in parents for parents in drawn(loaded(place, resta)).values())


def test_what_decides_a_landscape_is_in_its_spec(place: Path) -> None:  # noqa: F811
    text = with_landscape(
        "limit: 7, scans: [{directions: 2}, {name: b, axes: [{kind: towards, model: finetune}], refine: 2}]"
    )
    config = loaded(place, text + "execution: {landscape: {actors: 3}}\n")
    roots = Roots(models={}, errors={}, files={str(s.path): "0" for s in config.evaluation.sets})
    nodes = {node.id: node for node in expand(config)}
    specs = {
        name: build_spec(nodes[name], config=config, roots=roots, parents={}, workspace=place) for name in drawn(config)
    }
    scans = {name: [one["name"] for one in spec.semantics["landscape"]["scans"]] for name, spec in specs.items()}
    assert scans == {
        "landscape_aligned": ["random"], "zh/landscape_before": ["random"], "zh/landscape_between": ["b"],
        "zh/landscape": ["random", "b"],
    }  # fmt: skip
    # The aligned model has no task of its own.
    assert [s.name for s in sets_asked(nodes["landscape_aligned"], config)] == ["harmful"]
    assert [s.name for s in sets_asked(nodes["zh/landscape"], config)] == ["harmful", "zh"]
    spec = specs["zh/landscape"]
    assert (spec.semantics["landscape"]["limit"], spec.semantics["landscape"]["sets"]) == (7, ["harmful", "zh"])
    assert (spec.semantics["variant"], spec.semantics["select"]) == ("realigned", "auto")
    assert spec.execution["spread"] == 3
    again = build_spec(nodes["zh/landscape"], config=loaded(place, text), roots=roots, parents={}, workspace=place)
    assert again.fingerprint == spec.fingerprint  # actors change no result
