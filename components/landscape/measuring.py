"""A point of a landscape, measured: weights moved, every prompt asked, every answer judged."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from components.checkpoints.source import TensorSource
from components.errors import ConfigError, EvaluationError
from components.evaluation.conversations import Prompt
from components.evaluation.evaluate import evaluate
from components.evaluation.generate import InProcess
from components.evaluation.judges.base import Decided, Judge, Verdict, own_words
from components.evaluation.judges.coherence import incoherence
from components.evaluation.outcomes import Outcome, hits
from components.evaluation.prompts import PromptSet
from components.evaluation.settings import EvaluationSettings
from components.landscape.moving import Pristine
from components.landscape.plane import Plane
from components.landscape.points import Ask, Point
from components.landscape.schema import Mark
from components.landscape.settings import Axis, RandomAxis, Scan
from components.landscape.vectors import Direction, RandomDirection, TowardsDirection, require_same_tensors

if TYPE_CHECKING:
    from components.evaluation.capability.settings import CapabilitySettings
    from components.evaluation.capability.tasks import LoadedTask


class Surveyor:
    """A model that measures points: pristine weights, prompt sets, a judge, and planes that are made when first asked for.

    Args:
        answerer: the model, which is the landscape's origin; it is left at the point that was measured last.
        scans: what may be asked for.
        sources: weights that an axis leads to or that are marked: the name in `TowardsAxis.model` -> the weights.
        sets: all of one split; each is asked whole.
        settings: how answers are generated.
        judge: that of the settings.
        tasks: of lm_eval, asked at every point too, as `capability` says.

    Raises CheckpointError for sources of another architecture, ConfigError for an axis that leads to none of them,
    EvaluationError without sets.
    """

    def __init__(
        self,
        answerer: InProcess,
        *,
        scans: Sequence[Scan],
        sources: Mapping[str, TensorSource],
        sets: Sequence[PromptSet],
        settings: EvaluationSettings,
        judge: Judge,
        tasks: Sequence[LoadedTask] = (),
        capability: CapabilitySettings | None = None,
    ) -> None:
        if not sets:
            raise EvaluationError("no prompt set was given: a landscape has nothing to measure; name one in its sets")
        self._answerer, self._sets, self._settings = answerer, tuple(sets), settings
        self._scans = {scan.name: scan for scan in scans}
        self._sources, self._judge = dict(sources), _Patient(judge)
        self._tasks, self._capability = tuple(tasks), capability
        self._planes: dict[tuple[str, int], Plane] = {}
        _require_sources(scans, sources)
        self.pristine = Pristine(answerer.model)
        """The model as it was loaded; `restore` puts it back."""
        for name, source in sources.items():
            require_same_tensors(self.pristine, source, name)

    def measure(self, ask: Ask, keep_going: Callable[[], None] | None = None) -> Point:
        """What becomes of every prompt at a point. Where weights are not finite nothing is asked, and every answer counts as
        incoherent.

        `keep_going` is called now and then and may raise to stop. Raises CheckpointError for an axis that cannot be, and
        EvaluationError for what cannot be asked or judged anywhere.
        """
        started = time.perf_counter()
        finite = self.pristine.move(self._plane(ask.scan, ask.direction), ask.at)
        outcomes = (
            self._outcomes(keep_going) if finite else {s.name: [_broken(p) for p in s.prompts] for s in self._sets}
        )
        found = {one.name: hits(one.kind, outcomes[one.name]) for one in self._sets}
        found |= self._capabilities(finite, keep_going)
        written = {
            name: {metric: "".join("01"[hit] for hit in some) for metric, some in by_metric.items()}
            for name, by_metric in found.items()
        }
        return Point(ask.scan, ask.direction, ask.at, written, finite, time.perf_counter() - started)

    def marks(self, scan: str, direction: int) -> list[Mark]:
        """Where every source lies, also those that no axis leads to."""
        plane = self._plane(scan, direction)
        return [plane.locate(name, source) for name, source in self._sources.items()]

    def _outcomes(self, keep_going: Callable[[], None] | None) -> dict[str, list[Outcome]]:
        return evaluate(
            self._answerer,
            sets=self._sets,
            settings=self._settings,
            split=self._sets[0].split,
            judge=self._judge,
            keep_going=keep_going,
        ).outcomes

    def _capabilities(self, finite: bool, keep_going: Callable[[], None] | None) -> dict[str, dict[str, list[bool]]]:
        """Task -> task -> whether each row is right."""
        if self._capability is None or not self._tasks:
            return {}
        if not finite:
            return {one.name: {"task": [False] * sum(map(one.size, one.parts))} for one in self._tasks}
        from components.evaluation.capability.measure import measure

        found = measure(self._answerer, self._tasks, settings=self._capability, keep_going=keep_going)
        return {name: {"task": hits("task", some)["task"]} for name, some in found.outcomes.items()}

    def _plane(self, scan: str, direction: int) -> Plane:
        if (scan, direction) not in self._planes:
            axes = enumerate(self._scans[scan].axes)
            made = [self._direction(axis, place, direction) for place, axis in axes]
            self._planes[scan, direction] = Plane(self.pristine, made)
        return self._planes[scan, direction]

    def _direction(self, axis: Axis, place: int, direction: int) -> Direction:
        if isinstance(axis, RandomAxis):
            return RandomDirection(axis.seed + direction, place, axis.norm)
        return TowardsDirection(self._sources[axis.model], axis.model)


class _Patient:
    """A judge under which a broken model's answers are incoherent where the judge could make nothing of them: what is no answer
    by the fixed rule of `incoherence` needs nobody's verdict, and must not end a landscape."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    def judge(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Verdict]:
        """See Judge."""
        found = self._judge.judge(prompts, answers)
        return [_patient(*one) for one in zip(prompts, answers, found, strict=True)]

    def stopping(self) -> Decided | None:
        """See Judge."""
        return self._judge.stopping()


def _patient(prompt: Prompt, answer: str, verdict: Verdict) -> Verdict:
    nonsense = incoherence(own_words(prompt, answer)) if verdict.label == "unscored" else None
    return verdict if nonsense is None else Verdict("incoherent", 0.0, nonsense, verdict.votes)


def _broken(prompt: Prompt) -> Outcome:
    """Of a prompt that was not asked, because the model's weights are no numbers."""
    return Outcome(
        id=prompt.id,
        prompt=prompt.text,
        answer=prompt.begun,
        verdict="incoherent",
        score=0.0,
        reason="weights are not finite",
        expected=prompt.answer,
        exact=None if prompt.answer is None else False,
        end="broken",
        tokens=0,
        group=prompt.group,
        asked=prompt.fingerprint,
    )


def _require_sources(scans: Sequence[Scan], sources: Mapping[str, TensorSource]) -> None:
    wanted = {axis.model for scan in scans for axis in scan.axes if not isinstance(axis, RandomAxis)}
    if missing := sorted(wanted - sources.keys()):
        there = ", ".join(sources) or "none"
        raise ConfigError(f"axes lead to {', '.join(missing)}, which was not given (given: {there})")
