"""How far each candidate is asked, and when it is asked no further. Pure: nothing here knows a model.

A sweep asks which candidate wins on all of the dev prompts, not on all prompts there could be. The first m of n prompts, in an
order that a hash decides, are a draw without replacement: the number of hits among them is hypergeometric, exactly. Its
quantiles bound from below what a candidate will have lost when all n are asked (never less than what it has lost already, and
with m = n that itself). A candidate that cannot win even if it loses no more than these bounds is stopped.

The error that this allows: a candidate which would have won on all prompts is stopped with a chance of at most 1 − confidence
over the orders of prompts. It is stopped wrongly only where a bound is above the true loss; each bound is so with a chance of
at most (1 − confidence) / (objectives · looks), and there are no more bounds than that (Bonferroni). No independence is
assumed of objectives, looks or candidates. Those it is compared with were asked everything: nothing about them is estimated.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from components.sweeps.front import in_reach, ranking
from components.sweeps.settings import Objective, Pick
from components.sweeps.trials import Scored

_HAIR = 1e-9
"""1 − 0.9 is not 0.1."""


class Race:
    """Args:
    objectives: what is scored.
    prompts: `Objective.name` -> how many prompts there are.
    pick: the rule that names the winner.
    sample, confidence, tolerance: see SweepSettings.
    """

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
        self._objectives, self._prompts, self._pick = tuple(objectives), dict(prompts), pick
        self._band = tolerance
        self._tolerance = [tolerance * one.most_loss for one in objectives]
        self._sizes = {one.name: _sizes(sample, prompts[one.name]) for one in objectives}
        looks = {name: len(sizes) for name, sizes in self._sizes.items()}
        self._doubt = {name: (1 - confidence) / len(objectives) / count for name, count in looks.items()}

    def next_sample(self, asked: Mapping[str, int]) -> dict[str, int] | None:
        """`Objective.name` -> how many of its prompts are to have been asked next, counted from the first; None where all are.

        Objectives with a demand come first: who misses it need not be asked for more.
        """
        left = [one for one in self._objectives if asked.get(one.name, 0) < self._prompts[one.name]]
        if not left:
            return None
        ahead = {one.name: next(s for s in self._sizes[one.name] if s > asked.get(one.name, 0)) for one in left}
        least = min(self._sizes[name].index(size) for name, size in ahead.items())
        round_ = [one for one in left if self._sizes[one.name].index(ahead[one.name]) == least]
        first = [one for one in round_ if one.demand is not None] or round_
        return {**asked, **{one.name: ahead[one.name] for one in first}}

    def least_losses(self, scored: Scored) -> tuple[float, ...]:
        """What a candidate will have lost at least, objective by objective; all together with the stated confidence."""
        return tuple(self._least(one, scored.hits.get(one.name, "")) for one in self._objectives)

    def verdict(self, scored: Scored, others: Sequence[Scored], usual: Scored | None) -> str | None:
        """Why a candidate cannot win, in a sentence; None while it may.

        Args:
            scored: the candidate, as far as it was asked.
            others: all that were scored before; those that were asked everything count.
            usual: the run's own settings, if they were asked everything; they are not to be stopped.

        It cannot win, nor change who does, where it misses a demand that the leader keeps; where a full one is in every
        objective as good as its least losses; and where these are out of the leader's reach, if a full one is in every
        objective as good or worse by no more than the tolerance: then the front loses no more than that.
        """
        full = [one for one in others if one.is_full(self._prompts)]
        if not full:
            return None
        least = self.least_losses(scored)
        points = [one.losses(self._objectives) for one in full]
        rank = ranking(self._objectives, self._pick, None if usual is None else usual.losses(self._objectives))
        keys = [rank(point) for point in points]
        said = self._missed(least, points[keys.index(min(keys))]) or self._dominated(least, points, [0.0] * len(least))
        if said is None and self._pick != "knee" and not in_reach(rank(least), keys, self._pick, self._band):
            return self._dominated(least, points, self._tolerance)
        return said

    def _missed(self, least: Sequence[float], leader: Sequence[float]) -> str | None:
        if any(loss > one.most_loss + _HAIR for one, loss in zip(self._objectives, leader, strict=True)):
            return None
        for one, loss in zip(self._objectives, least, strict=True):
            if loss > one.most_loss + _HAIR:
                bound = f"at least {loss:.3g}" if not one.grows else f"at most {1 - loss:.3g}"
                return f"{one.name} will be {bound}, {one.demand:g} is demanded"
        return None

    def _dominated(
        self, least: Sequence[float], points: Sequence[Sequence[float]], tolerance: Sequence[float]
    ) -> str | None:
        for point in points:
            if all(theirs <= own + t + _HAIR for own, theirs, t in zip(least, point, tolerance, strict=True)):
                rates = [1 - loss if one.grows else loss for one, loss in zip(self._objectives, point, strict=True)]
                said = ", ".join(f"{one.name} {rate:.3g}" for one, rate in zip(self._objectives, rates, strict=True))
                return f"another is at least as good on every objective ({said})"
        return None

    def _least(self, objective: Objective, hits: str) -> float:
        lost, n = hits.count("0" if objective.grows else "1"), self._prompts[objective.name]
        return least_count(lost, len(hits), n, self._doubt[objective.name]) / n


def _sizes(first: int, count: int) -> list[int]:
    """first, 2 first, 4 first, … and `count`; a last step by less than a quarter is taken with the one before."""
    sizes = [min(first, count)]
    while sizes[-1] < count:
        sizes.append(2 * sizes[-1] if 2.5 * sizes[-1] < count else count)
    return sizes


@functools.lru_cache(maxsize=65536)
def least_count(seen: int, asked: int, count: int, doubt: float) -> int:
    """The fewest of `count` that can be hits where `seen` of `asked`, drawn without replacement, are: with fewer the chance of
    as many would be at most `doubt`. The exact lower bound of the hypergeometric distribution (Wright 1991, Exact Confidence
    Bounds when Sampling from Small Finite Universes); never less than `seen`, and `seen` itself once all were asked."""
    from scipy.stats import hypergeom

    if not seen:
        return 0
    low, high = seen, count - (asked - seen)  # the chance grows with the number of hits there are
    while low < high:
        middle = (low + high) // 2
        if hypergeom.sf(seen - 1, count, middle, asked) > doubt:
            high = middle
        else:
            low = middle + 1
    return low
