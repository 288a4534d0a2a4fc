"""Charts of intervals as SVG that stands in a page: no script, and colours that follow the page's (style.html.j2).

Every kind of mark has a shape of its own beside its colour, so that it is told apart in grey, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from components.reporting.rows import compact, shortened
from components.reporting.schema import Interval

_WIDTH, _LEFT, _RIGHT, _TOP, _ROW = 460, 132, 22, 30, 30
_STEPS = (0.01, 0.02, 0.05, 0.1, 0.25)
_LONGEST = 16

SHAPES = {"aligned": "bar", "before": "circle", "after": "diamond", "first": "circle", "second": "diamond"}
"""Kind of mark -> its shape; its colour is the page's variable of that name."""
_ENDS = ("before", "after", "first", "second")
"""Kinds between which something changed; the aligned model stands beside them."""


@dataclass(frozen=True)
class Mark:
    """An interval, and which kind of model it is of (a key of SHAPES)."""

    kind: str
    interval: Interval


@dataclass(frozen=True)
class Line:
    """A row of a chart: what it is of, and its marks from top to bottom."""

    label: str
    marks: tuple[Mark, ...]


def interval_chart(lines: Sequence[Line], *, title: str, whole: bool = True) -> Markup:
    """A row for each line, the share along it in percent; what was and what became of it are joined. `whole`: from 0 to
    100, else as far as the intervals go."""
    ends = [mark.interval["high"] for line in lines for mark in line.marks]
    step = 0.25 if whole else next((s for s in _STEPS if max(ends, default=0) <= 4 * s), 0.25)
    most = 1.0 if whole else min(1.0, step * math.ceil(max(ends, default=step) / step) or step)
    height = _TOP + _ROW * len(lines) + 24
    parts = [
        Markup(
            '<svg class="chart" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img"><title>{title}</title>'
        ).format(w=_WIDTH, h=height, title=title),
        Markup('<text class="head" x="0" y="14">{}</text>').format(title),
    ]
    ticks = [step * i for i in range(round(most / step) + 1)]
    for tick in ticks:
        x = _x(tick, most)
        parts.append(Markup('<path class="grid" d="M{x} {a}V{b}"/>').format(x=x, a=_TOP - 4, b=height - 22))
        parts.append(Markup('<text class="tick" x="{x}" y="{y}">{t:g}</text>').format(x=x, y=height - 8, t=100 * tick))
    for i, line in enumerate(lines):
        parts.append(_line(line, _TOP + _ROW * i, most))
    return Markup("\n").join([*parts, Markup("</svg>")])


def key(kinds: Mapping[str, str]) -> Markup:
    """What the shapes mean: kind -> word."""
    items = [
        Markup('<span class="key"><svg width="16" height="14" aria-hidden="true">{}</svg> {}</span>').format(
            _shape(kind, 8, 7), said
        )
        for kind, said in kinds.items()
    ]
    return Markup('<p class="keys">{}</p>').format(Markup(" ").join(items))


def _line(line: Line, top: int, most: float) -> Markup:
    middle = top + _ROW / 2
    spread = 12 / max(1, len(line.marks) - 1) if len(line.marks) > 1 else 0
    heights = [middle + spread * (i - (len(line.marks) - 1) / 2) for i in range(len(line.marks))]
    parts = [
        Markup('<text class="label" x="{x}" y="{y}">{short}<title>{label}</title></text>').format(
            x=_LEFT - 10, y=middle + 4, short=shortened(line.label, _LONGEST), label=line.label
        )
    ]
    ends = [(mark, y) for mark, y in zip(line.marks, heights, strict=True) if mark.kind in _ENDS]
    if len(ends) == 2:
        (a, ya), (b, yb) = ends
        parts.append(
            Markup('<path class="join" d="M{} {}L{} {}"/>').format(
                _x(a.interval["value"], most), _n(ya), _x(b.interval["value"], most), _n(yb)
            )
        )
    for mark, y in zip(line.marks, heights, strict=True):
        found = mark.interval
        said = f"{line.label}, {mark.kind}: {compact(found)} %, n = {found['n']}"
        parts.append(
            Markup('<g><title>{said}</title><path class="reach {kind}" d="M{low} {y}H{high}"/>{shape}</g>').format(
                said=said, kind=mark.kind, low=_x(found["low"], most), high=_x(found["high"], most), y=_n(y),
                shape=_shape(mark.kind, _x(found["value"], most), y),
            )
        )  # fmt: skip
    return Markup("").join(parts)


def _shape(kind: str, x: float, y: float) -> Markup:
    """A mark's shape with its middle at (x, y)."""
    shape = SHAPES[kind]
    if shape == "circle":
        return Markup('<circle class="mark hollow {}" cx="{}" cy="{}" r="4.2"/>').format(kind, _n(x), _n(y))
    paths = {"diamond": "M{x} {a}L{r} {y}L{x} {b}L{l} {y}Z", "bar": "M{x} {a}V{b}"}
    path = paths[shape].format(x=_n(x), y=_n(y), a=_n(y - 5.5), b=_n(y + 5.5), l=_n(x - 5.5), r=_n(x + 5.5))
    return Markup('<path class="mark {} {}" d="{}"/>').format(shape, kind, path)


def _x(share: float, most: float) -> float:
    return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * min(share / most, 1.0), 1)


def _n(value: float) -> str:
    return f"{value:.1f}"
