"""A landscape's points in one process and on Ray's actors: the same whoever measures them, whoever dies meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.components.evaluation import tiny
from tests.ray_jobs import landscape_driver

pytestmark = [pytest.mark.slow, pytest.mark.multiproc, pytest.mark.xdist_group("jobs")]


def _driver(directory: Path, what: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.ray_jobs.landscape_driver", str(directory), what]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What drivers of their own saw, the first of which was killed, and this process."""
    directory = tmp_path_factory.mktemp("landscape")
    tiny.build_taught_model(directory / "taught")
    _other_model(directory / "taught", directory / "other")
    asked = [f"{prompt}{' please' * i}" for i in range(4) for prompt in tiny.LESSONS]
    (directory / "asked.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in asked))
    killed = _driver(directory, "die")
    assert killed.returncode == -9, killed.stderr
    done = _driver(directory, "see")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["printed"] = done.stderr.splitlines() + done.stdout.splitlines()[:-1]
    found["here"] = landscape_driver.survey(directory, 1, "here")
    return found


def _other_model(model: Path, out: Path) -> None:
    """The model with noise, as far from it as half its length."""
    out.mkdir()
    for file in model.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    moved = {
        name: tensor + 0.5 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tensors.items()
    }
    save_file(moved, out / "model.safetensors", metadata={"format": "pt"})


def test_points_do_not_depend_on_who_measures_them(seen: dict[str, Any]) -> None:
    shares = {point["hits"]["asked"]["asr"].count("1") for point in seen["here"]["points"]}
    assert len(shares) > 3  # it is a landscape
    refined = [point["at"] for point in seen["here"]["points"] if point["scan"] == "fine"]
    assert len(refined) > 2 * 9  # more than one round
    assert seen["two"] == seen["here"]


def test_actors_keep_their_model_between_the_rounds_of_a_refined_scan(seen: dict[str, Any]) -> None:
    points, processes = seen["rounds"]
    assert points > 2 * 9  # more than one round
    assert processes == 2


def test_surveys_at_once_measure_their_own_models(seen: dict[str, Any]) -> None:
    assert seen["together"] == [[1], [2]]


def test_marks_come_with_the_points(seen: dict[str, Any]) -> None:
    marks = {(scan, direction): found for scan, direction, found in seen["here"]["marks"]}
    assert set(marks) == {("grid", 0), ("fine", 0), ("fine", 1)}
    [mark] = marks["grid", 0]
    assert mark["name"] == "other"
    assert mark["off"] < 1  # it lies in the plane but for what was orthogonalised away
    assert all(found[0]["off"] > 0.9 for line, found in marks.items() if line[0] == "fine")


def test_a_rerun_measures_what_is_missing_and_again_what_a_lost_actor_had(seen: dict[str, Any]) -> None:
    before, told = seen["resumed told"]
    assert before == 7
    # Of each line whose marks were still to come one point is measured again.
    assert len(seen["here"]["points"]) - before <= told <= len(seen["here"]["points"]) - before + 3
    assert seen["resumed"] == seen["known"] == seen["here"]


def test_more_losses_than_allowed_end_it(seen: dict[str, Any]) -> None:
    assert seen["too many"][0] == "ActorDiedError"


def test_errors_reach_the_user_as_they_are_and_at_once(seen: dict[str, Any]) -> None:
    kind, message, seconds = seen["absent"]
    assert kind == "CheckpointError"
    assert "absent: no directory with a model" in message
    assert seconds < 60
    kind, message, _ = seen["long"]
    assert kind == "EvaluationError"
    assert "prompt set 'asked'" in message
    kind, message, _ = seen["gone"]
    assert (kind, message) == ("TakenOverError", "taken over")


def test_actors_that_no_node_has_room_for_are_an_error_in_time(seen: dict[str, Any]) -> None:
    kind, message, seconds = seen["no room"]
    assert kind == "EvaluationError"
    assert "each needs 1 CPU and 1 GPU, the cluster has 2 CPUs, 0 GPUs" in message
    assert seconds < 30


def test_nothing_is_left_behind_and_nothing_is_printed(seen: dict[str, Any]) -> None:
    assert seen["left"] == 0
    assert seen["storage"] == []
    assert not [line for line in seen["printed"] if "A worker died" not in line]
