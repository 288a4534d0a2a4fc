"""How alike the task vectors of several finetunes are: a matrix of cosines as an SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from markupsafe import Markup

from components.reporting.rows import shortened

Cosines = Mapping[str, Mapping[str, float]]

NUMBERED, DRAWN = 12, 40
"""Up to so many finetunes the matrix has numbers in its cells; up to so many it is drawn at all."""
_LEFT, _CHARACTERS = 104, 12
_ENDS = ((213, 94, 0), (247, 247, 247), (0, 114, 178))
"""At −1, 0 and 1: Okabe and Ito's vermillion and blue, with white between."""


def matrix_svg(cosines: Cosines) -> Markup:
    """A row and a column for each finetune; an empty cell where one of the two vectors is 0."""
    names = list(cosines)
    side = 46 if len(names) <= NUMBERED else 16
    head = 80
    width, height = _LEFT + side * len(names) + 66, head + side * len(names) + 4
    parts = [
        Markup('<svg class="chart" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img">').format(
            w=width, h=height
        ),
        Markup("<title>cosines between task vectors</title>"),
    ]
    for i, name in enumerate(names):
        at = side * i + side / 2
        label = Markup("{}<title>{}</title>").format(shortened(name, _CHARACTERS), name)
        parts.append(Markup('<text class="label" x="{}" y="{}">{}</text>').format(_LEFT - 8, head + at + 4, label))
        parts.append(
            Markup('<text transform="translate({} {}) rotate(-45)">{}</text>').format(_LEFT + at, head - 6, label)
        )
        for j, other in enumerate(names):
            value = 1.0 if i == j else cosines[name].get(other)
            if value is not None:
                parts.append(_cell(_LEFT + side * j, head + side * i, side, value, f"{name}, {other}: {value:.3f}"))
    return Markup("\n").join([*parts, Markup("</svg>")])


def most_alike(cosines: Cosines, count: int) -> list[tuple[str, str, float]]:
    """The pairs with the largest cosines, whatever their sign: most alike or most opposite."""
    pairs = [(a, b, cosines[a][b]) for a, b in combinations(cosines, 2) if b in cosines[a]]
    return sorted(pairs, key=lambda pair: -abs(pair[2]))[:count]


def _cell(x: int, y: int, side: int, value: float, said: str) -> Markup:
    ink = "#fff" if abs(value) > 0.6 else "#000"
    number: Markup | str = ""
    if side > 30:
        shown = f"{value:.2f}".replace("-", "−")
        number = Markup('<text x="{}" y="{}" text-anchor="middle" style="fill:{}">{}</text>').format(
            x + side / 2 - 1, y + side / 2 + 3, ink, shown
        )
    return Markup('<g><title>{}</title><rect x="{}" y="{}" width="{s}" height="{s}" fill="{c}"/>{n}</g>').format(
        said, x, y, s=side - 2, c=_colour(value), n=number
    )


def _colour(value: float) -> str:
    value = max(-1.0, min(1.0, value))
    middle, end = _ENDS[1], _ENDS[2] if value >= 0 else _ENDS[0]
    mixed: Sequence[int] = [round(a + abs(value) * (b - a)) for a, b in zip(middle, end, strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*mixed)
