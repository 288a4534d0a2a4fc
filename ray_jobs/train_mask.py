"""Stage `train_mask`: the Concrete mask of one finetune, trained in this process or on ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from components.errors import DataError
from components.masks.artifact import MaskArtifact
from components.masks.data import PreferenceData
from components.masks.reference_cache import ReferenceCache
from components.masks.settings import MaskSettings
from components.masks.training import EngineMaker, MaskResult, one_process, train_mask
from components.masks.zero import MaskExecution
from components.records import file_sha256
from ray_jobs.models import checkpoint
from ray_jobs.stage import Outcome, StageContext

LEFT_OUT = {
    "too_long": "longer than {max_length} tokens, or a prompt that leaves the models' answers too little room",
    "both_safe": "both responses are safe",
    "neither_safe": "neither response is safe",
    "contradictory": "safer_response_id names the response that the flags call unsafe",
    "identical": "both responses are the same",
    "no_difference": "the aligned model and the finetune answer alike, as far as {pair_new_tokens} tokens go",
}
"""Reason of `counts` -> what it says."""


def run(context: StageContext) -> Outcome:
    """Writes `mask/`: the artifact and `metrics.jsonl` (a line per step). A killed attempt goes on at its last state and, on
    one rank, ends with the same bytes."""
    execution = execution_of(context)
    if not execution.spread:
        cost = train(context, one_process(execution)).cost
    else:
        from ray_jobs.train_ranks import train_on_ranks

        cost = train_on_ranks(context, execution)
    metrics = MaskArtifact.open(context.out / "mask").figures()
    return Outcome(metrics={**metrics, **cost}, notes=_notes(metrics["data"], _settings(context)))


def execution_of(context: StageContext) -> MaskExecution:
    """What the spec says, with every place named."""
    execution = MaskExecution(**context.spec.execution.get("mask", {}))
    return execution.model_copy(update={"offload_dir": execution.offload_dir or context.state})


def train(context: StageContext, make_engine: EngineMaker) -> MaskResult:
    """What every rank does."""
    execution = execution_of(context)
    aligned, finetune = checkpoint(context, "load_aligned"), checkpoint(context, "load")
    files = context.spec.execution["files"]
    dev, anchors = files.get("preferences_dev"), files.get("anchors", [])
    return train_mask(
        settings=_settings(context),
        aligned_dir=aligned.model_dir,
        aligned=aligned.source,
        finetune=finetune.source,
        tokenizer_dir=finetune.tokenizer_dir,
        preferences=_preferences(context, "preferences", files["preferences"]),
        preferences_dev=None if dev is None else _preferences(context, "preferences_dev", dev),
        anchors=[
            _same_file(Path(path), sha256)
            for path, sha256 in zip(anchors, context.spec.semantics.get("anchors", []), strict=True)
        ],
        state_dir=context.state,
        out_dir=context.out / "mask",
        checkpoint_seconds=execution.checkpoint_seconds,
        checkpoint_steps=execution.checkpoint_steps,
        progress=lambda event: _report(context, event),
        keep_going=context.attempt.keep_going,
        make_engine=make_engine,
        cache=_cache(context),
    )


def _settings(context: StageContext) -> MaskSettings:
    return MaskSettings(**context.spec.semantics["mask"])


def _notes(counts: dict[str, int], settings: MaskSettings) -> list[str]:
    """What was left out of the preference data, and why."""
    notes = []
    for reason, why in LEFT_OUT.items():
        here, dev = (counts.get(f"{prefix}_{reason}", 0) for prefix in ("pairs", "pairs_dev"))
        if here + dev:
            what = why.format(max_length=settings.max_length, pair_new_tokens=settings.pair_new_tokens)
            notes.append(f"preference rows left out: {here} (and {dev} held-out ones); {what}")
    return notes


def _preferences(context: StageContext, role: str, given: Any) -> PreferenceData:
    """The data that the spec names, which must be what it was when the run began; a dataset is held to that as it is read."""
    data, known = PreferenceData.model_validate(given), context.spec.semantics[role]
    if data.path is not None:
        _same_file(data.path, known["prompts"] if data.prompts else known)
    return data


def _same_file(path: Path, sha256: str) -> Path:
    if file_sha256(path) != sha256:
        raise DataError(f"{path} has changed since this run began; run again")
    return path


def _cache(context: StageContext) -> ReferenceCache:
    """The workspace's reference log-probabilities. A finetune's depend on the aligned model too: it gives the architecture."""
    identities = []
    for role in ("load_aligned", "load"):
        stage, _, name = context.spec.parents[role].partition("/")
        record = context.workspace.record(stage, name)
        assert record is not None, "a parent has a record"
        identities.append(record.semantics.get("identity", record.fingerprint))  # a merge is its record
    models = {"aligned": identities[:1], "finetuned": identities}
    return ReferenceCache(context.workspace.reference_dir, models, context.spec.version)


def _report(context: StageContext, event: dict[str, Any]) -> None:
    if "step" in event:
        event = {**event, "done": event["step"] + 1, "total": event["steps"]}
    context.attempt.progress(event)
