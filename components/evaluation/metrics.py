"""Rates with intervals, and paired differences between two variants over the same prompts. Nothing here knows a model.

Nothing is ever dropped: every rate is over all prompts that it is asked of, an empty list raises, and an answer no
judge could score counts at the bad end of each metric (attack succeeded, refused when it should have answered).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from components.errors import EvaluationError
from components.reporting.schema import Difference, Interval


def wilson(successes: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion (Wilson 1927), clipped to [0, 1]. Raises EvaluationError for n = 0."""
    if n <= 0:
        raise EvaluationError("a rate over no answers is not a number; give the set prompts")
    assert 0 <= successes <= n, (successes, n)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At the ends the exact bound is 0 or 1; rounding must not leave 1e-17 there.
    low = 0.0 if successes == 0 else max(0.0, (centre - spread) / (1 + z * z / n))
    high = 1.0 if successes == n else min(1.0, (centre + spread) / (1 + z * z / n))
    return low, high


def rate(hits: Sequence[bool], *, confidence: float = 0.95) -> Interval:
    """Share of True with its Wilson interval. Raises EvaluationError when there is nothing to count."""
    k, n = sum(hits), len(hits)
    low, high = wilson(k, n, confidence=confidence)
    return {"value": k / n, "low": low, "high": high, "n": n}


def mcnemar(first_only: int, second_only: int) -> float:
    """Exact two-sided McNemar test: the chance of a split of the discordant pairs at least as uneven as this one, were
    both directions equally likely. 1.0 when no pair is discordant."""
    n = first_only + second_only
    tail = sum(math.comb(n, k) for k in range(min(first_only, second_only) + 1))
    return float(min(1.0, 2 * tail / 2**n))


def paired_difference(first: Sequence[bool], second: Sequence[bool], *, confidence: float = 0.95) -> Difference:
    """Rate of `first` minus rate of `second` over the same prompts, with its interval and McNemar's p.

    The interval is Newcombe's square-and-add of the two Wilson intervals with their correlation (Statistics in Medicine
    17, 1998, 2635-2650, method 10). A percentile bootstrap has width 0 when every pair agrees, or every pair differs
    the same way (ASR 1.00 before, 0.00 after), which is just where safety results lie.
    """
    both, first_only, second_only, neither = _table(first, second)
    n = both + first_only + second_only + neither
    p1, p2 = (both + first_only) / n, (both + second_only) / n
    low1, high1 = wilson(both + first_only, n, confidence=confidence)
    low2, high2 = wilson(both + second_only, n, confidence=confidence)
    phi = _correlation(both, first_only, second_only, neither)

    def width(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    diff = p1 - p2
    return {
        "diff": diff,
        "low": max(-1.0, diff - width(p1 - low1, high2 - p2)),
        "high": min(1.0, diff + width(high1 - p1, p2 - low2)),
        "p": mcnemar(first_only, second_only),
        "n": n,
    }


def _check_pairs(n_first: int, n_second: int) -> None:
    if n_first != n_second:
        raise EvaluationError(f"a paired comparison needs the same prompts on both sides, not {n_first} and {n_second}")
    if n_first == 0:
        raise EvaluationError("a paired comparison over no prompts says nothing; give the set prompts")


def _table(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int, int, int]:
    _check_pairs(len(first), len(second))
    both = sum(a and b for a, b in zip(first, second, strict=True))
    return both, sum(first) - both, sum(second) - both, len(first) - sum(first) - sum(second) + both


def _correlation(a: int, b: int, c: int, d: int) -> float:
    """Newcombe's phi, its numerator corrected for continuity where positive."""
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    if margins == 0:
        return 0.0
    excess = float(a * d - b * c)
    if excess > 0:
        excess = max(0.0, excess - (a + b + c + d) / 2)
    return excess / math.sqrt(margins)
