"""Stage `compare_deltas`: cosines between the task vectors of the finetunes that could be loaded."""

from __future__ import annotations

import json

from components.deltas import delta_cosines
from ray_jobs.models import checkpoint
from ray_jobs.stage import Outcome, StageContext


def run(context: StageContext) -> Outcome:
    """Writes `cosines.json` (overall and per tensor); metrics hold the overall table."""
    roles = {role.split(":", 1)[1]: role for role in context.parents if role.startswith("load:")}
    aligned = checkpoint(context, "load_aligned")
    sources = {name: checkpoint(context, role).source for name, role in roles.items()}
    report = delta_cosines(aligned.source, sources, progress=context.attempt.progress).to_json()
    (context.out / "cosines.json").write_text(json.dumps(report, indent=1) + "\n")
    return Outcome(metrics={"cosines": report["overall"]})
