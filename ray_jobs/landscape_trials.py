"""The points of a landscape, measured in this process or as Ray Tune's trials, and kept as they come."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.evaluation.capability.settings import CapabilitySettings
from components.evaluation.execution import EvaluationExecution
from components.evaluation.judges import make_judge
from components.evaluation.judges.settings import JudgeExecution
from components.evaluation.outcomes import NamedSet
from components.evaluation.prompts import PromptSet
from components.evaluation.settings import EvaluationSettings
from components.landscape.points import Ask, Point, points_text, read_points
from components.landscape.schema import Mark
from components.landscape.settings import Scan
from components.landscape.survey import Survey
from components.storage import Progress, storage_errors, write_atomic
from ray_jobs.actors import Place, loaded
from ray_jobs.tasks import KeepGoing, do_tasks

if TYPE_CHECKING:
    from components.checkpoints.source import TensorSource
    from components.evaluation.capability.tasks import LoadedTask
    from components.landscape.measuring import Surveyor

Line = tuple[str, int]
"""A scan's name and which of its directions."""
POINTS = "points.jsonl"
_MARKS, _ASKED = "marks.jsonl", "asked.json"


@dataclass(frozen=True)
class Surveying:
    """All that a process needs to measure points of a model; may be sent to other processes."""

    place: Place
    sources: Mapping[str, Callable[[], TensorSource]]
    """Other models, by the names that axes and marks have for them: what opens their weights, in whichever process."""
    scans: tuple[Scan, ...]
    sets: tuple[PromptSet, ...]
    settings: EvaluationSettings
    batch_size: int
    threads: int = 1
    judging: JudgeExecution = field(default_factory=JudgeExecution)
    capability: CapabilitySettings | None = None
    """Tasks of lm_eval that are asked at every point, too."""

    @property
    def measured(self) -> tuple[NamedSet, ...]:
        """All that a point says something of."""
        return (*self.sets, *(self.capability.tasks if self.capability is not None else ()))

    def surveyor(self, device: str) -> Surveyor:
        """The model, loaded; this process computes as every other one does. Raises CheckpointError, EvaluationError."""
        import torch

        from components.landscape.measuring import Surveyor

        torch.set_num_threads(self.threads)
        torch.use_deterministic_algorithms(device == "cpu")
        model = loaded(self.place, device, self.settings.dtype, self.batch_size)
        return Surveyor(
            model,
            scans=self.scans,
            sources={name: source() for name, source in self.sources.items()},
            sets=self.sets,
            settings=self.settings,
            judge=make_judge(self.settings.judge, self.judging),
            tasks=self._tasks(),
            capability=self.capability,
        )

    def _tasks(self) -> list[LoadedTask]:
        if self.capability is None:
            return []
        from components.evaluation.capability.tasks import load_tasks

        return load_tasks(self.capability)

    @property
    def identity(self) -> str:
        """Of what is asked, as far as it can be told without reading weights."""
        asked = [
            asdict(self.place),
            sorted(self.sources),
            [scan.model_dump(mode="json") for scan in self.scans],
            [[one.name, one.kind, one.counts, [prompt.fingerprint for prompt in one.prompts]] for one in self.sets],
            self.settings.model_dump(mode="json", exclude={"sets", "confidence", "interval"}),
            self.capability and self.capability.model_dump(mode="json"),
        ]
        return hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest()


def shortened(sets: Sequence[PromptSet], limit: int | None) -> tuple[PromptSet, ...]:
    """Of each set only so many prompts."""
    return tuple(replace(one, prompts=one.prompts[:limit]) for one in sets)


@dataclass(frozen=True)
class Task:
    """A point to measure, and whether to say where other models lie on its line or plane."""

    ask: Ask
    marks: bool

    def do(self, surveyor: Surveyor, keep_going: KeepGoing | None = None) -> dict[str, Any]:
        """What was found, as JSON."""
        marks = surveyor.marks(self.ask.scan, self.ask.direction) if self.marks else None
        return {"point": surveyor.measure(self.ask, keep_going).to_json(), "marks": marks}


class Course:
    """A survey and what is known of it on disk, of which nothing is asked twice.

    Everything found is added to files in `state_dir` as it comes; what these say of anything else than is asked now is dropped.
    """

    def __init__(self, surveying: Surveying, state_dir: Path, progress: Progress | None = None) -> None:
        self.state_dir, self._progress = state_dir, progress
        self._names = bool(surveying.sources)
        with storage_errors(state_dir):
            state_dir.mkdir(parents=True, exist_ok=True)
            points, self.marks = self._restored(surveying.identity)
        self.survey = Survey(surveying.scans, sets=surveying.measured, known=points)
        self._marking: set[Line] = set()

    @property
    def finished(self) -> bool:
        """Whether every point is there."""
        return self.survey.finished

    def next(self) -> Task | None:
        """None where nothing can be asked now."""
        ask = self.survey.next()
        if ask is None:
            return None
        line = (ask.scan, ask.direction)
        marks = self._names and line not in self.marks and line not in self._marking
        if marks:
            self._marking.add(line)
        return Task(ask, marks)

    def again(self, task: Task) -> None:
        """A task that nobody is doing any more."""
        self.survey.again(task.ask)
        if task.marks:
            self._marking.discard((task.ask.scan, task.ask.direction))

    def told(self, found: dict[str, Any]) -> None:
        """What a task found."""
        point, marks = Point.of_json(found["point"]), found["marks"]
        with storage_errors(self.state_dir):
            if marks is not None:  # before the point: a line whose points are all there has its marks
                self.marks[point.scan, point.direction] = marks
                _add(self.state_dir / _MARKS, [point.scan, point.direction, marks])
            _add(self.state_dir / POINTS, point.to_json())
        self.survey.told(point)
        if self._progress is not None:
            self._progress({"done": self.survey.done, "total": self.survey.total})

    def _restored(self, identity: str) -> tuple[list[Point], dict[Line, list[Mark]]]:
        points, marks = _read(self.state_dir, identity)
        if self._names:  # a line without marks lacks the point that they were to come with
            last = {(one.scan, one.direction): one for one in points}
            missing = [one for line, one in last.items() if line not in marks]
            points = [one for one in points if one not in missing]
        # Written anew: what is added goes behind whole lines. Each file whole or not at all, and points of another survey gone
        # before this one's name is there: a kill in between loses nothing that is of use.
        if not points:
            (self.state_dir / _ASKED).unlink(missing_ok=True)
        written = {POINTS: points_text(points), _MARKS: _marks_text(marks), _ASKED: json.dumps(identity)}
        for name, text in written.items():
            write_atomic(self.state_dir / name, text)
        return points, marks


def survey_points(
    surveying: Surveying,
    execution: EvaluationExecution,
    *,
    state_dir: Path,
    keep_going: KeepGoing | None = None,
    progress: Progress | None = None,
) -> tuple[list[Point], dict[Line, list[Mark]]]:
    """Every point of the scans, and where other models lie: (scan, direction) -> marks. For actors Ray must be up.

    What `state_dir` holds of an earlier try is not measured again, and the same points come out however many processes measure
    them. `keep_going` is called now and then and may raise to stop.
    Raises RealignError as a model in this process does, and Ray's error when more actors than allowed are lost.
    """
    course = Course(surveying, state_dir, progress)
    do_tasks(course, surveying.surveyor, execution, threads=surveying.threads, keep_going=keep_going)
    return course.survey.points, course.marks


def _read(state_dir: Path, identity: str) -> tuple[list[Point], dict[Line, list[Mark]]]:
    """What the files hold of this survey; nothing where they are of another or damaged: they only save time."""
    try:
        if json.loads((state_dir / _ASKED).read_text()) != identity:
            return [], {}
        lines = (state_dir / _MARKS).read_text().split("\n")[:-1]
        marks = {(scan, direction): found for scan, direction, found in map(json.loads, lines)}
        return read_points(state_dir / POINTS), marks
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return [], {}


def _marks_text(marks: Mapping[Line, list[Mark]]) -> str:
    return "".join(json.dumps([*line, found]) + "\n" for line, found in marks.items())


def _add(path: Path, line: Any) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
