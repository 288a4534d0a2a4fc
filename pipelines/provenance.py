"""What a summary says of how its numbers came about: what was asked, which records they come from, what they took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from components.evaluation.capability.settings import semantics_of
from components.evaluation.judges.settings import semantics_and_execution
from components.evaluation.settings import SetSettings
from components.records import Record
from components.reporting.schema import RunSummary, StepCost, StepRecord, shown_models
from pipelines.driver import RunState

_DIRTY = "+changes"
"""What the code's commit ends with where files were changed since."""


def add_provenance(run: RunState, summary: RunSummary) -> None:
    """Fill in `asked`, and `records` and `cost` of the run and of each of its models."""
    summary["asked"] = _asked(run)
    for entry, name in ((summary, None), *((one, one["name"]) for one in shown_models(summary))):
        records = _records_of(run, name)
        entry["records"] = {step: _told(record) for step, record in records.items()}
        entry["cost"] = {step: _cost(run.result_dir(record), record) for step, record in records.items()}


def delta_tensors(directory: Path) -> dict[str, dict[str, float]]:
    """Tensor name -> norm, aligned_norm, zeros, as `extract_delta` left them in a directory."""
    tensors = json.loads((directory / "delta.json").read_text())["tensors"]
    kept = ("norm", "aligned_norm", "zeros")
    return {name: {key: found[key] for key in kept} for name, found in tensors.items()}


def _records_of(run: RunState, name: str | None) -> dict[str, Record]:
    return {s.node.step.name: s.record for s in run.nodes.values() if s.node.finetune == name and s.record is not None}


def _told(record: Record) -> StepRecord:
    code, commit = record.code.get("version", "unknown"), record.code.get("commit", "")
    short = commit.removesuffix(_DIRTY)[:12] + (_DIRTY if commit.endswith(_DIRTY) else "")
    told: StepRecord = {
        "reference": record.reference,
        "parents": record.parents,
        "code": f"{code} ({short})" if commit else code,
    }
    identity = record.metrics.get("identity")
    if isinstance(identity, str):
        told["identity"] = identity
    return told


def _cost(directory: Path, record: Record) -> StepCost:
    found: StepCost = {
        "seconds": record.seconds,
        "bytes_written": sum(file.bytes for file in record.outputs.values()),
    }
    if record.stage == "evaluate":
        answers = [name for name in record.outputs if "/answers/" in name and name.endswith(".jsonl")]
        tokens = [tokens for name in answers for tokens in _tokens(directory / name)]
        found["prompts"], found["tokens"] = len(tokens), sum(tokens)
    peak = record.metrics.get("peak_memory_bytes")
    if peak:
        found["peak_memory_bytes"] = int(peak)
    return found


def _tokens(path: Path) -> list[int]:
    """Of each answer of a file."""
    with path.open(encoding="utf-8") as lines:
        return [int(json.loads(line)["tokens"]) for line in lines if line.strip()]


def _asked(run: RunState) -> dict[str, Any]:
    config, evaluation = run.config, run.config.evaluation
    judge, _ = semantics_and_execution(evaluation.judge, run.roots.files)
    mask = {"preset": config.mask.preset, "track": config.mask.track}
    found: dict[str, Any] = {
        "mode": config.mode,
        "aligned": config.aligned.name,
        "finetunes": {one.name: "LoRA adapter" if one.is_adapter else "full model" for one in config.finetunes},
        "sets": {f"{one.split} {one.name}": _set(run, one) for one in evaluation.sets},
        "judge": judge,
        "evaluation": evaluation.model_dump(mode="json", exclude={"sets", "judge", "capability"}),
        "mask": mask | config.mask.resolved.model_dump(mode="json"),
        "fusion": config.fusion.model_dump(mode="json", exclude_none=True),
        "gate": [str(requirement) for requirement in config.gate or ()],
    }
    return found | _sections(run)


def _set(run: RunState, one: SetSettings) -> dict[str, Any]:
    how = one.model_dump(mode="json", exclude_defaults=True, exclude={"name", "split", "path", "attack", "headline"})
    attack = one.attack.model_dump(mode="json", exclude_none=True, exclude={"path"}) if one.attack else None
    return {
        **how,
        **({"attack": attack} if attack else {}),
        "counts": one.counts,
        "sha256": run.roots.files.get(one.files),  # None of a file that could not be read
    }


def _sections(run: RunState) -> dict[str, Any]:
    """Those that a run need not have."""
    config = run.config
    found: dict[str, Any] = {}
    lent = {one.name: one.mask_of for one in config.finetunes if one.mask_of is not None}
    if lent:
        found["mask_of"] = lent
    if config.merges:
        found["merges"] = {one.name: one.model_dump(mode="json", exclude={"name"}) for one in config.merges}
    if config.landscape is not None:
        found["landscape"] = config.landscape.model_dump(mode="json")
    if config.evaluation.capability is not None:
        found["capability"] = semantics_of(config.evaluation.capability, run.roots.capability)
    return found
