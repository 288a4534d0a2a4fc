"""Stage `merge`: how several finetunes become one. Their weights are merged wherever they are read and never stored."""

from __future__ import annotations

import json
from typing import Any

from components.checkpoints.loading import load_tokenizer
from components.checkpoints.reference import Checkpoint
from components.fusion.merge_settings import MergeSettings
from components.fusion.merging import MergedSource
from components.fusion.trimming import find_thresholds
from ray_jobs.models import MERGE_FILE, checkpoint
from ray_jobs.stage import Outcome, StageContext


def run(context: StageContext) -> Outcome:
    """Writes `merge.json`: the settings, the finetunes in their order, and for TIES the magnitudes from which on a weight is
    kept."""
    settings = MergeSettings(**context.spec.semantics["merge"])
    names: list[str] = context.spec.semantics["finetunes"]
    aligned = checkpoint(context, "load_aligned")
    members = {name: checkpoint(context, f"load:{name}") for name in names}
    sources = {name: member.source for name, member in members.items()}
    thresholds = find_thresholds(aligned.source, sources, settings) if settings.method == "ties" else None
    MergedSource(aligned.source, sources, settings, thresholds)  # refuses what does not fit
    described: dict[str, Any] = {
        "settings": settings.model_dump(mode="json"),
        "finetunes": names,
        "thresholds": thresholds,
    }
    (context.out / MERGE_FILE).write_text(json.dumps(described, indent=1) + "\n")
    metrics = {"method": settings.method, "scale": settings.scale, "density": settings.kept, "finetunes": names}
    return Outcome(metrics=metrics, notes=_template_notes(aligned, members))


def _template_notes(aligned: Checkpoint, members: dict[str, Checkpoint]) -> list[str]:
    """The merged model has one tokenizer, the aligned model's."""
    own = load_tokenizer(aligned.tokenizer_dir).chat_template
    others = [n for n, m in members.items() if load_tokenizer(m.tokenizer_dir).chat_template != own]
    return (
        [f"the merged model uses the aligned model's chat template; {', '.join(others)} had another"] if others else []
    )
