"""How pictures of a landscape look: colours, sizes, titles, and how a figure becomes a PNG that is always the same.

Colours are Okabe and Ito's (https://jfly.uni-koeln.de/color), viridis and cividis: told apart by every kind of eye.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from components.landscape.schema import POOLED, ScanResult
from components.reporting.landscape_curves import Key, tenths
from components.reporting.rows import shortened

VERMILLION, BLUE, SKY, GREEN, ORANGE, PINK, GREY = (
    "#D55E00",
    "#0072B2",
    "#56B4E9",
    "#009E73",
    "#E69F00",
    "#CC79A7",
    "#8A8A8A",
)
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
PER_ROW = 4
"""Models side by side; further ones are in the next row."""
DPI = 160

_ALL = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "text.parse_math": False,
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
}


def _inks(ink: str, soft: str, line: str, back: str) -> dict[str, str]:
    """The page's colours (style.html.j2), as matplotlib's settings."""
    return {
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": soft,
        "xtick.color": soft,
        "ytick.color": soft,
        "grid.color": line,
        "axes.facecolor": back,
        "figure.facecolor": back,
        "savefig.facecolor": back,
    }


_LIGHT = _inks("#1c2024", "#60646c", "#d9dce1", "#ffffff")
_DARK = _inks("#e6e8eb", "#a0a6ae", "#363b42", "#15181c")


@contextmanager
def looks(dark: bool) -> Iterator[None]:
    """matplotlib's own defaults with ours on them, whatever the user's matplotlibrc says."""
    with style.context(["default", _ALL, _DARK if dark else _LIGHT]):
        yield


def figure(width: float, height: float) -> Figure:
    """With a canvas that needs no screen, and no state shared with other figures."""
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def panels(made: Figure, models: int, heights: Sequence[float]) -> list[list[list[Axes]]]:
    """Row of models -> model -> its panels, one above the other, their heights' ratios given. Spare models at the end of the
    last row are there and not drawn."""
    rows, columns = -(-models // PER_ROW), min(models, PER_ROW)
    grid = made.subplots(
        rows * len(heights), columns, squeeze=False, gridspec_kw={"height_ratios": list(heights) * rows}
    )
    found = [
        [list(grid[row * len(heights) : (row + 1) * len(heights), column]) for column in range(columns)]
        for row in range(rows)
    ]
    for ax in [ax for column in found[-1][(models - 1) % PER_ROW + 1 :] for ax in column]:
        ax.set_axis_off()
    return found


def png(made: Figure) -> bytes:
    """Without what changes from day to day or from one version of matplotlib to the next."""
    out = BytesIO()
    made.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def title(ax: Axes, model: str, scan: ScanResult, keys: Sequence[Key], *, above: float = 0) -> None:
    """A model's name over its column, and VISAGE with its interval of the first attack curve; `above`: points left free for
    marks."""
    name = keys[0][0] if keys else POOLED
    found = scan["numbers"].get(name, {}).get("asr", {}).get("visage")
    said = "VISAGE not known"
    if found is not None:
        low, high = found["low"], found["high"]
        if low is None or high is None:
            low, high = found["prompts_low"], found["prompts_high"]
        said = f"VISAGE {tenths(found['value'])} ({tenths(low)}–{tenths(high)})"
    ax.set_title(f"{shortened(model, 28)}\n{said}", pad=6 + above)


def interval_said(scans: Sequence[ScanResult], confidence: float) -> str:
    """What the interval in the titles is of."""
    counts = sorted({len(scan["directions"]) for scan in scans}, reverse=True)
    of = [f"over {n} directions" if n > 1 else "over the prompts" for n in counts]
    return f"VISAGE with its {100 * confidence:g} % interval {', or '.join(of)}"
