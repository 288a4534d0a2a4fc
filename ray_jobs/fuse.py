"""Stage `fuse`: one fused model, written as a complete directory that plain transformers loads."""

from __future__ import annotations

import json
from typing import Any

from components.fusion.fuse import fuse_checkpoint
from components.fusion.settings import FusionSettings
from components.masks.artifact import MaskArtifact
from components.records import Record
from ray_jobs.models import checkpoint
from ray_jobs.stage import Outcome, StageContext


def run(context: StageContext) -> Outcome:
    """Writes `model/` and `fusion.json` (counts per tensor)."""
    mask_role = next((role for role in context.parents if role.startswith("train_mask")), None)
    report = fuse_checkpoint(
        aligned=checkpoint(context, "load_aligned"),
        finetune=checkpoint(context, "load"),
        settings=_settings(context.spec.semantics["fusion"], context.parents),
        mask=MaskArtifact.open(context.parent_dir(mask_role) / "mask") if mask_role else None,
        unaligned=checkpoint(context, "load_unaligned") if "load_unaligned" in context.parents else None,
        out_dir=context.out / "model",
        progress=context.attempt.progress,
    ).to_json()
    # How long it took stands in the record; the outputs are the same bytes whenever they are made.
    timing = {key: report.pop(key) for key in ("seconds", "gb_per_s")}
    (context.out / "fusion.json").write_text(json.dumps(report, indent=1) + "\n")
    kept = ("method", "settings", "output_dtypes", "numel", "differing", "from_aligned", "from_finetune")
    metrics = {key: report[key] for key in (*kept, "rounded_to_binary", "bytes_read", "bytes_written")}
    return Outcome(metrics={**metrics, **timing}, notes=report["notes"])


def _settings(described: dict[str, Any], parents: dict[str, Record]) -> FusionSettings:
    """A control whose scale was searched takes what the search chose."""
    search = next((record for role, record in parents.items() if role.startswith("search_")), None)
    return FusionSettings(**described, **(search.metrics["chosen"] if search else {}))
