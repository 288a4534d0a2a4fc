"""The Pareto front of what was tried, its hypervolume, and the one that is picked. Points are losses: less is better."""

from __future__ import annotations

from collections.abc import Sequence

Point = Sequence[float]


def dominates(first: Point, second: Point) -> bool:
    """At least as good everywhere, better somewhere."""
    return all(a <= b for a, b in zip(first, second, strict=True)) and tuple(first) != tuple(second)


def pareto_front(points: Sequence[Point]) -> list[int]:
    """Indices of those that none dominates, in their order; equal points are all there."""
    return [i for i, one in enumerate(points) if not any(dominates(other, one) for other in points)]


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """The volume between the points and `reference` that they dominate; a point beyond the reference anywhere has none.

    Exact, by cutting along the last objective (Zitzler 1999): meant for some hundred points of up to four objectives.
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
