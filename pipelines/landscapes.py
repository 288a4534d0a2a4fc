"""What a run's landscapes say: their part of the summary, of the gate and of tracking, and the pages with their pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from components.errors import StorageError
from components.landscape.figures import FIGURES, figures_of
from components.landscape.gating import Drawn
from components.landscape.points import Point, read_points
from components.landscape.schema import LandscapeResult
from components.landscape.settings import Scan
from components.records import Record
from components.reporting.schema import Figure, FinetuneSummary, LandscapeSummary, RunSummary
from components.storage import storage_errors, write_atomic
from pipelines.driver import RunState
from ray_jobs.stage import code_version

RESULT, POINTS = "landscape.json", "points.jsonl"
STEPS = {"before": "landscape_before", "between": "landscape_between", "realigned": "landscape"}
"""Key in the summary -> step."""
ALIGNED = "landscape_aligned"
_STAMP = ".made-of"


def add_landscapes(run: RunState, summary: RunSummary) -> None:
    """Fill in what was drawn, and draw the pages: of each finetune one with the aligned model, the finetune and the selected
    form side by side."""
    if run.config.landscape is None:
        return
    aligned = run.record(None, ALIGNED)
    if aligned is not None:
        summary["landscape"] = _summary(run, aligned)
    for entry in summary["finetunes"]:
        records = {key: record for key, step in STEPS.items() if (record := run.record(entry["name"], step))}
        if records:
            entry["landscape"] = {cast("Any", key): _summary(run, record) for key, record in records.items()}
            entry["pictures"] = str(_write_page(run, entry, aligned, records))


def visage_scan(run: RunState) -> Scan | None:
    """The scan whose VISAGE is the model's."""
    return run.config.landscape.visage_scan if run.config.landscape is not None else None


def drawn_of(run: RunState, name: str, whose: Literal["aligned", "finetune", "realigned"]) -> Drawn | None:
    """The random scan of one of a finetune's models, None where it was not drawn. Raises StorageError for points that are
    missing or damaged."""
    section, scan = run.config.landscape, visage_scan(run)
    step = {"aligned": ALIGNED, "finetune": STEPS["before"], "realigned": STEPS["realigned"]}[whose]
    record = run.record(None if whose == "aligned" else name, step)
    if section is None or scan is None or record is None:
        return None
    points = [point for point in _points(run.result_dir(record) / POINTS) if point.scan == scan.name]
    sets = section.sets_of(run.config.sets_of(name), whose=name)
    harmful = [one for one in record.semantics["sets"] if one["kind"] == "harmful"]
    asked = [record.semantics["evaluation"], record.semantics["landscape"]["limit"], harmful]
    return Drawn(scan, points, sets, asked)


def _points(path: Path) -> list[Point]:
    try:
        with storage_errors(path):
            found = read_points(path)
    except (ValueError, KeyError, TypeError):
        found = []
    if not found:  # a landscape has some
        raise StorageError(f"{path}: missing or damaged; remove {path.parent} and run again to draw it anew")
    return found


def landscape_metrics(prefix: str, found: LandscapeSummary | None) -> dict[str, float]:
    """`prefix/visage`, `prefix/visage_low`, … for a tracker."""
    metrics: dict[str, float] = {}
    for name in FIGURES:
        figure = cast("Mapping[str, Figure]", found or {}).get(name)
        if figure is not None:
            metrics[f"{prefix}/{name}"] = figure["value"]
            metrics[f"{prefix}/{name}_low"], metrics[f"{prefix}/{name}_high"] = figure["low"], figure["high"]
    return metrics


def pictures_of(entry: FinetuneSummary) -> list[Path]:
    """A finetune's page and pictures."""
    if "pictures" not in entry:
        return []
    return sorted(path for path in Path(entry["pictures"]).parent.iterdir() if path.name != _STAMP)


def read_result(path: Path) -> LandscapeResult:
    """A `landscape.json`."""
    return cast("LandscapeResult", json.loads(path.read_text()))


def _summary(run: RunState, record: Record) -> LandscapeSummary:
    path = run.result_dir(record) / RESULT
    result, scan = read_result(path), visage_scan(run)
    found: dict[str, Any] = {"path": str(path)}
    if scan is not None and scan.name in result["scans"]:
        found |= {"scan": scan.name, **figures_of(result, scan.name)}
    return cast("LandscapeSummary", found)


def _write_page(run: RunState, entry: FinetuneSummary, aligned: Record | None, records: Mapping[str, Record]) -> Path:
    """Drawn where it does not stand there as the same code drew it of the same records."""
    from components.reporting.landscape_page import PAGE, write_pictures

    out = run.workspace.root / "figures" / f"landscape-{entry['name']}"
    centred = [one for one in (aligned, records.get("between")) if one is not None]
    finetune, realigned = ([records[key]] if key in records else [] for key in ("before", "realigned"))
    # Under the names that axes and marks have for them.
    shown = {"aligned": centred, "finetune": finetune, "realigned": realigned}
    made_of = json.dumps([code_version(), {name: [one.reference for one in some] for name, some in shown.items()}])
    stamp = out / _STAMP
    with storage_errors(out):
        if stamp.is_file() and stamp.read_text() == made_of:
            return out / PAGE
        if out.is_dir():
            shutil.rmtree(out)
    results = {
        name: _together([read_result(run.result_dir(r) / RESULT) for r in some]) for name, some in shown.items() if some
    }
    write_pictures(out, results, title=f"{run.config.name}, {entry['name']}")
    with storage_errors(stamp):
        write_atomic(stamp, made_of)
    return out / PAGE


def _together(results: Sequence[LandscapeResult]) -> LandscapeResult:
    """Scans of one model that stages of their own have drawn."""
    first = results[0]
    return {
        **first,
        "sets": {name: kind for one in results for name, kind in one["sets"].items()},
        "prompts": {name: count for one in results for name, count in one["prompts"].items()},
        "scans": {name: scan for one in results for name, scan in one["scans"].items()},
    }
