"""The Pareto front of what was tried, its hypervolume, and which one wins. Points are losses: less is better."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from components.errors import EvaluationError
from components.sweeps.settings import Objective, Pick
from components.sweeps.trials import Scored

Point = Sequence[float]
Key = tuple[float, ...]


def dominates(first: Point, second: Point) -> bool:
    """At least as good everywhere, better somewhere."""
    return all(a <= b for a, b in zip(first, second, strict=True)) and tuple(first) != tuple(second)


def pareto_front(points: Sequence[Point]) -> list[int]:
    """Indices of those that none dominates, in their order; equal points are all there."""
    return [i for i, one in enumerate(points) if not any(dominates(other, one) for other in points)]


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """The volume between the points and `reference` that they dominate; a point beyond the reference anywhere has none.

    Exact, by cutting along the last objective (HSO; While et al. 2006, IEEE Trans. Evolutionary Computation 10, 29-38): meant
    for some hundred points of up to four objectives.
    """
    inside = {tuple(p) for p in points if all(a < r for a, r in zip(p, reference, strict=True))}
    if not inside:
        return 0.0
    if len(reference) == 1:
        return reference[0] - min(p[0] for p in inside)
    slices = sorted(inside, key=lambda p: p[-1])
    total = 0.0
    for i, point in enumerate(slices):
        end = slices[i + 1][-1] if i + 1 < len(slices) else reference[-1]
        if end > point[-1]:
            total += (end - point[-1]) * hypervolume([p[:-1] for p in slices[: i + 1]], reference[:-1])
    return total


def reference_of(objectives: Sequence[Objective]) -> tuple[float, ...]:
    """Where the volume of a front ends: at the demands, and at the worst there is where none is made. A hair beyond, so that
    what just keeps a demand counts."""
    return tuple(one.most_loss + 1e-9 for one in objectives)


def knee(points: Sequence[Point]) -> int:
    """Of the front, where giving up more of one objective stops paying in the others: the least sum of losses when each is
    counted from the front's least to its most. With two objectives that is the point furthest from the line through the
    front's ends (Das 1999, Structural Optimization 18, 107-115). The first of equals."""
    front = pareto_front(points)
    lows = [min(points[i][axis] for i in front) for axis in range(len(points[0]))]
    spans = [max(points[i][axis] for i in front) - low for axis, low in enumerate(lows)]

    def given_up(index: int) -> float:
        return sum((x - low) / span for x, low, span in zip(points[index], lows, spans, strict=True) if span > 0)

    return min(front, key=given_up)


def ranking(objectives: Sequence[Objective], rule: Pick, usual: Point | None) -> Callable[[Point], Key]:
    """What losses are judged by under `skill` or `safest`, what counts most first. No part of it falls as a loss grows.

    First how far demands are missed in all. `skill`: then whether it is worse than `usual` (the run's own settings) in an
    objective that has no demand, for what nobody made a demand on is not traded away; then lost skill, then whether it is worse
    than `usual` in any other objective, then the other losses. `safest`: attack success and harm, then lost skill, then the
    others.
    """
    skill = [one.grows for one in objectives]
    harm = [one.metric in ("asr", "harmful") for one in objectives]
    held = [one.demand is None and not one.grows for one in objectives]

    def key(losses: Point) -> Key:
        missed = sum(max(0.0, loss - one.most_loss) for loss, one in zip(losses, objectives, strict=True))
        lost = sum(loss for loss, own in zip(losses, skill, strict=True) if own)
        others = sum(loss for loss, own in zip(losses, skill, strict=True) if not own)
        if rule == "safest":
            return _rounded(missed, sum(loss for loss, own in zip(losses, harm, strict=True) if own), lost, others)
        worse = [loss > before for loss, before in zip(losses, usual or losses, strict=True)]
        traded = any(one and own for one, own in zip(worse, held, strict=True))
        unsafer = any(one and not own for one, own in zip(worse, skill, strict=True))
        return _rounded(missed, float(traded), lost, float(unsafer), others)

    return key


def _rounded(*parts: float) -> Key:
    """Sums of rates in another order are not another rank."""
    return tuple(round(part, 9) for part in parts)


def in_reach(key: Key, keys: Sequence[Key], rule: Pick, tolerance: float) -> bool:
    """Whether one with this key, or one with any part of it greater, could win among those with `keys`, or would change who of
    them does."""
    if rule != "skill":
        return key < min(keys)
    tier = min(one[:2] for one in keys)
    least = min(one[2] for one in keys if one[:2] == tier)
    return key[:2] < tier or (key[:2] == tier and key[2] <= round(least + tolerance, 9))


def best(
    scored: Sequence[Scored],
    objectives: Sequence[Objective],
    rule: Pick,
    usual: Scored | None,
    *,
    tolerance: float = 0.02,
) -> int:
    """Index of the winner among candidates that were asked everything, the first of equals; `usual` is the run's own settings,
    if it is among them.

    `safest` is the least in what `ranking` says. `skill` takes skill that is within `tolerance` of the most there is for equal,
    and of these one that is nowhere worse than `usual`, if there is one, with the least of the other losses: two prompts in a
    hundred are no reason to be less safe. `knee` is that of the candidates that keep every demand, or miss them by the least.
    Raises EvaluationError where there is none to choose from.
    """
    if not scored:
        raise EvaluationError("no candidate was asked every prompt: there is none to pick")
    points = [one.losses(objectives) for one in scored]
    rank = ranking(objectives, rule, None if usual is None else usual.losses(objectives))
    keys = [rank(point) for point in points]
    if rule == "safest":
        return min(range(len(points)), key=keys.__getitem__)
    if rule == "skill":
        equal = [index for index, key in enumerate(keys) if in_reach(key, keys, rule, tolerance)]
        return min(equal, key=lambda index: keys[index][:2] + keys[index][3:] + keys[index][2:3])
    least = min(key[0] for key in keys)
    keeping = [index for index, key in enumerate(keys) if key[0] == least]
    return keeping[knee([points[index] for index in keeping])]
