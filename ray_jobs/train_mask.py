"""Stage `train_mask`: the Concrete mask of one finetune, trained in this process or on ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.errors import DataError
from components.masks.artifact import MaskArtifact
from components.masks.settings import MaskSettings
from components.masks.training import EngineMaker, MaskResult, one_process, train_mask
from components.masks.zero import MaskExecution
from components.records import file_sha256
from ray_jobs.models import checkpoint
from ray_jobs.stage import Outcome, StageContext


def run(context: StageContext) -> Outcome:
    """Writes `mask/`: the artifact and `metrics.jsonl` (a line per step). A killed attempt goes on at its last state and, on
    one rank, ends with the same bytes."""
    execution = execution_of(context)
    if execution.ranks == 1:
        seconds = train(context, one_process(execution)).seconds
    else:
        from ray_jobs.train_ranks import train_on_ranks

        seconds = train_on_ranks(context, execution)
    metrics = MaskArtifact.open(context.out / "mask").figures()
    return Outcome(metrics={**metrics, "seconds": seconds}, notes=_notes(metrics["data"], _settings(context)))


def execution_of(context: StageContext) -> MaskExecution:
    """What the spec says, with every place named."""
    execution = MaskExecution(**context.spec.execution.get("mask", {}))
    return execution.model_copy(update={"offload_dir": execution.offload_dir or context.state})


def train(context: StageContext, make_engine: EngineMaker) -> MaskResult:
    """What every rank does."""
    execution = execution_of(context)
    aligned, finetune = checkpoint(context, "load_aligned"), checkpoint(context, "load")
    files = {role: _same_files(context, role, paths) for role, paths in context.spec.execution["files"].items()}
    [dev] = files.get("preferences_dev", [None])
    return train_mask(
        settings=_settings(context),
        aligned_dir=aligned.model_dir,
        aligned=aligned.source,
        finetune=finetune.source,
        tokenizer_dir=finetune.tokenizer_dir,
        preferences=files["preferences"][0],
        preferences_dev=dev,
        anchors=files.get("anchors", []),
        state_dir=context.state,
        out_dir=context.out / "mask",
        checkpoint_seconds=execution.checkpoint_seconds,
        progress=lambda event: _report(context, event),
        keep_going=context.attempt.keep_going,
        make_engine=make_engine,
    )


def _settings(context: StageContext) -> MaskSettings:
    return MaskSettings(**context.spec.semantics["mask"])


def _notes(counts: dict[str, int], settings: MaskSettings) -> list[str]:
    dropped, dev = counts["pairs_too_long"], counts["pairs_dev_too_long"]
    if not dropped + dev:
        return []
    return [
        f"{dropped} preference pairs of {dropped + counts['pairs']} ({dev} held-out ones) are longer than "
        f"{settings.max_length} tokens and were left out"
    ]


def _same_files(context: StageContext, role: str, paths: Sequence[str]) -> list[Path]:
    for path, sha256 in zip(paths, context.spec.semantics[role], strict=True):
        if file_sha256(Path(path)) != sha256:
            raise DataError(f"{path} has changed since this run began; run again")
    return [Path(path) for path in paths]


def _report(context: StageContext, event: dict[str, Any]) -> None:
    if "step" in event:
        event = {**event, "done": event["step"] + 1, "total": event["steps"]}
    context.attempt.progress(event)
