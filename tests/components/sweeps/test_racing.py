"""Bounds against the exact distribution counted out, and races whose winner is known."""

from __future__ import annotations

import random
from fractions import Fraction
from math import comb

import pytest

from components.sweeps.front import best
from components.sweeps.racing import Race, least_count
from components.sweeps.settings import DEFAULT_OBJECTIVES, Objective
from components.sweeps.trials import Scored

ALL = {"asr": 100, "task": 100, "over_refusal": 100}


def tail(seen: int, asked: int, count: int, hits: int) -> Fraction:
    """The chance of at least `seen` hits among `asked` of `count`, by counting."""
    ways = sum(comb(hits, k) * comb(count - hits, asked - k) for k in range(seen, min(hits, asked) + 1))
    return Fraction(ways, comb(count, asked))


@pytest.mark.parametrize("count", [7, 20])
@pytest.mark.parametrize("doubt", [0.05, 0.002])
def test_the_bound_is_the_least_number_of_hits_that_is_not_ruled_out(count: int, doubt: float) -> None:
    for asked in range(1, count + 1):
        for seen in range(asked + 1):
            possible = range(seen, count - (asked - seen) + 1)
            want = next(k for k in possible if tail(seen, asked, count, k) > doubt)
            assert least_count(seen, asked, count, doubt) == (want if seen else 0)
    assert [least_count(k, count, count, doubt) for k in range(count + 1)] == list(range(count + 1))


def part(losses: tuple[int, int, int], asked: int, seed: int = 0) -> Scored:
    """A candidate that loses so many of 100, the first `asked` prompts of a mixed order."""
    hits = {}
    for objective, lost in zip(DEFAULT_OBJECTIVES, losses, strict=True):
        string = ["01"[objective.grows ^ (k < lost)] for k in range(100)]
        random.Random(f"{seed}{objective.name}{losses}").shuffle(string)
        hits[objective.name] = "".join(string[:asked])
    return Scored({"seed": seed, "losses": str(losses)}, hits)


def test_samples_double_and_those_with_a_demand_come_first() -> None:
    race = Race(DEFAULT_OBJECTIVES, {"asr": 100, "task": 30, "over_refusal": 5})
    asked: dict[str, int] = {}
    seen = []
    while (more := race.next_sample(asked)) is not None:
        asked = more
        seen.append(tuple(asked.get(one.name, 0) for one in DEFAULT_OBJECTIVES))
    assert seen == [(16, 0, 0), (16, 16, 5), (32, 16, 5), (32, 30, 5), (64, 30, 5), (100, 30, 5)]


def test_a_last_step_is_never_a_small_one() -> None:
    race = Race(DEFAULT_OBJECTIVES[:1], {"asr": 70}, sample=16)
    assert [race.next_sample({"asr": n}) for n in (0, 16, 32, 70)] == [{"asr": 16}, {"asr": 32}, {"asr": 70}, None]


def bound(candidate: Scored, asked: int) -> str:
    """What asr will be at least, when four looks at three objectives are to be wrong 1 time in 20."""
    seen = candidate.hits["asr"].count("1")
    hits = next(k for k in range(seen, 101) if tail(seen, asked, 100, k) > 0.05 / 12)
    return f"{hits / 100:.3g}"


@pytest.mark.parametrize(
    ("losses", "asked", "others", "why"),
    [
        ((90, 0, 0), 16, [(0, 50, 0)], "asr will be at least {bound}, 0.05 is demanded"),
        # None keeps the demand, and the other is nearer, or further away.
        ((90, 50, 0), 16, [(20, 0, 0)], "another is at least as good on every objective"),
        ((30, 0, 0), 64, [(90, 50, 0)], None),
        ((0, 60, 0), 32, [(0, 1, 1)], "(asr 0, task 0.99, over_refusal 0.01)"),
        ((0, 60, 0), 32, [(4, 1, 1)], None),  # the front has use for it
        ((0, 0, 0), 16, [(0, 0, 0)], "another is at least as good"),  # equals come later
        ((0, 0, 0), 16, [(0, 2, 0)], None),  # within the tolerance, and may yet win
        ((0, 1, 0), 64, [(0, 4, 0)], None),
    ],
)
def test_why_a_candidate_cannot_win(
    losses: tuple[int, int, int], asked: int, others: list[tuple[int, int, int]], why: str | None
) -> None:
    full, candidate = [part(one, 100) for one in others], part(losses, asked)
    said = Race(DEFAULT_OBJECTIVES, ALL).verdict(candidate, full, full[0])
    if why is None:
        assert said is None
    else:
        assert said is not None
        assert why.format(bound=bound(candidate, asked)) in said


def test_the_tolerance_is_a_share_of_the_range_in_which_an_objective_counts() -> None:
    """Of three objectives that are near the best there is, the front loses up to the tolerance and no more."""
    race = Race(DEFAULT_OBJECTIVES, ALL, tolerance=0.03)
    worse = part((0, 40, 0), 64)
    assert race.verdict(worse, [part((0, 3, 3), 100)], None) is not None
    assert race.verdict(worse, [part((0, 3, 4), 100)], None) is None
    assert race.verdict(worse, [part((1, 3, 3), 100)], None) is None  # 0.03 of 0.05 is less than a hundredth
    assert Race(DEFAULT_OBJECTIVES, ALL, tolerance=0.2).verdict(worse, [part((1, 3, 3), 100)], None) is not None


def test_only_those_who_were_asked_everything_stop_others() -> None:
    race = Race(DEFAULT_OBJECTIVES, ALL)
    assert race.verdict(part((90, 90, 90), 64), [part((0, 0, 0), 64)], None) is None
    assert not part((0, 0, 0), 64).is_full(ALL)
    assert part((0, 0, 0), 100).is_full(ALL)


def test_a_demand_that_is_just_kept_is_kept() -> None:
    wanted = (Objective(metric="task", at_least=0.9), Objective(metric="asr", at_most=0.07))
    race = Race(wanted, {"task": 100, "asr": 100}, confidence=0.6)
    ten, seven = "0" * 10 + "1" * 90, "1" * 7 + "0" * 93
    perfect = Scored({}, {"task": "1" * 100, "asr": "1" * 7 + "0" * 93})
    said = race.verdict(Scored({"scale": 2.0}, {"task": ten, "asr": seven}), [perfect], None)
    assert said is None or "demanded" not in said


def race_out(candidates: list[tuple[int, int, int]], seed: int, confidence: float) -> tuple[bool, float]:
    """Whether the winner of a race in one order of prompts is the one of full scoring, and the share of prompts spent."""
    race = Race(DEFAULT_OBJECTIVES, ALL, confidence=confidence)
    full = [part(losses, 100, seed) for losses in candidates]
    done, spent = [full[0]], 300
    for one in full[1:]:
        asked: dict[str, int] = {}
        found = one
        while (more := race.next_sample(asked)) is not None:
            asked = more
            found = Scored(one.candidate, {name: hits[: asked.get(name, 0)] for name, hits in one.hits.items()})
            if found.is_full(ALL) or race.verdict(found, done, full[0]) is not None:
                break
        spent += sum(asked.values())
        done.append(found)
    finished = [one for one in done if one.is_full(ALL)]
    winner = finished[best(finished, DEFAULT_OBJECTIVES, "skill", full[0])]
    return winner.hits == full[best(full, DEFAULT_OBJECTIVES, "skill", full[0])].hits, (spent / (300 * len(full)))


def test_the_winner_is_stopped_no_more_often_than_is_said() -> None:
    generator = random.Random(7)
    candidates = [(3, 20, 1)]
    candidates += [
        (generator.choice([0, 4, 6, 9, 30, 90]), generator.randrange(60), generator.choice([0, 1, 2]))
        for _ in range(40)
    ]
    ran = [race_out(candidates, seed, 0.6) for seed in range(30)]
    assert sum(same for same, _ in ran) >= 0.6 * len(ran)
    assert sum(share for _, share in ran) / len(ran) < 0.5
    strict = [race_out(candidates, seed, 0.95) for seed in range(10)]
    assert all(same for same, _ in strict)
