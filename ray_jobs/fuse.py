"""Stage `fuse`: one fused model, written as a complete directory that plain transformers loads."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from typing import Any

from components import errors
from components.checkpoints.journal import Part
from components.checkpoints.source import blocks
from components.fusion.fuse import fuse_checkpoint, fuse_parts, open_fused
from components.fusion.settings import FusionSettings
from components.masks.artifact import MaskArtifact
from components.records import Record
from ray_jobs.models import checkpoint
from ray_jobs.stage import Outcome, StageContext

_MODEL, _LOOK_S = "model", 5.0
_BATCH = 32
"""Parts of one Ray task, half a gigabyte of bf16: opening the models again costs little beside it."""


def run(context: StageContext) -> Outcome:
    """Writes `model/` and `fusion.json` (counts per tensor). In a cluster of several nodes all of them make parts of it."""
    settings = _settings(context.spec.semantics["fusion"], context.parents)
    report = fuse_checkpoint(
        **_inputs(context),
        settings=settings,
        out_dir=context.out / _MODEL,
        elsewhere=functools.partial(_on_all_nodes, context) if _nodes() > 1 else None,
        progress=context.attempt.progress,
    ).to_json()
    # How long it took stands in the record; the outputs are the same bytes whenever they are made.
    timing = {key: report.pop(key) for key in ("seconds", "gb_per_s")}
    (context.out / "fusion.json").write_text(json.dumps(report, indent=1) + "\n")
    kept = ("method", "settings", "output_dtypes", "numel", "differing", "from_aligned", "from_finetune")
    metrics = {key: report[key] for key in (*kept, "rounded_to_binary", "bytes_read", "bytes_written")}
    return Outcome(metrics={**metrics, **timing}, notes=report["notes"])


def _inputs(context: StageContext) -> dict[str, Any]:
    mask_role = next((role for role in context.parents if role.startswith("train_mask")), None)
    return {
        "aligned": checkpoint(context, "load_aligned"),
        "finetune": checkpoint(context, "load"),
        "mask": MaskArtifact.open(context.parent_dir(mask_role) / "mask") if mask_role else None,
        "unaligned": checkpoint(context, "load_unaligned") if "load_unaligned" in context.parents else None,
    }


def _nodes() -> int:
    """Nodes of the Ray cluster that this stage runs in; 0 outside of one."""
    import ray

    return sum(bool(node["Alive"]) for node in ray.nodes()) if ray.is_initialized() else 0


def _on_all_nodes(
    context: StageContext, settings: FusionSettings, parts: Sequence[Part]
) -> Iterator[tuple[Part, dict[str, Any]]]:
    """Ray tasks of one CPU each, over all nodes; all of them see the workspace. What a lost node had is made again: a part has
    the same bytes whoever writes it, and however often. An error of one ends them all."""
    import ray

    task = ray.remote(_make_parts).options(num_cpus=1, scheduling_strategy="SPREAD", max_retries=3)
    plain, described = context.to_plain(), settings.model_dump_json()
    pending = [task.remote(plain, described, list(parts[low:high])) for low, high in blocks(len(parts), _BATCH)]
    try:
        while pending:
            ready, pending = ray.wait(pending, timeout=_LOOK_S)
            for answer in ray.get(ready):
                if isinstance(answer, dict):
                    raise getattr(errors, answer["type"])(answer["message"])
                yield from ((tuple(part), note) for part, note in answer)
            context.attempt.keep_going()
    finally:
        for one in pending:
            ray.cancel(one, force=True)


def _make_parts(
    plain: dict[str, Any], settings: str, parts: list[Part]
) -> list[tuple[Part, dict[str, Any]]] | dict[str, str]:
    """In a task; what the user must mend is told, not raised, for Ray would wrap it."""
    try:
        context = StageContext.of_plain(plain)
        context.attempt.keep_going()
        source = open_fused(**_inputs(context), settings=FusionSettings.model_validate_json(settings))
        return fuse_parts(parts, source, context.out / _MODEL)
    except errors.RealignError as error:
        return errors.error_payload(error)


def _settings(described: dict[str, Any], parents: dict[str, Record]) -> FusionSettings:
    """A control whose scale was searched takes what the search chose."""
    search = next((record for role, record in parents.items() if role.startswith("search_")), None)
    return FusionSettings(**described, **(search.metrics["chosen"] if search else {}))
