"""`realign landscape` as it is typed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from components.errors import CheckpointError, ConfigError, DataError, RealignError
from components.evaluation.generate import load_model
from components.landscape.points import Point, read_points
from pipelines.evaluate_command import evaluate_command
from pipelines.evaluated_models import Runtime
from pipelines.landscape_axes import Options
from pipelines.landscape_command import landscape_command
from tests.components.evaluation import tiny

RUNTIME = Runtime(base=None, device="cpu", dtype="float32", batch_size=4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that refuses what is harmful, one that does not refuse any more, and what cannot lie beside them."""
    root = tmp_path_factory.mktemp("models")
    tiny.build_taught_model(root / "taught")
    model, tokenizer = load_model(root / "taught")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    model.save_pretrained(root / "broken")
    tokenizer.save_pretrained(root / "broken")
    shutil.copytree(root / "taught", root / "copy")
    wider = tiny.make_model(len(tokenizer) + 8)
    wider.save_pretrained(root / "wider")
    tokenizer.save_pretrained(root / "wider")
    return root


@pytest.fixture
def config(tmp_path: Path) -> Path:
    rows = {
        "harmful": [{"prompt": prompt} for prompt in tiny.HARMFUL],
        "benign": [{"prompt": prompt, "answer": answer} for prompt, answer in tiny.ANSWERED.items()],
    }
    for name, some in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    sets = [{"name": name, "kind": name, "path": f"{name}.jsonl"} for name in rows]
    data = {"name": "a run config", "evaluation": {"max_new_tokens": 40, "sets": sets}}
    (tmp_path / "realign.yaml").write_text(yaml.safe_dump(data))
    return tmp_path / "realign.yaml"


def result(out: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / name / "landscape.json").read_text())
    return found


def rates(scan: dict[str, Any], direction: int = 0) -> dict[tuple[float, ...], dict[str, Any]]:
    return {tuple(point["at"]): point["rates"] for point in scan["directions"][direction]["points"]}


def test_the_way_from_a_model_to_another(
    models: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [f"aligned={models / 'taught'}", str(models / "broken")]
    evaluate_command(places, config, tmp_path / "evaluated", RUNTIME)
    measured = json.loads((tmp_path / "evaluated" / "rates.json").read_text())
    capsys.readouterr()
    out = tmp_path / "out"
    options = Options(("random:2", "towards=broken"), points=5, prompts=None)
    landscape_command(places, config, out, options, RUNTIME, actors=1)
    told = capsys.readouterr()
    aligned = result(out, "aligned")
    # Where a landscape meets a model it says what evaluating that model says.
    found = rates(aligned["scans"]["towards-broken"])
    assert set(found) == {(-0.5,), (0.0,), (0.5,), (1.0,), (1.5,)}
    for at, name in ((0.0, "aligned"), (1.0, "broken")):
        for chosen, metric in (
            ("harmful", "asr"),
            ("harmful", "harmful"),
            ("benign", "over_refusal"),
            ("benign", "exact"),
        ):
            assert found[at,][chosen][metric] == measured[name]["sets"][chosen][metric]["value"], (at, chosen, metric)
    [mark] = aligned["scans"]["towards-broken"]["directions"][0]["marks"]
    assert mark["name"] == "broken"
    assert mark["at"] == pytest.approx([1.0])
    assert mark["off"] == pytest.approx(0.0, abs=1e-6)
    assert aligned["scans"]["random"]["numbers"]["*"]["asr"]["visage"]["n"] == 2
    assert set(result(out, "broken")["scans"]) == {"random"}  # it does not lead to itself
    visage = aligned["scans"]["random"]["numbers"]["*"]["asr"]["visage"]["value"]
    lines = told.out.splitlines()
    assert lines[0].split() == ["model", "scan", "VISAGE", "width", "depth", "area", "points"]
    assert lines[1].startswith("aligned  random ")
    assert f" {visage:.1f} (" in lines[1]
    assert lines[1].endswith(" 10")
    assert "aligned, towards-broken: broken lies at 1.00 (off by 0.00 of its distance)" in lines
    assert lines[-1].endswith(".html")
    assert all(Path(line).is_file() for line in lines[-4:])
    assert "broken: 10/10 points" in told.err
    assert not (out / ".state").exists()


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.xdist_group("run")
def test_a_killed_command_goes_on(models: Path, config: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "pipelines.cli", "landscape", f"aligned={models / 'taught'}", str(models / "broken"),
        "--config", str(config), "--axes", "random", "--axes", "towards=broken", "--points", "5", "--sets", "harmful",
        "--actors", "1",
    ]  # fmt: skip
    out = tmp_path / "out"
    with subprocess.Popen(
        [*command, "--out", str(out)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as killed:
        deadline = time.monotonic() + 240
        while len(known(out)) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(killed.pid, signal.SIGKILL)
    kept = known(out)
    assert 2 <= len(kept) < 10
    assert not (out / "aligned").exists()
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # What was known was not measured again: it took as long as it took then.
    found = {(p.ask, p.seconds) for p in read_points(out / "aligned" / "points.jsonl")}
    assert {(p.ask, p.seconds) for p in kept} <= found
    # And on two processes, never broken off, the same comes out.
    unbroken = tmp_path / "unbroken"
    again = subprocess.run([*command[:-1], "2", "--out", str(unbroken)], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    for name in ("aligned", "broken"):
        assert result(unbroken, name) == result(out, name)
        assert [hits(p) for p in read_points(unbroken / name / "points.jsonl")] == [
            hits(p) for p in read_points(out / name / "points.jsonl")
        ]


def known(out: Path) -> list[Point]:
    return [point for path in out.glob(".state/**/points.jsonl") for point in read_points(path)]


def hits(point: Point) -> Point:
    return replace(point, seconds=0.0)


def test_another_model_at_the_same_place_is_measured_anew(models: Path, config: Path, tmp_path: Path) -> None:
    place, out = tmp_path / "model", tmp_path / "out"
    options = Options(("random",), points=3)
    asr = []
    for name in ("taught", "broken"):
        shutil.copytree(models / name, place, dirs_exist_ok=True)
        landscape_command([f"m={place}"], config, out, options, RUNTIME, actors=1)
        asr.append(rates(result(out, "m")["scans"]["random"])[0.0,]["harmful"]["asr"])
    assert asr[0] == 0
    assert asr[1] > 0.5


@pytest.mark.parametrize(
    ("places", "options", "runtime", "error", "told"),
    [
        (["live=https://host/v1#chat", "taught"], Options(), {}, ConfigError, "a landscape moves a model's weights"),
        (["nowhere"], Options(), {}, ConfigError, "no directory with a model"),
        (["taught"], Options(("towards=nowhere",)), {}, ConfigError, "neither one of the models given (taught) nor"),
        (["taught"], Options(("towards=taught",)), {}, ConfigError, "every axis leads to the only model there is"),
        (["taught"], Options(sets="poems"), {}, ConfigError, "no test set poems (there: benign, harmful)"),
        (["taught"], Options(sets="benign"), {}, ConfigError, "none of kind harmful"),
        (
            ["taught", "wider"],
            Options(("random",)),
            {},
            CheckpointError,
            "wider and taught do not lie in one landscape",
        ),
        (
            ["taught", "copy"],
            Options(("towards=copy",), points=3),
            {},
            CheckpointError,
            "the axis towards copy has no length",
        ),
        (["taught"], Options(), {"device": "auto"}, ConfigError, "--device auto: points are measured on cpu or cuda"),
        (["taught"], Options(), {"devices": 2}, ConfigError, "--devices"),
        (["taught", "other/taught"], Options(), {}, ConfigError, "a name of its own"),
    ],
)
def test_bad_input_is_told_in_a_line(
    models: Path,
    config: Path,
    tmp_path: Path,
    places: list[str],
    options: Options,
    runtime: dict[str, Any],
    error: type[RealignError],
    told: str,
) -> None:
    given = [one if "://" in one else str(models / one) for one in places]
    with pytest.raises(error) as caught:
        landscape_command(given, config, tmp_path / "out", options, replace(RUNTIME, **runtime), actors=1)
    assert told in str(caught.value), caught.value
    assert len(str(caught.value).splitlines()) <= 2
    assert not list((tmp_path / "out").glob("*/landscape.json"))


def test_prompts_that_are_missing_are_told_before_a_model_is_loaded(models: Path, config: Path, tmp_path: Path) -> None:
    (tmp_path / "harmful.jsonl").write_text("")
    with pytest.raises(DataError, match="prompt set 'harmful' is empty"):
        landscape_command([str(models / "taught")], config, tmp_path / "out", Options(), RUNTIME, actors=1)
    (tmp_path / "harmful.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"no file .*harmful\.jsonl"):
        landscape_command([str(models / "taught")], config, tmp_path / "out", Options(), RUNTIME, actors=1)


def test_the_file_may_say_what_is_drawn(models: Path, config: Path, tmp_path: Path) -> None:
    section = {
        "limit": 2,
        "sets": ["harmful"],
        "scans": [{"name": "narrow", "points": 3, "axes": [{"kind": "random", "low": -0.1, "high": 0.1}]}],
    }
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"landscape": section}))
    landscape_command([f"m={models / 'taught'}"], config, tmp_path / "out", Options(), RUNTIME, actors=1)
    found = result(tmp_path / "out", "m")
    assert found["prompts"] == {"harmful": 2}
    assert set(rates(found["scans"]["narrow"])) == {(-0.1,), (0.0,), (0.1,)}
    section["scan"] = []
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"landscape": section}))
    with pytest.raises(ConfigError, match=r"landscape\.scan: unknown key \(did you mean 'scans'\?\)"):
        landscape_command([f"m={models / 'taught'}"], config, tmp_path / "out", Options(), RUNTIME, actors=1)


def test_tasks_of_lm_eval_are_asked_at_every_point(models: Path, config: Path, tmp_path: Path) -> None:
    rows = [
        {"premise": "greet me", "choice1": "x", "choice2": "q", "label": k % 2, "question": "cause"} for k in range(4)
    ]
    (tmp_path / "copa.jsonl").write_text("".join(json.dumps({**row, "idx": k}) + "\n" for k, row in enumerate(rows)))
    data = yaml.safe_load(config.read_text())
    data["evaluation"]["capability"] = {"tasks": [{"task": "copa", "path": "copa.jsonl"}]}
    config.write_text(yaml.safe_dump(data))
    options = Options(("random",), points=3, sets="harmful,copa")
    landscape_command([f"m={models / 'taught'}"], config, tmp_path / "out", options, RUNTIME, actors=1)
    points = read_points(tmp_path / "out" / "m" / "points.jsonl")
    assert [sorted(point.hits) for point in points] == [["copa", "harmful"]] * 3
    assert {point.hits["copa"]["task"] for point in points} <= {
        "0101",
        "1010",
    }  # one letter is likelier, whatever the label
    result = json.loads((tmp_path / "out" / "m" / "landscape.json").read_text())
    assert result["sets"] == {"harmful": "harmful", "copa": "task"}
    assert result["scans"]["random"]["directions"][0]["means"]["copa"]["task"] == pytest.approx(0.5)
