"""Prompts over Ray actors: the same verdicts whoever answers, also when one of them dies; errors that a user can read."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from components.evaluation.evaluate import evaluate
from components.evaluation.prompts import load_prompt_set
from components.evaluation.settings import EvaluationSettings, SetSettings
from ray_jobs.actors import Place, loaded
from tests.components.evaluation import tiny

pytestmark = [pytest.mark.multiproc, pytest.mark.xdist_group("jobs")]

DRIVER = """
import json, os, signal, sys, time
from contextlib import closing
from pathlib import Path
import psutil
from components.errors import RealignError
from components.evaluation.evaluate import evaluate
from components.evaluation.execution import EvaluationExecution
from components.evaluation.prompts import load_prompt_set
from components.evaluation.settings import EvaluationSettings, SetSettings
from ray_jobs.actors import Actors, Place
from ray_jobs.submit import started_ray

model, prompts, state = map(Path, sys.argv[1:])
sets = [load_prompt_set(SetSettings(name="asked", kind="harmful", path=prompts))]
settings = EvaluationSettings(max_new_tokens=24)
holders = lambda: [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::_Holder")]
seen = {}

def answers(answerer, **more):
    result = evaluate(answerer, sets=sets, settings=settings, **more)
    return [[o.id, o.answer, o.verdict, o.end] for o in result.outcomes["asked"]]

def actors(number, place=model, losses=0):
    execution = EvaluationExecution(actors=number, max_losses=losses)
    return closing(Actors(Place(place), execution, dtype="float32", batch_size=4, threads=1))

class Gone(Exception): pass

def interrupt(told):
    if told["done"] >= 40:
        seen["interrupted"] = told["done"]
        raise Gone

def murder():
    "Kills one actor while answers are still owed."
    killed = []
    def kill(told):
        if not killed:
            os.kill(holders()[0].pid, signal.SIGKILL)
            killed.append(told["done"])
            seen["killed"] = told["done"]
    return kill

with started_ray(4):
    for number in (1, 4):
        with actors(number) as model_on:
            seen[str(number)] = answers(model_on)
            if number == 1:
                seen["on one"] = model_on.on_one(lambda model: type(model).__name__)
    with actors(2, losses=1) as model_on:
        try:
            answers(model_on, progress=interrupt, state_dir=state)
        except Gone:
            pass
        told = []
        seen["2"] = answers(model_on, state_dir=state, progress=lambda now: told.append(now["done"]))
        seen["first told"] = told[0]
        seen["after a death"] = answers(model_on, progress=murder())
        try:
            answers(model_on, progress=murder())
        except Exception as error:
            seen["too many"] = type(error).__name__
    try:
        with actors(1, model / "absent") as model_on:
            answers(model_on)
    except RealignError as error:
        seen["absent"] = [type(error).__name__, str(error)]
    calls = []
    big = EvaluationExecution(actors=1, device="cuda", patience_s=3)
    with closing(Actors(Place(model), big, dtype="float32", batch_size=4, threads=99)) as model_on:
        try:
            answers(model_on, keep_going=lambda: calls.append(1))
        except RealignError as error:
            seen["no room"] = [type(error).__name__, str(error), len(calls)]
    for _ in range(50):
        time.sleep(0.1)
        seen["left over"] = len(holders())
        if not holders():
            break
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a driver of its own saw: Ray reads its token when it is imported."""
    directory = tmp_path_factory.mktemp("actors")
    taught = tiny.build_taught_model(directory / "taught")
    asked = [f"{prompt}{' please' * (i % 3)}" for i in range(15) for prompt in tiny.LESSONS]
    (directory / "asked.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in asked))
    (directory / "driver.py").write_text(DRIVER)
    command = [sys.executable, str(directory / "driver.py"), str(taught), str(directory / "asked.jsonl")]
    done = subprocess.run([*command, str(directory / "state")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    one = load_prompt_set(SetSettings(name="asked", kind="harmful", path=directory / "asked.jsonl"))
    alone = loaded(Place(taught), "cpu", "float32", 4)
    result = evaluate(alone, sets=[one], settings=EvaluationSettings(max_new_tokens=24))
    found["here"] = [[o.id, o.answer, o.verdict, o.end] for o in result.outcomes["asked"]]
    return found


def test_answers_do_not_depend_on_the_number_of_actors(seen: dict[str, Any]) -> None:
    assert {verdict for _, _, verdict, _ in seen["here"]} >= {"refused", "complied"}
    assert seen["1"] == seen["4"] == seen["here"]


def test_the_prompts_of_a_lost_actor_are_asked_again(seen: dict[str, Any]) -> None:
    assert 0 < seen["killed"] < len(seen["here"])
    assert seen["after a death"] == seen["here"]


def test_a_rerun_asks_what_is_missing(seen: dict[str, Any]) -> None:
    assert 40 <= seen["interrupted"] < len(seen["here"])
    assert seen["first told"] > seen["interrupted"]
    assert seen["2"] == seen["here"]


def test_errors_reach_the_user_as_they_are(seen: dict[str, Any]) -> None:
    kind, message = seen["absent"]
    assert kind == "CheckpointError"
    assert "absent" in message


def test_actors_that_no_node_has_room_for_are_an_error_in_time(seen: dict[str, Any]) -> None:
    kind, message, calls = seen["no room"]
    assert kind == "EvaluationError"
    assert "each needs 4 CPUs and 1 GPU, the cluster has 4 CPUs, 0 GPUs" in message
    assert calls >= 2  # a lease is looked after meanwhile


def test_one_actor_can_be_given_other_work(seen: dict[str, Any]) -> None:
    assert seen["on one"] == "InProcess"


def test_more_losses_than_allowed_end_it(seen: dict[str, Any]) -> None:
    assert seen["too many"] == "ActorDiedError"
    assert seen["left over"] == 0
