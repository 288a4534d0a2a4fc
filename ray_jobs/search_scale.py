"""Stage `search_scale`: the best scale of a training-free method, chosen on dev sets, without a checkpoint per candidate."""

from __future__ import annotations

import json
from typing import Any

from components.evaluation.evaluate import evaluate_model
from components.evaluation.generate import load_model
from components.fusion.fused import FusedSource, apply_to_model
from components.fusion.settings import FusionSettings
from ray_jobs.models import checkpoint
from ray_jobs.prompt_files import evaluation_settings, prompt_sets
from ray_jobs.stage import Outcome, StageContext

SCALE_NAME = {"interpolation": "alpha", "resta": "gamma"}


def run(context: StageContext) -> Outcome:
    """Writes `search.json` (dev rates of every candidate); metrics hold the scale that was chosen.

    Chosen: the most skilful candidate whose dev ASR is at most `max_asr`; if none is that safe, the safest.
    """
    semantics = context.spec.semantics
    method, max_asr = semantics["method"], float(semantics["max_asr"])
    tried: list[dict[str, Any]] = []
    for candidate, rates in _candidates(context, method):
        tried.append({SCALE_NAME[method]: candidate, "asr": rates["asr"]["value"], "task": _skill(rates)})
        context.attempt.progress({"done": len(tried), "total": len(semantics["candidates"])})
    chosen = best_candidate(tried, max_asr)
    (context.out / "search.json").write_text(json.dumps({"tried": tried}, indent=1) + "\n")
    scale = {SCALE_NAME[method]: chosen[SCALE_NAME[method]]}
    notes = [] if chosen["asr"] <= max_asr else [f"{method}: no candidate has a dev ASR of at most {max_asr}"]
    return Outcome(metrics={"chosen": scale, "dev": chosen, "tried": tried}, notes=notes)


def best_candidate(tried: list[dict[str, Any]], max_asr: float) -> dict[str, Any]:
    """The most skilful of the safe candidates; without a safe one the safest. The first of equals."""
    safe = [t for t in tried if t["asr"] <= max_asr]
    return max(safe, key=lambda t: t["task"]) if safe else min(tried, key=lambda t: (t["asr"], -t["task"]))


def _candidates(context: StageContext, method: str) -> Any:
    aligned, finetune = checkpoint(context, "load_aligned"), checkpoint(context, "load")
    unaligned = checkpoint(context, "load_unaligned").source if "load_unaligned" in context.parents else None
    model, tokenizer = load_model(aligned.model_dir)
    sets = [s for s in prompt_sets(context) if s.kind in ("harmful", "task")]
    for candidate in context.spec.semantics["candidates"]:
        settings = FusionSettings.model_validate({"method": method, SCALE_NAME[method]: candidate})
        fused = FusedSource(aligned=aligned.source, finetune=finetune.source, settings=settings, unaligned=unaligned)
        apply_to_model(model, fused)
        result = evaluate_model(
            model=model,
            tokenizer=tokenizer,
            sets=sets,
            settings=evaluation_settings(context),
            split="dev",
            batch_size=int(context.spec.execution["batch_size"]),
            keep_going=context.attempt.keep_going,
        )
        yield candidate, result.rates


def _skill(rates: Any) -> float:
    return float(rates["task"]["value"]) if "task" in rates else 0.0
