"""What `realign landscape` keeps in its --out and what of it goes, and how many processes measure."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.errors import ConfigError, EvaluationError, StorageError
from components.evaluation.judges.settings import ClassifierSettings, PhraseSettings
from components.evaluation.prompts import load_prompt_set
from components.evaluation.settings import EvaluationSettings, SetSettings
from components.landscape.points import Point, unscored_notes
from components.landscape.settings import Scan
from components.masks.memory import PROCESS_HOST
from components.storage import Workspace
from pipelines.config import load_config
from pipelines.driver import NodeState, RunState
from pipelines.evaluate_command import evaluate_command
from pipelines.evaluated_models import Named, Runtime, named_models
from pipelines.graph import expand
from pipelines.landscape_axes import Options
from pipelines.landscape_command import _checkpoint, _default_actors, landscape_command
from pipelines.landscape_files import forget, state_dir
from pipelines.roots import Roots
from pipelines.summary import failures
from ray_jobs.actors import Place
from ray_jobs.landscape_trials import Course, Surveying
from tests.components.evaluation import tiny
from tests.pipelines.test_config import place  # noqa: F401 - a fixture
from tests.pipelines.test_landscape_section import loaded as loaded_config
from tests.pipelines.test_landscape_section import with_landscape

RUNTIME = Runtime(base=None, device="cpu", dtype="float32", batch_size=4)
OPTIONS = Options(("random",), points=3)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_taught_model(tmp_path_factory.mktemp("model") / "taught")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "harmful.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in tiny.HARMFUL))
    sets = [{"name": "harmful", "kind": "harmful", "path": "harmful.jsonl"}]
    data = {"evaluation": {"max_new_tokens": 8, "sets": sets}}
    (tmp_path / "realign.yaml").write_text(yaml.safe_dump(data))
    return tmp_path / "realign.yaml"


def drawn(model: Path, config: Path, out: Path, runtime: Runtime = RUNTIME, options: Options = OPTIONS) -> None:
    landscape_command([f"m={model}"], config, out, options, runtime, actors=1)


def test_actors_are_as_many_as_the_memory_holds(taught: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _checkpoint(taught, None)
    numel = sum(model.source.spec(name).numel for name in model.source.names())

    def actors(memory: int, **more: Any) -> int:
        monkeypatch.setattr("components.limits.available_memory", lambda: memory)
        monkeypatch.setattr("components.limits.available_cpus", lambda: 64)
        return _default_actors(replace(RUNTIME, **more), [Scan()], model, EvaluationSettings(dtype="float32"))

    each = PROCESS_HOST + 2 * 4 * numel
    assert actors(1000 * each) == 21  # no more than points
    assert actors(3 * each) == 3
    assert actors(3 * each - 1) == 2
    assert actors(0) == 1
    assert actors(1000 * each, device="cuda") == 1


def test_state_is_of_this_code_these_models_and_this_judge(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = tmp_path / "guard"
    shutil.copytree(taught, guard)
    judge = ClassifierSettings(kind="classifier", model=str(guard), labels={"a": "complied"})
    models: list[Named] = named_models([str(taught)])
    first = state_dir(tmp_path, models, RUNTIME, judge)
    assert state_dir(tmp_path, models, RUNTIME, judge) == first
    assert state_dir(tmp_path, models, RUNTIME, PhraseSettings()) != first
    config = json.loads((guard / "config.json").read_text())
    (guard / "config.json").write_text(json.dumps({**config, "another": True}))
    second = state_dir(tmp_path, models, RUNTIME, judge)
    assert second != first
    monkeypatch.setattr("ray_jobs.stage.code_version", lambda: {"version": "of another day"})
    assert state_dir(tmp_path, models, RUNTIME, judge) != second


def test_what_only_touches_figures_keeps_the_points(tmp_path: Path) -> None:
    settings = EvaluationSettings()
    asked = Surveying(Place(tmp_path), {}, (Scan(points=3),), (), settings, batch_size=1)
    wider = settings.model_copy(update={"confidence": 0.8, "interval": "bootstrap"})
    assert replace(asked, settings=wider).identity == asked.identity
    assert replace(asked, settings=EvaluationSettings(max_new_tokens=9)).identity != asked.identity


def test_points_that_are_there_are_written_anew_whole(tmp_path: Path) -> None:
    (tmp_path / "harmful.jsonl").write_text(json.dumps({"prompt": "one"}) + "\n")
    one = load_prompt_set(SetSettings(name="harmful", kind="harmful", path=tmp_path / "harmful.jsonl"))
    asked = Surveying(Place(tmp_path), {}, (Scan(points=3),), (one,), EvaluationSettings(), batch_size=1)
    Course(asked, tmp_path)
    line = json.dumps(Point("random", 0, (0.5,), {"harmful": {"asr": "1"}}).to_json())
    (tmp_path / "points.jsonl").write_text(line + "\n" + line[:9])
    with (tmp_path / "points.jsonl").open() as held:
        Course(asked, tmp_path)
        assert held.read() == line + "\n" + line[:9]  # the old file was replaced, not written into
    assert (tmp_path / "points.jsonl").read_text() == line + "\n"


def test_an_earlier_runs_pictures_go_and_other_commands_states_stay(taught: Path, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "m").mkdir(parents=True)
    (out / "m" / "landscape.json").write_text(json.dumps({"scans": {"old": {}, "../elsewhere": {}}}))
    for name in ("old.png", "own.png"):
        (out / name).write_text("an earlier picture")
    other = out / ".state" / "another" / "points.jsonl"
    other.parent.mkdir(parents=True)
    other.write_text("")
    drawn(taught, config, out)
    assert sorted(p.name for p in out.iterdir()) == [".state", "landscape.html", "m", "own.png", "random.png"]
    assert list((out / ".state").iterdir()) == [other.parent]
    forget([other.parent])
    assert not (out / ".state").exists()
    # And before anything is measured: a run that fails leaves no picture of another.
    bad = config.with_name("bad.yaml")
    bad.write_text(config.read_text().replace("max_new_tokens: 8", "max_new_tokens: 4000"))
    with pytest.raises(EvaluationError, match="prompt set 'harmful'"):
        drawn(taught, bad, out)
    assert not {"landscape.html", "random.png"} & {p.name for p in out.iterdir()}


def test_an_out_that_cannot_be_is_told_in_a_line(taught: Path, config: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "m").write_text("a file")
    with pytest.raises(StorageError, match=r"cannot write .*out/m"):
        drawn(taught, config, tmp_path / "out")
    before = sorted(taught.iterdir())
    with pytest.raises(ConfigError, match=r"taught is a model's directory; give another directory"):
        landscape_command([str(taught)], config, taught.parent, OPTIONS, RUNTIME, actors=1)
    assert sorted(taught.iterdir()) == before


def test_a_model_without_a_tokenizer_takes_its_bases(taught: Path, config: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(taught, bare, ignore=shutil.ignore_patterns("*token*", "chat_template*"))
    runtime = replace(RUNTIME, base=taught)
    drawn(bare, config, tmp_path / "out", runtime)
    evaluate_command([f"m={bare}"], config, tmp_path / "evaluated", runtime)
    measured = json.loads((tmp_path / "evaluated" / "rates.json").read_text())["m"]["sets"]["harmful"]["asr"]["value"]
    points = json.loads((tmp_path / "out" / "m" / "landscape.json").read_text())
    [scan] = points["scans"]["random"]["directions"]
    assert {tuple(p["at"]): p["rates"]["harmful"]["asr"] for p in scan["points"]}[0.0,] == measured


def test_unscored_answers_are_counted_over_all_points() -> None:
    hits = [{"a": {"asr": "0110", "unscored": "0100"}, "b": {"asr": "11"}}, {"a": {"asr": "0000"}, "b": {"asr": "11"}}]
    points = [Point("random", 0, (float(k),), one) for k, one in enumerate(hits)]
    [line] = unscored_notes(points)
    assert line.startswith("a: 1 of 8 answers at all points together unscored")


def test_each_landscape_that_failed_is_told(place: Path) -> None:  # noqa: F811
    config = loaded_config(place, with_landscape(""))
    nodes = {node.id: NodeState(node) for node in expand(config)}
    for node in nodes.values():
        if node.node.step.name in ("landscape_before", "landscape"):
            node.status, node.error = "failed", {"type": "CheckpointError", "message": "it is broken"}
    run = RunState(config, Workspace(place / "workspace"), Roots({}, {}, {}), nodes)
    assert set(failures(run)) == {
        f"zh: a landscape is missing: {step}: it is broken" for step in ("landscape_before", "landscape")
    }


def test_a_judges_model_on_a_gpu_that_actors_do_not_have(place: Path) -> None:  # noqa: F811
    judge = "  judge: {kind: classifier, model: zh, labels: {a: complied}}\n"
    text = with_landscape("").replace("evaluation:\n", "evaluation:\n" + judge)
    refused = text + "execution: {judge: {device: cuda}, landscape: {actors: 2}}\n"
    (place / "realign.yaml").write_text(refused)
    with pytest.raises(
        ConfigError, match=r"execution\.judge\.device: cuda: every actor of execution\.landscape"
    ) as told:
        load_config(place / "realign.yaml")
    assert len(str(told.value).splitlines()) == 1
    for fine in ("actors: 2, device: cuda", "actors: 1"):
        loaded_config(place, refused.replace("actors: 2", fine))
    loaded_config(place, with_landscape("") + "execution: {judge: {device: cuda}, landscape: {actors: 2}}\n")
