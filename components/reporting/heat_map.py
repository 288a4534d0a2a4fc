"""How much of its delta a mask keeps, by layer and kind of tensor, as a picture: an SVG without a library, always the same."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

Cells = Mapping[tuple[str, str], float]

OUTSIDE = ""
"""The row of tensors that belong to no layer."""
_ROW, _COLUMN, _LEFT, _TOP, _CHARACTER, _WIDE = 22, 58, 76, 36, 6.2, 7.5
"""`_CHARACTER`: the width of one of a label, `_WIDE` of the title."""
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
        found.setdefault(_place(name), []).append(kept)
    layers = sorted({layer for layer, _ in found}, key=lambda one: int(one) if one else -1)
    kinds = list(dict.fromkeys(kind for layer in layers for at, kind in found if at == layer))
    return Grid(tuple(layers), tuple(kinds), {key: sum(v) / len(v) for key, v in found.items()})


def _place(name: str) -> tuple[str, str]:
    """(layer, kind) of a tensor."""
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
    after = re.sub(r"^.*?\.\d+\.", "", name) if numbers else name
    kind = re.sub(r"(?<=\.)\d+\.", "", after).removesuffix(".weight")
    return numbers[0] if numbers else OUTSIDE, kind


def layer_figures(tensors: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """layer -> (mean, spread) of the kept shares of its kinds of tensors; the spread is the largest minus the smallest."""
    grid = density_grid(tensors)
    rows = {layer: [kept for (at, _), kept in grid.cells.items() if at == layer] for layer in grid.layers if layer}
    return {layer: (sum(row) / len(row), max(row) - min(row)) for layer, row in rows.items()}


def norm_grid(tensors: Mapping[str, Mapping[str, float]]) -> Grid:
    """‖τ‖ / ‖aligned‖ of each (layer, kind), from tensor name -> norm, aligned_norm. A kind whose aligned weights are all 0 in
    a layer has no cell there."""
    squares = [{name: found[key] ** 2 for name, found in tensors.items()} for key in ("norm", "aligned_norm")]
    moved, aligned = (_summed(one) for one in squares)
    grid = density_grid(dict.fromkeys(tensors, 0.0))
    ratios = {key: (moved[key] / aligned[key]) ** 0.5 for key in grid.cells if aligned[key] > 0}
    return Grid(grid.layers, grid.kinds, ratios)


def _summed(tensors: Mapping[str, float]) -> dict[tuple[str, str], float]:
    sums: dict[tuple[str, str], float] = {}
    for name, value in tensors.items():
        layer, kind = _place(name)
        sums[layer, kind] = sums.get((layer, kind), 0.0) + value
    return sums


def thinned(grid: Grid, most: int) -> Grid:
    """With at most so many rows of layers: neighbouring layers together, each cell their mean."""
    inner = [layer for layer in grid.layers if layer]
    size = -(-len(inner) // max(1, most))
    if size <= 1:
        return grid
    groups = {OUTSIDE: [OUTSIDE]} if OUTSIDE in grid.layers else {}
    for at in range(0, len(inner), size):
        some = inner[at : at + size]
        groups[f"{some[0]}–{some[-1]}" if len(some) > 1 else some[0]] = some
    cells: dict[tuple[str, str], float] = {}
    for label, layers in groups.items():
        for kind in grid.kinds:
            found = [grid.cells[layer, kind] for layer in layers if (layer, kind) in grid.cells]
            if found:
                cells[label, kind] = sum(found) / len(found)
    return Grid(tuple(groups), grid.kinds, cells)


def density_svg(tensors: Mapping[str, float], *, title: str) -> str:
    """The picture: a row a layer, a column a kind; each cell's number is the share kept in percent."""
    return grid_svg(density_grid(tensors), title=title)


def grid_svg(grid: Grid, *, title: str, most: float = 1.0) -> str:
    """The picture of a grid of shares; each cell's number is its share in percent, its colour the share of `most`."""
    longest = max((len(kind) for kind in grid.kinds), default=0)
    head = int(_TOP + longest * _CHARACTER * 0.75)
    width = int(max(_LEFT + _COLUMN * len(grid.kinds) + longest * _CHARACTER * 0.75, 8 + _WIDE * len(title)))
    height = head + _ROW * len(grid.layers) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11" role="img" fill="currentColor">',
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
                parts.append(_cell(_LEFT + _COLUMN * i, y, grid.cells[layer, kind], most))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _cell(x: int, y: int, share: float, most: float) -> str:
    part = share / most if most else 0.0
    ink = "#fff" if part > 0.45 else "#000"
    return (
        f'<rect x="{x}" y="{y}" width="{_COLUMN - 2}" height="{_ROW - 2}" fill="{_colour(part)}"/>'
        f'<text x="{x + _COLUMN // 2 - 1}" y="{y + 15}" text-anchor="middle" fill="{ink}">{100 * share:.1f}</text>'
    )


def _colour(share: float) -> str:
    share = min(max(share, 0.0), 1.0)
    upper = next(i for i, (at, _) in enumerate(_COLOURS) if share <= at)
    if upper == 0:
        return "#{:02x}{:02x}{:02x}".format(*_COLOURS[0][1])
    (low, a), (high, b) = _COLOURS[upper - 1], _COLOURS[upper]
    part = (share - low) / (high - low)
    return "#{:02x}{:02x}{:02x}".format(*(round(p + part * (q - p)) for p, q in zip(a, b, strict=True)))
