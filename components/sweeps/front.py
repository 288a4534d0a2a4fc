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
    """What orders losses by `skill` or `safest`: the least key wins, the first of equals. It never falls as a loss grows.

    First by how far demands are missed in all. `skill`: then those that are worse than `usual` (the run's own settings) in an
    objective that has no demand come behind: what nobody made a demand on is not traded away; then by lost skill, then by the
    other losses. `safest`: by attack success and harm, then by lost skill, then by the others.
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
        traded = usual is not None and any(
            own and loss > before for loss, before, own in zip(losses, usual, held, strict=True)
        )
        return _rounded(missed, float(traded), lost, others)

    return key


def _rounded(*parts: float) -> Key:
    """Sums of rates in another order are not another rank."""
    return tuple(round(part, 9) for part in parts)


def best(scored: Sequence[Scored], objectives: Sequence[Objective], rule: Pick, usual: Scored | None) -> int:
    """Index of the winner among candidates that were asked everything; `usual` is the run's own settings, if it is among them.

    `knee` is that of the candidates that keep every demand, or miss them by the least. Raises EvaluationError where there is
    none to choose from.
    """
    if not scored:
        raise EvaluationError("no candidate was asked every prompt: there is none to pick")
    points = [one.losses(objectives) for one in scored]
    rank = ranking(objectives, rule, None if usual is None else usual.losses(objectives))
    if rule != "knee":
        return min(range(len(points)), key=lambda index: rank(points[index]))
    least = min(rank(point)[0] for point in points)
    keeping = [index for index, point in enumerate(points) if rank(point)[0] == least]
    return keeping[knee([points[index] for index in keeping])]
