"""A model that candidates are tried on: fused in memory, asked as many prompts as are wanted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from components.checkpoints.source import TensorSource
from components.errors import EvaluationError
from components.evaluation.conversations import Prompt
from components.evaluation.evaluate import evaluate
from components.evaluation.generate import InProcess
from components.evaluation.judges.base import Judge
from components.evaluation.outcomes import Outcome, hits
from components.evaluation.prompts import PromptSet
from components.evaluation.settings import EvaluationSettings
from components.fusion.fused import FusedSource, apply_to_model
from components.fusion.inputs import Mask
from components.fusion.merge_settings import MergeSettings
from components.fusion.merging import MergedSource
from components.fusion.methods import method_named
from components.fusion.trimming import Thresholds, find_thresholds
from components.sweeps.settings import Objective
from components.sweeps.space import Tuning

Place = tuple[str, int]
"""A prompt: its set, and where it stands there."""


def in_order(sets: Sequence[PromptSet], seed: int) -> list[Place]:
    """All prompts of some sets, mixed: sorted by a hash of the seed and the prompt, so that the order of some of them is
    the same whichever others there are."""
    places = [(one, index) for one in sets for index in range(len(one))]
    return [
        (one.name, index) for one, index in sorted(places, key=lambda p: _draw(seed, p[0].name, p[0].prompts[p[1]]))
    ]


def _draw(seed: int, name: str, prompt: Prompt) -> str:
    return hashlib.sha256(f"{seed}\0{name}\0{prompt.id}\0{prompt.fingerprint}".encode()).hexdigest()


def questions(sets: Sequence[PromptSet], objectives: Sequence[Objective], seed: int) -> dict[str, list[str]]:
    """`Objective.name` -> what identifies its prompts, in their order: a part of `study_identity`. Raises EvaluationError for
    an objective that the sets do not measure."""
    prompts = {one.name: one.prompts for one in sets}
    return {
        name: [f"{where}/{prompts[where][index].fingerprint}" for where, index in places]
        for name, places in _orders(sets, objectives, seed).items()
    }


def _orders(sets: Sequence[PromptSet], objectives: Sequence[Objective], seed: int) -> dict[str, list[Place]]:
    by_name = {one.name: one for one in sets}
    orders = {}
    for objective in objectives:
        own = [by_name[one.name] for one in objective.sets(sets)]
        if objective.metric == "exact":
            own = [one for one in own if all(prompt.answer is not None for prompt in one.prompts)]
        if not own:
            there = ", ".join(by_name) or "none"
            raise EvaluationError(f"objective {objective.name}: no dev set measures it (dev sets: {there})")
        orders[objective.name] = in_order(own, seed)
    return orders


class Trier:
    """A model, what is fused into it, and what it is asked. One candidate at a time.

    Args:
        answerer: the model, whose weights are overwritten by each candidate's.
        aligned: the aligned model's weights.
        finetunes: those of the target by name, several for a merge. All are read anew for every candidate.
        sets: dev sets; prompts that no objective counts are not asked.
        objectives: what is scored.
        settings: how answers are generated, and judged by `judge`.
        mask: the target's; None where no candidate needs one.
        unaligned: for methods that need it.
        seed: of the order of prompts.

    Raises EvaluationError for an objective that the sets do not measure.
    """

    def __init__(
        self,
        answerer: InProcess,
        *,
        aligned: TensorSource,
        finetunes: Mapping[str, TensorSource],
        sets: Sequence[PromptSet],
        objectives: Sequence[Objective],
        settings: EvaluationSettings,
        judge: Judge,
        mask: Mask | None = None,
        unaligned: TensorSource | None = None,
        seed: int = 0,
    ) -> None:
        assert all(one.split == "dev" for one in sets), "a sweep chooses, and what chooses is no test"
        self._answerer, self._settings, self._judge = answerer, settings, judge
        self._aligned, self._finetunes, self._unaligned, self._mask = aligned, dict(finetunes), unaligned, mask
        self._sets = {one.name: one for one in sets}
        self._objectives = tuple(objectives)
        self._orders = _orders(sets, objectives, seed)
        self._outcomes: dict[Place, Outcome] = {}
        self._thresholds: dict[str, Thresholds] = {}

    @property
    def prompts(self) -> dict[str, int]:
        """`Objective.name` -> how many prompts there are."""
        return {name: len(order) for name, order in self._orders.items()}

    def take(self, tuning: Tuning) -> None:
        """Fuse into the model in place and forget all answers. The weights are those of a written checkpoint that is loaded in
        the model's dtype, bit for bit.

        Raises ConfigError for settings that do not fit the models, CheckpointError for models that do not fit each other and
        for weights that are not finite: the model is then none until the next candidate is taken.
        """
        self._outcomes.clear()
        apply_to_model(self._answerer.model, self.fused(tuning))

    def fused(self, tuning: Tuning) -> FusedSource:
        """The weights of a candidate. Raises as `take`."""
        method = method_named(tuning.fusion.method)
        return FusedSource(
            aligned=self._aligned,
            finetune=self._finetune(tuning.merge),
            settings=tuning.fusion,
            mask=self._mask,  # also random_mask looks at it, for its densities
            unaligned=self._unaligned if method.needs_unaligned else None,
        )

    def score(self, sample: Mapping[str, int], keep_going: Callable[[], None] | None = None) -> dict[str, str]:
        """Ask what of each objective's first so many prompts was not asked yet; `Scored.hits` of the sample.

        A prompt of several objectives is asked once. `keep_going` is called now and then and may raise to stop; what is
        answered by then of this sample is asked again. Raises EvaluationError where nothing could be asked or judged.
        """
        wanted = {place for name, count in sample.items() for place in self._orders[name][:count]}
        missing = sorted(wanted - self._outcomes.keys())
        asked = {name: [index for where, index in missing if where == name] for name, _ in missing}
        if asked:
            found = evaluate(
                self._answerer,
                sets=[self._part(name, indices) for name, indices in asked.items()],
                settings=self._settings,
                split="dev",
                judge=self._judge,
                keep_going=keep_going,
            ).outcomes
            for name, indices in asked.items():
                self._outcomes |= {(name, i): one for i, one in zip(indices, found[name], strict=True)}
        return {one.name: "".join(self._hits(one, sample[one.name])) for one in self._objectives if one.name in sample}

    def _hits(self, objective: Objective, count: int) -> Iterator[str]:
        for place in self._orders[objective.name][:count]:
            found = hits(self._sets[place[0]].kind, [self._outcomes[place]])
            yield "01"[found.get(objective.metric, [False])[0]]  # `unscored` is there only where an answer is

    def _part(self, name: str, indices: Sequence[int]) -> PromptSet:
        whole = self._sets[name]
        return replace(whole, prompts=tuple(whole.prompts[index] for index in indices))

    def _finetune(self, merge: MergeSettings | None) -> TensorSource:
        if merge is None:
            (only,) = self._finetunes.values()
            return only
        return MergedSource(self._aligned, self._finetunes, merge, self._trimmed(merge))

    def _trimmed(self, merge: MergeSettings) -> Thresholds | None:
        """What TIES keeps is found by looking at everything, and depends on its densities alone."""
        if merge.method != "ties":
            return None
        key = merge.model_dump_json(include={"density", "densities", "threshold"})
        if key not in self._thresholds:
            self._thresholds[key] = find_thresholds(self._aligned, self._finetunes, merge)
        return self._thresholds[key]
