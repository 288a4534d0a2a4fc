"""Stage `extract_delta`: what a finetune changed, as statistics; the delta itself is taken as it is read and never stored."""

from __future__ import annotations

import json

from components.deltas import delta_statistics
from ray_jobs.models import checkpoint
from ray_jobs.stage import Outcome, StageContext


def run(context: StageContext) -> Outcome:
    """Writes `delta.json` (per tensor); metrics are the totals."""
    aligned, finetune = checkpoint(context, "load_aligned"), checkpoint(context, "load")
    report = delta_statistics(aligned.source, finetune.source, progress=context.attempt.progress).to_json()
    (context.out / "delta.json").write_text(json.dumps(report, indent=1) + "\n")
    notes = []
    one_ulp = report["overall"]["one_ulp"]
    if one_ulp is not None and one_ulp > 0.01:
        notes.append(
            f"{one_ulp:.1%} of the changed weights moved by one unit in the last place: there a soft mask rounds to binary"
        )
    if report["overall"]["zeros"] == 1.0:
        notes.append("the finetune equals the aligned model: there is nothing to realign")
    return Outcome(metrics={"overall": report["overall"]}, notes=notes)
