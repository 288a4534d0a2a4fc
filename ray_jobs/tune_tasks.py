"""Tasks for actors that hold a model (points of a landscape, candidates of a sweep) as Ray Tune's trials: one Tuner for all,
whose trials come from a course as it goes on.

An actor loads the model once and does one task after the other (`reuse_actors`). How ray 2.60 goes about it decides some of
what is here. It ends an actor that has no trial, and one that is still loading as soon as another can take its trial: so an
actor comes up with a trial that waits, is given tasks from then on, and waits where there is none. What a searcher raises
becomes a trial's failure: so it is kept and raised between two steps. A lost actor's trial may end in two ways: so its task
is another trial's, and Tune's own retries stay off.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from components.evaluation.execution import EvaluationExecution
from ray_jobs.actors import Resources, lost_errors, no_room, resources_of
from ray_jobs.cluster import is_busy
from ray_jobs.tasks import Course, KeepGoing

_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # three files a trial
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interrupt ends the command, as elsewhere
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",  # what must survive stands in the course's own files
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_THRESHOLD_S": "1e9",
    "RAY_AIR_NEW_OUTPUT": "0",  # prints a table whatever is asked for
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # models may have relative paths
}
_LOOK_SECONDS = 1.0
"""How often `keep_going` is called."""
_WAIT_SECONDS = 0.25
"""How long an actor waits before it asks again."""


class Holding(tune.Trainable):  # type: ignore[misc]
    """An actor: what it holds, once. A trial is one step, one task."""

    def setup(self, config: dict[str, Any], hold: Callable[[str], Any], device: str) -> None:
        """Raises nothing: an actor that fails while it is made looks like a lost one, and the model would be loaded again."""
        self._failure: Exception | None = None
        try:
            self._held = hold(device)
        except Exception as error:  # noqa: BLE001 - raised by the driver
            self._failure = _portable(error)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return True

    def step(self) -> dict[str, Any]:
        if self._failure is not None:
            return {"done": True, "failure": self._failure}
        if self.config["task"] is None:
            time.sleep(_WAIT_SECONDS if self.iteration else 0)
            return {"waiting": True}
        try:
            return {"done": True, "found": [self.config["task"].do(self._held)]}
        except Exception as error:  # noqa: BLE001 - raised by the driver
            return {"done": True, "failure": _portable(error)}


def _portable(error: Exception) -> Exception:
    """An error as it is, with the trace of the process that it happened in; another one where it does not travel."""
    trace = traceback.format_exc()
    error.add_note(trace)
    try:
        ray.cloudpickle.loads(ray.cloudpickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever its pickling raises
        return RuntimeError(trace)
    return error


class _Search(Searcher):  # type: ignore[misc]
    """Suggests the course's tasks and tells it what was found."""

    def __init__(self, course: Course, max_losses: int) -> None:
        super().__init__()
        self._course, self._left = course, max_losses
        self._ahead: Any = None
        self._under_way: dict[str, Any] = {}
        """By trial; None of one that waits."""
        self._idle = 0
        """Actors that are up and have no trial."""
        self.failure: BaseException | None = None
        """What ends it all."""
        self.lost: set[str] = set()
        """Trials whose actor was lost, beyond those allowed."""

    @property
    def finished(self) -> bool:
        return self._course.finished

    def wanted(self) -> bool:
        """Whether there is a task for an actor that waits."""
        return not self._idle and self._next() is not None

    def suggest(self, trial_id: str) -> Any:
        if self.finished:
            return self.FINISHED
        task = self._next() if self._idle else None
        if task is not None:
            self._ahead = None
        self._idle = max(self._idle - 1, 0)
        self._under_way[trial_id] = task
        return {"task": task}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        task = self._under_way.pop(trial_id)
        try:
            if error or result is None:
                if task is not None:
                    self._course.again(task)
                if not self.lose():
                    self.lost.add(trial_id)
            elif "failure" in result:
                self.failure = result["failure"]
            else:
                self._idle += 1
                if task is not None:
                    self._course.told(result["found"][0])
        except Exception as failure:  # noqa: BLE001 - Tune would take it for the trial's
            self.failure = failure

    def _next(self) -> Any:
        if self._ahead is None:
            self._ahead = self._course.next()
        return self._ahead

    def lose(self) -> bool:
        """Count an actor as lost; whether that is allowed."""
        self._left -= 1
        return self._left >= 0

    def put_back(self) -> None:
        """All that is under way, for another Tuner."""
        for task in self._under_way.values():
            if task is not None:
                self._course.again(task)
        self._under_way, self._idle = {}, 0

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """The course keeps its own files."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles it for a restart of its own


class _Waits(FIFOScheduler):  # type: ignore[misc]
    """Has Tune give an actor that becomes free the trial that was suggested for it, and not one whose own actor is loading,
    which it would end."""

    def choose_trial_to_run(self, tune_controller: Any, **kwargs: Any) -> None:
        return None


class _Ends(tune.Stopper):  # type: ignore[misc]
    """Ends trials that wait where there is something to do, and all when everything is done."""

    def __init__(self, search: _Search) -> None:
        self._search = search

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return "waiting" in result and self._search.wanted()

    def stop_all(self) -> bool:
        return self._search.finished


class _Watch(tune.Callback):  # type: ignore[misc]
    """Ends Tune between two steps for what the course, a lease or an actor that finds no room says."""

    def __init__(self, search: _Search, keep_going: KeepGoing, patience_s: float, needs: Resources) -> None:
        self._search, self._keep_going, self._patience_s, self._needs = search, keep_going, patience_s, needs
        self._looked = self._waiting_since = time.monotonic()
        self._running: set[str] = set()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._running.add(trial.trial_id)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._running.discard(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._running.discard(trial.trial_id)
        if trial.trial_id in self._search.lost:
            self._search.failure = ray.cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self._search.failure is not None:
            raise self._search.failure
        now = time.monotonic()
        if self._running or (now - self._waiting_since > self._patience_s and is_busy(self._needs.request)):
            self._waiting_since = now
        elif now - self._waiting_since > self._patience_s:
            raise no_room(self._patience_s, self._needs)
        if now - self._looked > _LOOK_SECONDS:
            self._looked = now
            self._keep_going()

    def __getstate__(self) -> dict[str, Any]:
        return {}


def tune_tasks(
    course: Course,
    hold: Callable[[str], Any],
    execution: EvaluationExecution,
    *,
    threads: int,
    keep_going: KeepGoing,
) -> None:
    """See `do_tasks`. Raises EvaluationError where no actor finds room, too."""
    search = _Search(course, execution.max_losses)
    with _quiet(), _storage(course.state_dir / "tune") as storage:
        while not course.finished:
            try:
                _tuner(storage, search, hold, execution, threads, keep_going).fit()
            except RuntimeError as error:
                # An actor that Ray ended for its memory is none of the losses that Tune knows, and ends the Tuner.
                if not isinstance(error.__cause__, lost_errors()):
                    raise
                if not search.lose():
                    raise error.__cause__ from error
                search.put_back()


def _tuner(
    storage: Path,
    search: _Search,
    hold: Callable[[str], Any],
    execution: EvaluationExecution,
    threads: int,
    keep_going: KeepGoing,
) -> tune.Tuner:
    needs = resources_of(execution, threads)
    trainable = tune.with_parameters(Holding, hold=hold, device=needs.device)
    # Tune keeps trainables by name for all of a Ray job: two courses at once would use each other's models.
    trainable.__name__ = f"{Holding.__name__}-{uuid.uuid4().hex}"
    return tune.Tuner(
        tune.with_resources(trainable, {"cpu": needs.cpus, "gpu": needs.gpus, **needs.others}),
        tune_config=tune.TuneConfig(
            num_samples=-1,
            search_alg=search,
            scheduler=_Waits(),
            max_concurrent_trials=execution.actors,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tasks",
            storage_path=str(storage),
            stop=_Ends(search),
            callbacks=[_Watch(search, keep_going, execution.patience_s, needs)],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )


@contextmanager
def _storage(directory: Path) -> Iterator[Path]:
    """What Tune writes is of no use later, nor is what a killed process left of it."""
    shutil.rmtree(directory, ignore_errors=True)
    try:
        yield directory.resolve()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Tune with its settings, and without what it prints, which the course says itself."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    logger = logging.getLogger("ray.tune")
    level = logger.level
    os.environ.update(_ENVIRONMENT)
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
