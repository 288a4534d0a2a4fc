"""Stage `landscape`: how safe one of a run's models stays as its weights move, and where the others lie."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from typing import Any

from components.checkpoints.reference import Checkpoint, open_checkpoint
from components.checkpoints.source import TensorSource
from components.evaluation.choose import FORMS, choose_form
from components.evaluation.execution import EvaluationExecution
from components.evaluation.judges.settings import JudgeExecution
from components.landscape.points import unscored_notes, write_points
from components.landscape.result import landscape_result
from components.landscape.schema import POOLED, LandscapeResult
from components.landscape.settings import LandscapeSettings
from ray_jobs.actors import Place
from ray_jobs.landscape_trials import POINTS, Surveying, shortened, survey_points
from ray_jobs.models import checkpoint
from ray_jobs.prompt_files import capability_tasks, evaluation_settings, judge, prompt_sets
from ray_jobs.stage import Outcome, StageContext

RESULT = "landscape.json"
_MODELS = {"aligned": "aligned", "between": "aligned", "before": "finetune", "realigned": "realigned"}
"""The stage's variant -> the model that is drawn, under the name that axes and marks have for it."""
_ROOTS = {"aligned": "load_aligned", "finetune": "load", "unaligned": "load_unaligned"}


def run(context: StageContext) -> Outcome:
    """Writes `points.jsonl` and `landscape.json`; metrics are every scan's figures over its directions. Pictures are the run's:
    a line that is drawn otherwise must not have all points measured again."""
    judge(context)  # a judge's model that is not the one hashed is told here, and not by every actor
    semantics, execution = context.spec.semantics, context.spec.execution
    settings = LandscapeSettings(**semantics["landscape"])
    own, surveying = _surveying(context, settings)
    points, marks = survey_points(
        surveying,
        EvaluationExecution(**execution.get("evaluation", {})),
        state_dir=context.state / "survey",
        keep_going=context.attempt.keep_going,
        progress=context.attempt.progress,
    )
    result = landscape_result(
        model=own,
        scans=settings.scans,
        points=points,
        sets=surveying.measured,
        marks=marks,
        confidence=surveying.settings.confidence,
    )
    # How long a point took stands in the record; the outputs are the same bytes whoever measured it.
    write_points(context.out / POINTS, [replace(point, seconds=0.0) for point in points])
    (context.out / RESULT).write_text(json.dumps(result, indent=1) + "\n")
    notes = [note for one in surveying.sets for note in one.notes]
    metrics = _metrics(result, sum(point.seconds for point in points), len(points))
    return Outcome(metrics=metrics, notes=notes + unscored_notes(points))


def _surveying(context: StageContext, settings: LandscapeSettings) -> tuple[str, Surveying]:
    """(The drawn model's name, what measures it)."""
    execution, roles = context.spec.execution, _roles(context)
    own = _MODELS[context.spec.semantics["variant"]]
    model = _opened(context, roles[own])
    plain = context.to_plain()
    return own, Surveying(
        place=Place(model.path, base=model.base.path if model.base else None, tokenizer_dir=model.tokenizer_dir),
        sources={name: functools.partial(_source, plain, role) for name, role in roles.items() if name != own},
        scans=settings.scans,
        sets=shortened(prompt_sets(context), settings.limit),
        settings=evaluation_settings(context),
        batch_size=int(execution["batch_size"]),
        threads=int(execution.get("threads", 1)),
        judging=JudgeExecution(**execution["judge"]),
        capability=capability_tasks(context)[1],
    )


def _roles(context: StageContext) -> dict[str, str]:
    """Name -> role of the parent, of every model that the stage is given; of a realigned one the form that is served."""
    roles = {name: role for name, role in _ROOTS.items() if role in context.parents}
    dev = {
        form: context.parents[f"evaluate_{form}"].metrics.get("dev", {})
        for form in FORMS
        if f"evaluate_{form}" in context.parents
    }
    if dev:
        semantics = context.spec.semantics
        form = choose_form(dev, select=semantics["select"], max_asr=float(semantics["max_asr"]))
        roles["realigned"] = f"fuse_{form}"
    return roles


def _opened(context: StageContext, role: str) -> Checkpoint:
    if role in _ROOTS.values():
        return checkpoint(context, role, whole=True)
    # What is fused of adapters is an adapter, over the base that this run gave it.
    base = context.spec.execution.get("base")
    return open_checkpoint(context.parent_dir(role) / "model", base=base, base_declared_equal=True)


def _source(plain: dict[str, Any], role: str) -> TensorSource:
    """A model's weights, in whichever process asks."""
    return _opened(StageContext.of_plain(plain), role).source


def _metrics(result: LandscapeResult, seconds: float, points: int) -> dict[str, Any]:
    scans = result["scans"]
    return {
        "model": result["model"],
        "points": points,
        "seconds_of_points": round(seconds, 3),
        "visage": {name: scan["numbers"][POOLED]["asr"]["visage"] for name, scan in scans.items()},
        "scans": {name: scan["numbers"] for name, scan in scans.items()},
    }
