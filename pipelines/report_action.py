"""Action `report`: the finished report and the summary as artifacts of the run in MLflow."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from components.leases import acquire
from components.reporting.report import write_report
from components.reporting.schema import RunSummary
from pipelines.actions import TRACKING_LEASE, tracker_of
from pipelines.driver import RunState
from pipelines.identity import run_identity
from ray_jobs.stage import code_version

REPORT, SUMMARY = "report.html", "summary.json"


def log_report(run: RunState, summary: RunSummary) -> None:
    """Log the summary that `realign run` has written into the workspace, and the report without links: what they lead to does
    not lie beside it there. To be called after tracking, which makes the run and knows the registered versions that the
    report names.

    Nothing is logged twice: the same code and the same summary but for the time of the run are the same report. Raises
    TrackingError.
    """
    content = {key: value for key, value in summary.items() if key != "created"}
    identity = hashlib.sha256(json.dumps([code_version(), content], sort_keys=True).encode()).hexdigest()[:20]
    lease = acquire(run.workspace.root / TRACKING_LEASE, done=lambda: False)
    assert lease is not None
    with lease, TemporaryDirectory() as place:
        files = [write_report(summary, Path(place) / REPORT, linked=False), run.workspace.root / SUMMARY]
        tracker_of(run).attach(run_identity(run), files, content=identity)


def tracked_at(run: RunState) -> str | None:
    """The address of the run's page in MLflow; None where there is none. Raises TrackingError."""
    return tracker_of(run).address(run_identity(run))
