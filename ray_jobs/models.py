"""The models that a spec names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from components.checkpoints.reference import Checkpoint, open_checkpoint
from components.fusion.merge_settings import MergeSettings
from components.fusion.merging import MergedSource
from ray_jobs.stage import StageContext

MERGE_FILE = "merge.json"


def checkpoint(context: StageContext, role: str, *, whole: bool = False) -> Checkpoint:
    """Open the model that the spec places under `role`: a root, whose identity was checked by the `load` stage, or a merge of
    several as the `merge` stage described it. `whole`: the weights that an adapter makes of its base, also where the run works
    on its factors."""
    place: dict[str, Any] = context.spec.execution["checkpoints"][role]
    if whole:
        place = {**place, "factors": False}
    if "members" not in place:
        return open_place(place)
    directory = context.parent_dir(role)
    described = json.loads((directory / MERGE_FILE).read_text())
    aligned = checkpoint(context, "load_aligned")
    members = {name: open_place(place["members"][name]) for name in described["finetunes"]}
    source = MergedSource(
        aligned.source,
        {name: member.source for name, member in members.items()},
        MergeSettings(**described["settings"]),
        described["thresholds"],
    )
    return Checkpoint(
        path=directory,
        kind="merge",
        model_dir=aligned.model_dir,
        tokenizer_dir=aligned.tokenizer_dir,
        source=source,
        config=aligned.config,
        files=[],
    )


def open_place(place: Mapping[str, Any]) -> Checkpoint:
    """Open a model as a spec's `checkpoints` says."""
    base = place.get("base")
    return open_checkpoint(
        place["path"],
        base=base or None,
        base_declared_equal=bool(place.get("base_equal", False)),
        factors=bool(place.get("factors", False)),
    )
