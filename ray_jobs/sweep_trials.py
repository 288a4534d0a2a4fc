"""The candidates of a sweep, tried in this process or as Ray Tune's trials, and kept as they come."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.errors import CheckpointError, ConfigError, EvaluationError
from components.evaluation.execution import EvaluationExecution
from components.evaluation.judges import make_judge
from components.evaluation.judges.settings import JudgeExecution
from components.evaluation.prompts import PromptSet
from components.evaluation.settings import EvaluationSettings
from components.storage import Progress, storage_errors, write_atomic
from components.sweeps.racing import Race
from components.sweeps.result import usual_of
from components.sweeps.settings import Space, SweepSettings
from components.sweeps.space import Tuning, expressed, tuning_of
from components.sweeps.study import Study
from components.sweeps.trials import TRIALS_FILE, Candidate, Scored, append_trial, candidate_key, read_trials
from ray_jobs.actors import lost_errors
from ray_jobs.tasks import KeepGoing, do_tasks

if TYPE_CHECKING:
    from components.checkpoints.reference import Checkpoint
    from components.sweeps.trying import Trier

Against = tuple[Sequence[Scored], Scored | None]
"""Those that were asked everything, and the run's own settings among them."""
Opened = Mapping[str, Any]
"""How a model is opened: what a stage's spec has under `checkpoints`."""


@dataclass(frozen=True)
class Sweeping:
    """All that a process needs to try candidates of one target; may be sent to other processes."""

    aligned: Opened
    finetunes: Mapping[str, Opened]
    """The target's own, several for a merge."""
    unaligned: Opened | None
    mask: Path | None
    sets: tuple[PromptSet, ...]
    """dev sets."""
    evaluation: EvaluationSettings
    sweep: SweepSettings
    space: Space
    """Complete: what is not given in the settings is filled in."""
    defaults: Tuning
    """What a candidate is as where it says nothing."""
    own: tuple[Candidate, ...]
    """The run's own settings: tried first, and asked everything."""
    batch_size: int
    threads: int = 1
    judging: JudgeExecution = field(default_factory=JudgeExecution)

    def trying(self, device: str) -> Trying:
        """The model, loaded; this process computes as every other one does. Raises CheckpointError, EvaluationError."""
        import torch

        torch.set_num_threads(self.threads)
        torch.use_deterministic_algorithms(device == "cpu")
        return Trying(self, self._trier(device))

    def _trier(self, device: str) -> Trier:
        import torch

        from components.checkpoints.loading import load_tokenizer
        from components.evaluation.generate import InProcess, load_model
        from components.masks.artifact import MaskArtifact
        from components.sweeps.trying import Trier

        aligned, owner = self._opened(self.aligned), self.owner
        dtype = getattr(torch, self.evaluation.dtype)
        model, _ = load_model(owner.model_dir, tokenizer_dir=owner.tokenizer_dir, dtype=dtype, device=device)
        answerer = InProcess(model, load_tokenizer(owner.tokenizer_dir), batch_size=self.batch_size)
        return Trier(
            answerer,
            aligned=aligned.source,
            finetunes={name: self._opened(one).source for name, one in self.finetunes.items()},
            unaligned=self._opened(self.unaligned).source if self.unaligned is not None else None,
            mask=MaskArtifact.open(self.mask) if self.mask is not None else None,
            sets=self.sets,
            objectives=self.sweep.objectives,
            settings=self.evaluation,
            judge=make_judge(self.evaluation.judge, self.judging),
            seed=self.sweep.seed,
        )

    @property
    def questions(self) -> dict[str, list[str]]:
        """`Objective.name` -> what identifies its prompts, in the order in which they are asked."""
        from components.sweeps.trying import questions

        return questions(self.sets, self.sweep.objectives, self.sweep.seed)

    @property
    def owner(self) -> Checkpoint:
        """Whose config and tokenizer the fused model is published with."""
        return self._opened(next(iter(self.finetunes.values())) if len(self.finetunes) == 1 else self.aligned)

    @staticmethod
    def _opened(place: Opened) -> Checkpoint:
        from ray_jobs.models import open_place

        return open_place(dict(place))


class Trying:
    """What a process has that tries candidates: the model, and the rule by which one is asked no further."""

    def __init__(self, sweeping: Sweeping, trier: Trier) -> None:
        self._trier, self._defaults = trier, sweeping.defaults
        self._race = race_of(sweeping.sweep, trier.prompts)

    def scored(self, candidate: Candidate, against: Against | None, keep_going: KeepGoing | None = None) -> Scored:
        """Fuse and ask, until everything was asked or the candidate cannot win `against` the others."""
        began = time.perf_counter()
        self._trier.take(tuning_of(candidate, self._defaults))
        seconds = {"fuse": time.perf_counter() - began, "score": 0.0}
        found = Scored(candidate, dict.fromkeys(self._trier.prompts, ""), None, seconds)
        while (sample := self._race.next_sample({name: len(hits) for name, hits in found.hits.items()})) is not None:
            hits = self._trier.score(sample, keep_going)
            seconds = {**seconds, "score": time.perf_counter() - began - seconds["fuse"]}
            found = Scored(candidate, hits, None, seconds)
            stopped = against and self._race.verdict(found, *against)
            if stopped is not None:
                return Scored(candidate, hits, stopped, seconds)
        return found


def race_of(sweep: SweepSettings, prompts: Mapping[str, int]) -> Race:
    """The rule of a sweep's settings over so many prompts of each objective."""
    return Race(
        sweep.objectives,
        prompts,
        pick=sweep.pick,
        sample=sweep.sample,
        confidence=sweep.confidence,
        tolerance=sweep.tolerance,
    )


@dataclass(frozen=True)
class Try:
    """A candidate, and what it is held against."""

    candidate: Candidate
    against: Against | None
    """What was known when it was given out; None of one that is asked everything."""
    own: bool = False
    """Whether it is one of the run's own settings, with which the models themselves are at fault where it cannot be fused."""

    def do(self, trying: Trying, keep_going: KeepGoing | None = None) -> Scored:
        """What became of it. Weights that are not finite end a candidate, not the sweep."""
        try:
            return trying.scored(self.candidate, self.against, keep_going)
        except CheckpointError as error:
            if self.own:
                raise
            return Scored(self.candidate, {}, f"cannot be fused: {str(error).splitlines()[0]}")


def in_space(candidate: Candidate, sweeping: Sweeping) -> bool:
    """Whether the sweep's space has its settings."""
    try:
        tuning = tuning_of(candidate, sweeping.defaults)
    except ConfigError:  # it said how it differs from other settings
        return False
    return expressed(tuning, sweeping.space, sweeping.defaults) is not None


class SweepCourse:
    """A target's sweep, and what is known of it on disk, of which nothing is tried twice.

    Every result is added to a file in `state_dir` as it comes. What was stopped there under another rule, and may win under
    this one, is tried again; what lies outside of the space stays there and counts for nothing. `earlier`: candidates that did
    well on other prompts, tried after the run's own.
    """

    def __init__(
        self,
        sweeping: Sweeping,
        state_dir: Path,
        *,
        earlier: Sequence[Candidate] = (),
        progress: Progress | None = None,
    ) -> None:
        self.state_dir, self._progress, self._sweep, self._own = state_dir, progress, sweeping.sweep, sweeping.own
        self._path = state_dir / TRIALS_FILE
        self._prompts = {name: len(asked) for name, asked in sweeping.questions.items()}
        with storage_errors(state_dir):
            state_dir.mkdir(parents=True, exist_ok=True)
            known = read_trials(self._path)
            # Written anew: what is added goes behind whole lines.
            write_atomic(self._path, "".join(one.to_json() + "\n" for one in known))
        known = [one for one in known if one.candidate in self._own or in_space(one.candidate, sweeping)]
        self._places = {candidate_key(one.candidate): place for place, one in enumerate(known)}
        race = race_of(sweeping.sweep, self._prompts)
        reopened = [one.candidate for one in known if one.stopped is not None and self._goes_on(one, known, race)]
        again = set(map(candidate_key, reopened))
        self._scored = {key: one for one in known if (key := candidate_key(one.candidate)) not in again}
        self._study = Study(
            sweeping.space,
            self._sweep.objectives,
            sweeping.defaults,
            sampler=self._sweep.sampler,
            seed=self._sweep.seed,
            known=self._scored.values(),
        )
        self._waiting = deque(one for one in self._own if candidate_key(one) not in self._scored)
        self._waiting += [
            one
            for one in (*reopened, *earlier)
            if one not in self._own and in_space(one, sweeping) and not self._study.seen(one)
        ]
        self._given_back: deque[Try] = deque()
        self._under_way = 0
        self._used_up = False

    @property
    def scored(self) -> list[Scored]:
        """What became of every candidate, in the order in which they were first told, by whichever process."""
        return sorted(self._scored.values(), key=lambda one: self._places[candidate_key(one.candidate)])

    @property
    def finished(self) -> bool:
        """Whether as many were tried as are to be, or all that there are."""
        enough = self._used_up or len(self._scored) >= self._sweep.trials
        return enough and not self._under_way and not self._given_back

    def next(self) -> Try | None:
        """None where nothing can be tried now."""
        found = self._given_back.popleft() if self._given_back else self._new()
        self._under_way += found is not None
        return found

    def again(self, task: Try) -> None:
        """A candidate that nobody is trying any more."""
        self._under_way -= 1
        self._given_back.append(task)

    def told(self, found: Scored) -> None:
        """What became of a candidate."""
        with storage_errors(self._path):
            append_trial(self._path, found)
        self._under_way -= 1
        key = candidate_key(found.candidate)
        self._places.setdefault(key, len(self._places))
        self._scored[key] = found
        self._study.tell(found)
        if self._progress is not None:
            self._progress({"done": len(self._scored), "total": self._sweep.trials})

    def _new(self) -> Try | None:
        if len(self._scored) + self._under_way >= self._sweep.trials:
            return None
        ours = bool(self._waiting) and self._waiting[0] in self._own
        if self._sweep.racing and not ours and any(candidate_key(one) not in self._scored for one in self._own):
            return None  # a race is held against the run's own settings, which another process is still trying
        candidate = self._waiting.popleft() if self._waiting else self._study.ask()
        if candidate is None:
            self._used_up = True
            return None
        raced = self._sweep.racing and not ours
        return Try(candidate, self._against(self._scored.values()) if raced else None, ours)

    def _against(self, scored: Iterable[Scored]) -> Against:
        full = [one for one in scored if one.is_full(self._prompts)]
        return full, usual_of(full, self._own, self._sweep, self._prompts)

    def _goes_on(self, one: Scored, known: Sequence[Scored], race: Race) -> bool:
        if not self._sweep.racing or one.candidate in self._own:
            return True
        return any(one.hits.values()) and race.verdict(one, *self._against(known)) is None


def sweep_target(
    sweeping: Sweeping,
    execution: EvaluationExecution,
    *,
    state_dir: Path,
    earlier: Sequence[Candidate] = (),
    keep_going: KeepGoing | None = None,
    progress: Progress | None = None,
) -> list[Scored]:
    """Try as many candidates as the settings say, the run's own first; for actors Ray must be up.

    A candidate has the same hits whichever process tries it; which candidates are tried follows from the seed where one process
    does, and from which actor is done first where several do. What `state_dir` holds of an earlier try is not tried again.
    Raises RealignError as a model in this process does, EvaluationError when more actors than allowed are lost.
    """
    course = SweepCourse(sweeping, state_dir, earlier=earlier, progress=progress)
    try:
        do_tasks(course, sweeping.trying, execution, threads=sweeping.threads, keep_going=keep_going)
    except Exception as error:
        if execution.in_process or not isinstance(error, lost_errors()):
            raise
        raise EvaluationError(
            f"more than {execution.max_losses} actors were lost ({type(error).__name__}), for want of memory perhaps; what was "
            "tried is kept: sweep again with fewer actors, or allow more losses (execution.sweep.max_losses)"
        ) from error
    return course.scored
