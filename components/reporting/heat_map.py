"""How much of its delta a mask keeps, by layer and kind of tensor, as a picture: an SVG without a library, always the same."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

Cells = Mapping[tuple[str, str], float]

OUTSIDE = ""
"""The row of tensors that belong to no layer."""
_ROW, _COLUMN, _LEFT, _TOP, _CHARACTER = 22, 58, 70, 26, 6.2
_COLOURS = (
    (0.0, (253, 231, 37)),
    (0.25, (94, 201, 98)),
    (0.5, (33, 145, 140)),
    (0.75, (59, 82, 139)),
    (1.0, (68, 1, 84)),
)
"""viridis, reversed: light keeps little, dark keeps all; told apart by every kind of eye and in grey."""


@dataclass(frozen=True)
class Grid:
    """Mean kept share of each (layer, kind); a kind that a layer lacks has no cell."""

    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    cells: Cells


def density_grid(tensors: Mapping[str, float]) -> Grid:
    """From tensor name -> kept share. The layer is the first number in a name, the kind what is left of it without numbers
    (experts stored one by one share a cell) and without `weight`."""
    found: dict[tuple[str, str], list[float]] = {}
    for name, kept in tensors.items():
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
        after = re.sub(r"^.*?\.\d+\.", "", name) if numbers else name
        kind = re.sub(r"(?<=\.)\d+\.", "", after).removesuffix(".weight")
        found.setdefault((numbers[0] if numbers else OUTSIDE, kind), []).append(kept)
    layers = sorted({layer for layer, _ in found}, key=lambda one: int(one) if one else -1)
    kinds = list(dict.fromkeys(kind for layer in layers for at, kind in found if at == layer))
    return Grid(tuple(layers), tuple(kinds), {key: sum(v) / len(v) for key, v in found.items()})


def layer_figures(tensors: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """layer -> (mean, spread) of the kept shares of its kinds of tensors; the spread is the largest minus the smallest."""
    grid = density_grid(tensors)
    rows = {layer: [kept for (at, _), kept in grid.cells.items() if at == layer] for layer in grid.layers if layer}
    return {layer: (sum(row) / len(row), max(row) - min(row)) for layer, row in rows.items()}


def density_svg(tensors: Mapping[str, float], *, title: str) -> str:
    """The picture: a row a layer, a column a kind; each cell's number is the share kept in percent."""
    grid = density_grid(tensors)
    longest = max((len(kind) for kind in grid.kinds), default=0)
    head = int(_TOP + longest * _CHARACTER * 0.75)
    width = int(_LEFT + _COLUMN * len(grid.kinds) + longest * _CHARACTER * 0.75)
    height = head + _ROW * len(grid.layers) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11" role="img">',
        f"<title>{escape(title)}</title>",
        f'<text x="4" y="16" font-size="13">{escape(title)}</text>',
    ]
    for i, kind in enumerate(grid.kinds):
        x = _LEFT + _COLUMN * i + _COLUMN // 2
        parts.append(f'<text transform="translate({x} {head - 6}) rotate(-45)">{escape(kind)}</text>')
    for j, layer in enumerate(grid.layers):
        y = head + _ROW * j
        label = f"layer {escape(layer)}" if layer else "no layer"
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 15}" text-anchor="end">{label}</text>')
        for i, kind in enumerate(grid.kinds):
            if (layer, kind) in grid.cells:
                parts.append(_cell(_LEFT + _COLUMN * i, y, grid.cells[layer, kind]))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _cell(x: int, y: int, kept: float) -> str:
    ink = "#fff" if kept > 0.45 else "#000"
    return (
        f'<rect x="{x}" y="{y}" width="{_COLUMN - 2}" height="{_ROW - 2}" fill="{_colour(kept)}"/>'
        f'<text x="{x + _COLUMN // 2 - 1}" y="{y + 15}" text-anchor="middle" fill="{ink}">{100 * kept:.1f}</text>'
    )


def _colour(share: float) -> str:
    share = min(max(share, 0.0), 1.0)
    upper = next(i for i, (at, _) in enumerate(_COLOURS) if share <= at)
    if upper == 0:
        return "#{:02x}{:02x}{:02x}".format(*_COLOURS[0][1])
    (low, a), (high, b) = _COLOURS[upper - 1], _COLOURS[upper]
    part = (share - low) / (high - low)
    return "#{:02x}{:02x}{:02x}".format(*(round(p + part * (q - p)) for p, q in zip(a, b, strict=True)))
