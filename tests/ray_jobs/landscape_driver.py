"""What `test_landscape.py` runs in a process of its own: Ray reads its token when it is imported."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from components.checkpoints.reference import open_checkpoint
from components.checkpoints.source import TensorSource
from components.errors import RealignError
from components.evaluation.execution import EvaluationExecution
from components.evaluation.prompts import load_prompt_set
from components.evaluation.settings import EvaluationSettings, SetSettings
from components.landscape.points import Ask, Point
from components.landscape.schema import Mark
from components.landscape.settings import RandomAxis, Scan, TowardsAxis
from ray_jobs.actors import Place
from ray_jobs.landscape_trials import POINTS, Surveying, survey_points
from ray_jobs.submit import started_ray
from tests.ray_jobs.watching import Watching, holders, murder

SCANS = (
    Scan(name="grid", axes=(RandomAxis(), TowardsAxis(model="other")), points=3),
    Scan(name="fine", axes=(RandomAxis(seed=1),), directions=2, points=11, refine=0.02),
)


def weights(path: Path) -> TensorSource:
    return open_checkpoint(path).source


def surveying(directory: Path) -> Surveying:
    asked = load_prompt_set(SetSettings(name="asked", kind="harmful", path=directory / "asked.jsonl"))
    return Surveying(
        place=Place(directory / "taught"),
        sources={"other": functools.partial(weights, directory / "other")},
        scans=SCANS,
        sets=(asked,),
        settings=EvaluationSettings(max_new_tokens=16),
        batch_size=4,
    )


class Slow:
    """Stands for a model that takes a second over a point, and says which process has it."""

    def measure(self, ask: Ask, keep_going: Callable[[], None] | None = None) -> Point:
        time.sleep(1)
        hits = "".join("01"[k < 100 * abs(ask.at[0])] for k in range(40))
        return Point(ask.scan, ask.direction, ask.at, {"asked": {"asr": hits, "harmful": hits}}, seconds=os.getpid())

    def marks(self, scan: str, direction: int) -> list[Mark]:
        return []


class SlowSurveying(Surveying):
    def surveyor(self, device: str) -> Any:
        return Slow()


def rounds(directory: Path) -> list[int]:
    """How many points a refined scan has, and how many processes measured them."""
    one = surveying(directory)
    scan = Scan(name="fine", points=11, refine=1.0)
    slow = SlowSurveying(one.place, {}, (scan,), one.sets, one.settings, batch_size=1)
    points, _ = survey_points(slow, EvaluationExecution(actors=2), state_dir=directory / "rounds")
    return [len(points), len({point.seconds for point in points})]


class Marked(Slow):
    """Says which survey it is of."""

    def __init__(self, mark: int) -> None:
        self.mark = mark

    def measure(self, ask: Ask, keep_going: Callable[[], None] | None = None) -> Point:
        return replace(super().measure(ask), seconds=self.mark)


class MarkedSurveying(Surveying):
    def surveyor(self, device: str) -> Any:
        return Marked(self.batch_size)


def together(directory: Path) -> list[list[float]]:
    """Whose models measured each of two surveys that go on at once in one Ray, as those of a run's stages do."""
    import ray

    def one(mark: int) -> list[float]:
        asked = surveying(directory)
        scan = Scan(name="line", points=3)
        marked = MarkedSurveying(asked.place, {}, (scan,), asked.sets, asked.settings, batch_size=mark)
        state = directory / f"together {mark}"
        points, _ = survey_points(marked, EvaluationExecution(device="cpu", actors=2), state_dir=state)
        return sorted({point.seconds for point in points})

    task = ray.remote(one)
    found: list[list[float]] = ray.get([task.options(num_cpus=0).remote(mark) for mark in (1, 2)])
    return found


def survey(directory: Path, actors: int, state: str, *, losses: int = 0, **more: Any) -> dict[str, Any]:
    """Points without their times, and marks."""
    execution = EvaluationExecution(actors=actors, max_losses=losses, **more.pop("execution", {}))
    measured = survey_points(more.pop("asks", surveying(directory)), execution, state_dir=directory / state, **more)
    points = [replace(point, seconds=0.0).to_json() for point in measured[0]]
    marks = [[*line, found] for line, found in sorted(measured[1].items())]
    plain: dict[str, Any] = json.loads(json.dumps({"points": points, "marks": marks}))
    return plain


class TakenOverError(Exception):
    """What somebody who looks after a survey may raise."""


def left() -> int:
    """Actors that are still there after a while."""
    for _ in range(100):
        if not holders():
            break
        time.sleep(0.1)
    return len(holders())


def failed(directory: Path, state: str, **more: Any) -> list[Any]:
    """What two actors' survey ends with, and how soon."""
    started = time.monotonic()
    try:
        survey(directory, 2, state, **more)
    except (RealignError, TakenOverError) as error:
        return [type(error).__name__, str(error), time.monotonic() - started]
    except Exception as error:  # noqa: BLE001 - Ray's
        return [type(error).__name__, "", time.monotonic() - started]
    raise AssertionError("it went on")


def see(directory: Path) -> dict[str, Any]:
    killing = Watching(3, murder)
    seen: dict[str, Any] = {"two": survey(directory, 2, "two"), "rounds": rounds(directory)}
    seen["together"] = together(directory)
    before = (directory / "killed" / POINTS).read_text().count("\n")
    with (directory / "killed" / POINTS).open("a") as file:
        file.write('{"scan": "grid", "dir')  # what a process wrote when it was killed
    seen["resumed"] = survey(directory, 2, "killed", losses=1, progress=killing)
    seen["resumed told"] = [before, killing.told]
    seen["known"] = survey(directory, 2, "killed")
    seen["too many"] = failed(directory, "too many", progress=Watching(5, murder))
    absent = replace(surveying(directory), place=Place(directory / "absent"))
    seen["absent"] = failed(directory, "no model", asks=absent)
    long = replace(surveying(directory), settings=EvaluationSettings(max_new_tokens=4000))
    seen["long"] = failed(directory, "long", asks=long)

    def gone() -> None:
        raise TakenOverError("taken over")

    seen["gone"] = failed(directory, "gone", keep_going=gone)
    seen["no room"] = failed(directory, "no room", execution={"device": "cuda", "patience_s": 3})
    seen["left"] = left()
    seen["storage"] = sorted(p.name for p in directory.glob("*/tune*"))
    return seen


def main() -> None:
    directory, what = Path(sys.argv[1]), sys.argv[2]
    with started_ray(2):
        if what == "die":
            survey(
                directory, 2, "killed", progress=Watching(7, functools.partial(os.kill, os.getpid(), signal.SIGKILL))
            )
        print(json.dumps(see(directory)))


if __name__ == "__main__":
    main()
