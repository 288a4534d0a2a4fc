"""The landscapes of several models as pictures and one self-contained HTML page.

Other pages have no script, by principle. This one has where a scan has two axes: what a basin looks like from the side, and
where a model lies in it, only shows when the surface is turned by hand, which no picture does. Then plotly's script is in the
page itself, once (4.8 MB: the package has no smaller part that knows surfaces), so that the page still opens from a disk
and asks nobody. The page's policy names both scripts by their hash: a text that slipped through as a script would not run.
Without script or WebGL, and in print, the contours show the same.
"""

from __future__ import annotations

import struct
from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from markupsafe import Markup

from components.errors import EvaluationError
from components.landscape.schema import LandscapeResult
from components.reporting.landscape_curves import FAR, Models, signed
from components.reporting.landscape_lines import lines_png
from components.reporting.landscape_planes import planes_png, surfaces
from components.reporting.landscape_style import DPI
from components.reporting.landscape_tables import (
    FIGURES,
    axis_said,
    figure_rows,
    mean_table,
    measured_rows,
    overview,
    set_rows,
)
from components.reporting.pages import pages
from components.storage import storage_errors, write_atomic

PAGE = "landscape.html"

Drawn = tuple[bytes, bytes]
"""A PNG on a light and on a dark page."""

_SHOWN_DPI = 110
"""Of a picture on the page, in CSS's pixels: its letters are then as large as the page's small ones."""


def write_pictures(out_dir: Path, results: Mapping[str, LandscapeResult], *, title: str) -> list[Path]:
    """Write `<scan>.png` of every scan and the page; returns their paths. The same input gives the same bytes.

    `results`: by the names that the models are shown under, side by side in this order; not every model need have every scan.
    """
    scans = scans_of(results)
    with storage_errors(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
        paths = []
        drawn: dict[str, Drawn] = {}
        for name, models in scans.items():
            drawn[name] = draw(models, confidence=_confidence(results))
            write_atomic(out_dir / f"{name}.png", drawn[name][0])
            paths.append(out_dir / f"{name}.png")
        write_atomic(out_dir / PAGE, render_landscapes(results, drawn, title=title))
    return [*paths, out_dir / PAGE]


def scans_of(results: Mapping[str, LandscapeResult]) -> dict[str, Models]:
    """Scan -> the models that have it. EvaluationError where there is nothing to draw, or a scan is a line of one model and a
    plane of another."""
    names = list(dict.fromkeys(name for one in results.values() for name in one["scans"]))
    found: dict[str, Models] = {
        name: {m: one["scans"][name] for m, one in results.items() if name in one["scans"]} for name in names
    }
    if not found:
        raise EvaluationError("no landscape to draw: no model has a scan")
    for name, models in found.items():
        if Path(name).name != name or name.startswith("."):
            raise EvaluationError(f"scan {name!r}: not a name for a file; rename it")
        if len({len(scan["axes"]) for scan in models.values()}) > 1:
            raise EvaluationError(f"scan {name}: a line of one model and a plane of another; rename one of them")
        empty = [m for m, scan in models.items() if not any(d["points"] for d in scan["directions"])]
        if empty:
            raise EvaluationError(f"scan {name}: no points of {', '.join(empty)}")
    return found


def draw(models: Models, *, confidence: float) -> Drawn:
    """The picture of a scan."""
    one = lines_png if _axes(models) == 1 else planes_png
    return one(models, confidence=confidence), one(models, confidence=confidence, dark=True)


def render_landscapes(results: Mapping[str, LandscapeResult], drawn: Mapping[str, Drawn], *, title: str) -> str:
    """The page as text. `drawn`: scan -> its picture."""
    scans = scans_of(results)
    turned = {name: surfaces(models) for name, models in scans.items() if _axes(models) == 2}
    environment = pages()
    environment.filters.update(signed=signed)
    scripts = [_plotly(), environment.get_template("landscape.js.j2").render()] if turned else []
    return environment.get_template("landscape.html.j2").render(
        title=title,
        models={name: one["model"] for name, one in results.items()},
        sets=set_rows(results),
        confidence=f"{100 * _confidence(results):g} %",
        overview=overview(results, scans),
        scans=[_scan(name, models, drawn[name], turned.get(name)) for name, models in scans.items()],
        far=FAR,
        scripts=[Markup(script) for script in scripts],
        hashes=[f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" for script in scripts],
    )


def _plotly() -> str:
    # Read only where it is needed: most landscapes are lines.
    from plotly.offline import get_plotlyjs

    script = str(get_plotlyjs())
    assert "</script" not in script.lower(), "plotly's script would end its own element"
    return script


def _axes(models: Models) -> int:
    return len(next(iter(models.values()))["axes"])


def _confidence(results: Mapping[str, LandscapeResult]) -> float:
    return next(iter(results.values()))["confidence"]


def _scan(name: str, models: Models, drawn: Drawn, turned: dict[str, Any] | None) -> dict[str, Any]:
    """What the template shows of a scan."""
    rows, further = figure_rows(models)
    light, dark = (Markup(f"data:image/png;base64,{b64encode(one).decode()}") for one in drawn)
    return {
        "name": name,
        "axes": axis_said(models),
        "directions": max(len(scan["directions"]) for scan in models.values()),
        "models": list(models),
        "light": light,
        "dark": dark,
        # A PNG's width in pixels is in its header: https://www.w3.org/TR/png-3/#11IHDR.
        "width": struct.unpack(">I", drawn[0][16:20])[0] * _SHOWN_DPI // DPI,
        "surface": turned,
        "rows": rows,
        "further": further,
        "figures": {key: name for key, name in FIGURES.items() if any(key in row.cells for row in rows)},
        "means": mean_table(models),
        "measured": measured_rows(models),
        "marks": [
            (model, direction["direction"], mark)
            for model, scan in models.items()
            for direction in scan["directions"]
            for mark in direction["marks"]
        ],
    }
