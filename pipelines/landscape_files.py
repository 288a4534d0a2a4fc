"""What `realign landscape` keeps in its --out: each model's figures and points, the pictures of all, and the state of an
interrupted try."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from components.errors import ConfigError
from components.evaluation.judges.settings import Judging, OwnModel, judges_in
from components.landscape.points import Point, points_text
from components.landscape.schema import LandscapeResult
from components.landscape.settings import Scan
from components.storage import storage_errors, write_atomic
from pipelines.evaluated_models import STATE, Named, Runtime, identity_of

RESULT, POINTS = "landscape.json", "points.jsonl"


def require_apart(out: Path, drawn: Sequence[Named], models: Sequence[Named], base: Path | None) -> None:
    """Raises ConfigError where a landscape would be written into a model's directory, or --out is a file."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: that is a file; give a directory")
    places = {Path(one.place).resolve(): one.place for one in models} | ({base.resolve(): str(base)} if base else {})
    taken = [places[place] for one in drawn if (place := (out / one.name).resolve()) in places]
    if taken:
        raise ConfigError(f"--out {out}: {', '.join(taken)} is a model's directory; give another directory")


def remove_earlier(out: Path, drawn: Sequence[Named], scans: Sequence[Scan]) -> None:
    """What an earlier run said is not said of this one: results, pictures and page. Raises StorageError."""
    from components.reporting.landscape_page import PAGE

    with storage_errors(out):
        pictured = {scan.name for scan in scans}
        for one in drawn:
            pictured |= _pictured(out / one.name / RESULT)
            for name in (RESULT, POINTS):
                (out / one.name / name).unlink(missing_ok=True)
        for name in (PAGE, *(f"{scan}.png" for scan in sorted(pictured))):
            (out / name).unlink(missing_ok=True)


def _pictured(path: Path) -> set[str]:
    """The scans of an earlier result; none of one that is damaged."""
    try:
        return {name for name in json.loads(path.read_text())["scans"] if Path(name).name == name}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return set()


def write_result(out: Path, name: str, result: LandscapeResult, points: Sequence[Point]) -> None:
    """A model's landscape, the points first. Raises StorageError."""
    with storage_errors(out / name):
        (out / name).mkdir(parents=True, exist_ok=True)
        write_atomic(out / name / POINTS, points_text(points))
        write_atomic(out / name / RESULT, json.dumps(result, indent=1) + "\n")


def state_dir(out: Path, models: Sequence[Named], runtime: Runtime, judge: Judging) -> Path:
    """Where the points of an interrupted try lie, which only the same code goes on with, of the same models and the same judge:
    a place may hold another model later. Raises EvaluationError for a judge's directory without a model."""
    from components.evaluation.judges.models import model_identity
    from ray_jobs.stage import code_version

    own = [one.directory for one in judges_in(judge) if isinstance(one, OwnModel)]
    judges = [model_identity(directory) for directory in own if directory is not None]
    found = [code_version(), [[one.name, identity_of(one, runtime)] for one in models], judges]
    return out / STATE / hashlib.sha256(json.dumps(found).encode()).hexdigest()[:20]


def forget(states: Sequence[Path]) -> None:
    """Drop states that are of no use any more; those of other commands stay."""
    for state in states:
        shutil.rmtree(state, ignore_errors=True)
    for parent in {state.parent for state in states}:
        try:
            parent.rmdir()
        except OSError:  # another command's state is there
            continue
