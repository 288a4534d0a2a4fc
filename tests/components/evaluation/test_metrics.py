from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats
from scipy.stats import binomtest

from components.errors import EvaluationError
from components.evaluation.metrics import mcnemar, paired_difference, rate, wilson


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_equals_scipy(confidence: float) -> None:
    for n in (1, 2, 7, 80, 200, 1000):
        for k in {0, 1, n // 3, n // 2, n - 1, n}:
            theirs = binomtest(k, n).proportion_ci(confidence_level=confidence, method="wilson")
            assert wilson(k, n, confidence=confidence) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_rate() -> None:
    assert rate([True, False, False, False]) == pytest.approx(
        {"value": 0.25, "low": 0.0456, "high": 0.6994, "n": 4}, abs=1e-4
    )
    nothing = rate([False] * 200)
    assert nothing["value"] == nothing["low"] == 0.0
    assert nothing["high"] == pytest.approx(0.01885, abs=1e-5)


def test_nothing_to_count_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="no answers"):
        rate([])
    with pytest.raises(EvaluationError, match="no prompts"):
        paired_difference([], [])
    with pytest.raises(EvaluationError, match="not 1 and 2"):
        paired_difference([True], [True, False])


def test_mcnemar_worked_examples() -> None:
    # 1 against 7 discordant pairs: 2 (C(8,0) + C(8,1)) / 2^8 = 18/256.
    assert mcnemar(1, 7) == 18 / 256
    assert mcnemar(7, 1) == 18 / 256
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 10) == 2 / 1024
    for b, c in itertools.product((3, 12, 40), (0, 9, 25)):
        assert mcnemar(b, c) == pytest.approx(binomtest(b, b + c).pvalue, rel=1e-9)


def pairs(both: int, first: int, second: int, neither: int) -> tuple[list[bool], list[bool]]:
    left = [True] * (both + first) + [False] * (second + neither)
    right = [True] * both + [False] * first + [True] * second + [False] * neither
    return left, right


@pytest.mark.parametrize(
    ("table", "diff", "low", "high"),
    [
        # Newcombe 1998 (paired), 36, 12, 2, 0; and the airway example of Fagerland et al., 1, 1, 7, 12.
        ((36, 12, 2, 0), 0.2, 0.0569, 0.3404),
        ((1, 1, 7, 12), -6 / 21, -0.507, -0.026),
    ],
)
def test_paired_interval_of_published_tables(
    table: tuple[int, int, int, int], diff: float, low: float, high: float
) -> None:
    found = paired_difference(*pairs(*table))
    assert found["diff"] == pytest.approx(diff)
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=5e-4)
    assert found["p"] == mcnemar(table[1], table[2])


def test_paired_interval_has_width_where_a_bootstrap_would_have_none() -> None:
    left, right = pairs(0, 200, 0, 0)
    found = paired_difference(left, right)
    assert found["diff"] == found["high"] == 1.0
    assert 0.95 < found["low"] < 1.0
    same = paired_difference([True] * 100, [True] * 100)
    assert same["low"] < 0.0 < same["high"]


def test_paired_interval_agrees_with_the_bootstrap_on_large_samples() -> None:
    left, right = pairs(800, 300, 200, 700)
    found = paired_difference(left, right)
    sampled = stats.bootstrap(
        (left, right), lambda a, b, axis: np.mean(a, axis) - np.mean(b, axis), paired=True, vectorized=True,
        method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    assert (found["low"], found["high"]) == pytest.approx((sampled.low, sampled.high), abs=0.003)
