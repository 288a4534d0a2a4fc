"""Stage `load`: one root model, validated and identified."""

from __future__ import annotations

import json
from collections import Counter

from components.checkpoints.compare import require_compatible, require_finite, require_near
from components.checkpoints.identity import identify
from components.checkpoints.loading import load_tokenizer
from components.checkpoints.reference import Checkpoint
from components.checkpoints.writer import has_tokenizer
from components.errors import CheckpointError
from ray_jobs.models import checkpoint
from ray_jobs.stage import Outcome, StageContext


def run(context: StageContext) -> Outcome:
    """Checks that the weights are readable, finite and of one family with the aligned model's; writes `checkpoint.json`
    (kind, files with sizes and hashes, tensors by dtype)."""
    model = checkpoint(context, "self")
    identity = identify(model)
    if identity.sha256 != context.spec.semantics["identity"]:
        raise CheckpointError(f"{model.where}: has changed since this run began; run again")
    notes = list(model.notes)
    if not has_tokenizer(model.tokenizer_dir):
        raise CheckpointError(f"{model.where}: has no tokenizer; save one beside the weights")
    if context.spec.semantics["role"] != "aligned":
        aligned = checkpoint(context, "load_aligned")
        require_compatible(aligned, model)
        notes += _template_note(aligned, model)
    require_finite(model)
    if context.spec.semantics["role"] == "aligned" and model.base is not None:
        require_finite(model.base)
    if context.spec.semantics["role"] == "finetune" and not context.spec.semantics.get("factors"):
        require_near(aligned, model)
    specs = [model.source.spec(name) for name in model.source.names()]
    dtypes = Counter(str(spec.dtype).removeprefix("torch.") for spec in specs)
    described = {
        "kind": model.kind,
        "identity": identity.sha256,
        "files": identity.files,
        "architectures": model.config.get("architectures"),
        "tensors": len(specs),
        "parameters": sum(spec.numel for spec in specs),
        "tensors_by_dtype": dict(dtypes),
        "aliases": dict(model.source.aliases()),
    }
    (context.out / "checkpoint.json").write_text(json.dumps(described, indent=1, sort_keys=True) + "\n")
    metrics = {key: described[key] for key in ("kind", "identity", "tensors", "parameters", "tensors_by_dtype")}
    return Outcome(metrics=metrics, notes=notes)


def _template_note(aligned: Checkpoint, model: Checkpoint) -> list[str]:
    """A finetune is trained, searched and measured with the template it is published with; say when that is another."""
    if model.tokenizer_dir == aligned.tokenizer_dir:
        return []
    own, other = (load_tokenizer(c.tokenizer_dir).chat_template for c in (model, aligned))
    return [] if own == other else ["its chat template is not the aligned model's; its own is used"]
