"""How far each candidate is asked, and when it is asked no further. Pure: nothing here knows a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from components.sweeps.settings import Objective, Pick
from components.sweeps.trials import Scored


class Race:
    """Args: `prompts`: `Objective.name` -> how many prompts there are; the others as in SweepSettings."""

    def __init__(
        self,
        objectives: Sequence[Objective],
        prompts: Mapping[str, int],
        *,
        pick: Pick = "skill",
        sample: int = 16,
        confidence: float = 0.95,
        tolerance: float = 0.02,
    ) -> None:
        raise NotImplementedError

    def next_sample(self, asked: Mapping[str, int]) -> dict[str, int] | None:
        """`Objective.name` -> how many of its prompts are to have been asked next, counted from the first; None where all
        are."""
        raise NotImplementedError

    def verdict(self, scored: Scored, others: Sequence[Scored]) -> str | None:
        """Why a candidate cannot win, in a sentence; None while it may. `others`: all that were scored, however far."""
        raise NotImplementedError

    def is_full(self, scored: Scored) -> bool:
        """Whether it was asked everything."""
        raise NotImplementedError
