"""The models that a spec names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from components.checkpoints.reference import Checkpoint, open_checkpoint
from ray_jobs.stage import StageContext


def checkpoint(context: StageContext, role: str) -> Checkpoint:
    """Open the model that the spec places under `role`. Its identity was checked by the `load` stage."""
    place: dict[str, Any] = context.spec.execution["checkpoints"][role]
    base = place.get("base")
    return open_checkpoint(
        Path(place["path"]),
        base=Path(base) if base else None,
        base_declared_equal=bool(place.get("base_equal", False)),
        factors=bool(place.get("factors", False)),
    )
