"""What of a run config does not fit together, where a whole section is at stake. Light, as `config.py` is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from components.fusion.merge_settings import merge_problems
from pipelines.sections import is_adapter

if TYPE_CHECKING:
    from pipelines.config import RunConfig


def merge_section_problems(config: RunConfig) -> list[str]:
    """What is wrong with `mode` and `merges` together."""
    finetunes = [f.name for f in config.finetunes]
    if config.mode == "each":
        return ["`merges` needs `mode: merge`"] if config.merges else []
    problems = [] if config.merges else ["mode: merge needs `merges`, a list of {name, method, …}"]
    if config.fusion.adapter is not None:
        problems.append("mode: merge: remove fusion.adapter, a merge is no adapter and leaves whole")
    if config.landscape is not None:
        problems.append("mode: merge: remove landscape; `realign landscape` draws what was merged")
    problems += [f"finetune {f.name}: mask_of has no meaning in mode: merge" for f in config.finetunes if f.mask_of]
    names = [*finetunes, *(m.name for m in config.merges)]
    problems += [
        f"merge {m.name} has the name of another merge or of a finetune"
        for m in config.merges
        if names.count(m.name) > 1
    ]
    for merge in config.merges:
        members = [f.name for f in config.members(merge.name)]
        unknown = [n for n in merge.of if n not in finetunes] + [n for n in merge.weights if n not in members]
        if unknown:
            problems.append(
                f"merge {merge.name} names finetunes that are not there: {', '.join(unknown)} "
                f"(there: {', '.join(merge.of or finetunes)})"
            )
        elif len(members) < 2:
            problems.append(f"merge {merge.name} is of fewer than two finetunes")
        else:
            problems += [f"merge {merge.name}: {p}" for p in merge_problems(merge, members)]
    return problems


def track_problems(config: RunConfig) -> list[str]:
    """What is there, or missing, for the track that is wanted."""
    if config.mask.track == "weights":
        given = [key for key in ("aligned_base", "aligned_base_equal") if getattr(config, key)]
        problems = [f"{' and '.join(given)}: for mask.track: factors only; remove it"] if given else []
        if is_adapter(config.aligned):
            problems.append(
                "aligned is a LoRA adapter: set mask.track: factors and aligned_base, or merge it and give the result"
            )
        return problems
    problems = []
    if config.aligned_base is None:
        problems.append("mask.track: factors needs `aligned_base`, the model that the safety LoRA `aligned` is over")
    whole = [f.name for f in config.finetunes if not f.is_adapter]
    whole += [] if is_adapter(config.aligned) else ["aligned"]
    if whole:
        problems.append(f"mask.track: factors is for LoRA adapters, and these are none: {', '.join(whole)}")
    scaled = [control for control in ("interpolation", "resta") if control in config.fusion.controls]
    if scaled:
        problems.append(
            f"mask.track: factors: remove the controls {', '.join(scaled)}: weights are products of the factors, so "
            "scaling both is no interpolation of weights"
        )
    if config.mode == "merge":
        problems.append("mask.track: factors has no mode: merge, adapters' products do not merge by their factors")
    if config.fusion.adapter is not None:
        problems.append("mask.track: factors: remove fusion.adapter, adapters come out as they are")
    return problems


def mask_problems(config: RunConfig) -> list[str]:
    """What keeps masks from being trained, or used, as the run wants them."""
    own = sorted({f.name for f in config.finetunes if f.mask_of is None})
    problems = []
    mask = config.mask.resolved
    trained = config.targets if config.mode == "merge" else tuple(own)
    bare = [f.name for t in trained for f in config.members(t) if f.anchor is None]
    if mask.anchor_weight > 0 and bare:
        problems.append(
            f"finetunes without `anchor`: {', '.join(dict.fromkeys(bare))}; give each a file of prompts, or set "
            "mask.settings.anchor_weight to 0"
        )
    if mask.granularity == "tensor" and "random_mask" in config.fusion.controls:
        problems.append(
            "the control random_mask is the learned mask itself with mask.settings.granularity: tensor, where a tensor is "
            "kept or dropped whole; remove it"
        )
    if mask.storage == "bits":
        problems.append("mask.settings.storage: bits keeps no soft mask, and a run makes both forms; use logits")
    return problems
