"""Tasks for a model that is loaded once: points of a landscape, candidates of a sweep; in this process or on actors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from components.evaluation.execution import EvaluationExecution

KeepGoing = Callable[[], None]
Hold = Callable[[str], Any]
"""Makes what tasks are done with on a device; travels to other processes."""


class Task(Protocol):
    """What is to be done; travels to an actor."""

    def do(self, held: Any, keep_going: KeepGoing | None = None) -> Any:
        """What was found; travels back."""


class Course(Protocol):
    """Which task comes next, and what is known: asked and told in one process, which writes down what must survive."""

    state_dir: Path

    @property
    def finished(self) -> bool:
        """Whether everything was told."""

    def next(self) -> Any:
        """A Task; None where none can be given now."""

    def again(self, task: Any) -> None:
        """A task that nobody is doing any more."""

    def told(self, found: Any) -> None:
        """What a task found."""


def do_tasks(
    course: Course,
    hold: Hold,
    execution: EvaluationExecution,
    *,
    threads: int,
    keep_going: KeepGoing | None = None,
) -> None:
    """Bring a course to its end. For actors Ray must be up; each gets `threads` CPUs.

    `keep_going` is called now and then and may raise to stop. Raises what `hold`, a task or the course raised, and Ray's error
    when more actors than allowed are lost.
    """
    if not course.finished and execution.in_process:
        held = hold("cpu")
        while (task := course.next()) is not None:
            course.told(task.do(held, keep_going))
    elif not course.finished:
        from ray_jobs.tune_tasks import tune_tasks

        tune_tasks(course, hold, execution, threads=threads, keep_going=keep_going or _nothing)
    assert course.finished


def _nothing() -> None:
    pass
