"""Stage `load`: one root model, validated and identified."""

from __future__ import annotations

import json
from collections import Counter

from components.checkpoints.compare import require_compatible, require_finite
from components.checkpoints.identity import identify
from components.errors import CheckpointError
from ray_jobs.models import checkpoint
from ray_jobs.stage import Outcome, StageContext


def run(context: StageContext) -> Outcome:
    """Checks that the weights are readable, finite and of one family with the aligned model's; writes `checkpoint.json`
    (kind, files with sizes and hashes, tensors by dtype)."""
    model = checkpoint(context, "self")
    identity = identify(model)
    if identity.sha256 != context.spec.semantics["identity"]:
        raise CheckpointError(f"{model.path}: has changed since this run began; run again")
    if context.spec.semantics["role"] != "aligned":
        require_compatible(checkpoint(context, "load_aligned"), model)
    require_finite(model)
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
    return Outcome(metrics=metrics, notes=list(model.notes))
