"""A model that candidates are tried on: fused in memory, asked as many prompts as are wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from components.checkpoints.source import TensorSource
from components.evaluation.generate import InProcess
from components.evaluation.judges.base import Judge
from components.evaluation.prompts import PromptSet
from components.evaluation.settings import EvaluationSettings
from components.fusion.inputs import Mask
from components.sweeps.settings import Objective
from components.sweeps.space import Tuning


class Trier:
    """Args:
    answerer: the model, whose weights are overwritten by each candidate's.
    aligned: the aligned model's weights; `finetunes`: the target's own, several for a merge.
    mask: that of the target; `unaligned`: for methods that need it.
    sets: dev sets; those that an objective counts are asked.
    objectives: what is scored.
    settings: how answers are generated and judged, by `judge`.
    seed: of the order of prompts.
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
        stored: Sequence[TensorSource] = (),
        seed: int = 0,
    ) -> None:
        raise NotImplementedError

    @property
    def prompts(self) -> dict[str, int]:
        """`Objective.name` -> how many prompts there are."""
        raise NotImplementedError

    def take(self, tuning: Tuning) -> None:
        """Fuse into the model in place and forget all answers. Raises ConfigError for settings that do not fit the models,
        CheckpointError for weights that are not finite."""
        raise NotImplementedError

    def score(self, sample: Mapping[str, int], keep_going: Callable[[], None] | None = None) -> dict[str, str]:
        """Ask what of the sample was not asked yet; `Scored.hits` of all that was. Raises EvaluationError."""
        raise NotImplementedError
