"""Stage `export_adapter`: the realigned model as a LoRA adapter over the aligned one, for a finetune that came as one."""

from __future__ import annotations

import json

from components.checkpoints.safetensors import SafetensorsSource
from components.evaluation.choose import FORMS, choose_form
from components.fusion.low_rank import export_adapter
from ray_jobs.models import checkpoint
from ray_jobs.stage import Outcome, StageContext


def run(context: StageContext) -> Outcome:
    """Writes `adapter/` (what PEFT loads) and `adapter.json` (rank and error of every tensor). Taken is the form that is
    selected for serving: both would double the evaluation for a model that nobody serves."""
    semantics = context.spec.semantics
    there = [form for form in FORMS if f"evaluate_{form}" in context.parents]
    dev = {form: context.parents[f"evaluate_{form}"].metrics.get("dev", {}) for form in there}
    form = choose_form(dev, select=semantics["select"], max_asr=float(semantics["max_asr"]))
    report = export_adapter(
        aligned=checkpoint(context, "load_aligned"),
        finetune=checkpoint(context, "load"),
        fused=SafetensorsSource(context.parent_dir(f"fuse_{form}") / "model"),
        rank=semantics["rank"],
        out_dir=context.out / "adapter",
        progress=context.attempt.progress,
    )
    (context.out / "adapter.json").write_text(json.dumps(report.to_json(), indent=1) + "\n")
    ranks = sorted({t.rank for t in report.tensors.values()})
    worst, most = max(((name, t.error) for name, t in report.tensors.items()), key=lambda found: found[1])
    what = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    note = (
        f"the adapter of rank {what} holds the {form} model's delta but for {report.error:.1%} of its norm "
        f"(at worst {most:.1%}, {worst})"
    )
    metrics = {"form": form, "error": report.error, "worst_error": most, "ranks": ranks}
    return Outcome(metrics=metrics, notes=[note])
