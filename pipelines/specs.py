"""From a node of the graph to the spec of its stage: what of the config decides the result, and what only how it is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from components.evaluation.capability.settings import paths_of, semantics_of
from components.evaluation.choose import FORMS
from components.evaluation.judges.settings import OwnModel, judges_in, semantics_and_execution
from components.evaluation.settings import SetSettings
from components.fusion.settings import FusionSettings
from components.masks.data import PreferenceData
from pipelines.config import RunConfig
from pipelines.graph import Node
from pipelines.roots import ALIGNED, UNALIGNED, Roots
from pipelines.sections import FinetuneConfig
from pipelines.tuned_section import form_settings
from ray_jobs.stage import StageSpec

Parts = tuple[dict[str, Any], dict[str, Any]]
"""(semantics, execution)"""


def root_key(node: Node) -> str:
    """Under which key `Roots` has the model of a load node."""
    return f"finetune:{node.finetune}" if node.finetune is not None else node.step.name.removeprefix("load_")


def build_spec(node: Node, *, config: RunConfig, roots: Roots, parents: dict[str, str], workspace: Path) -> StageSpec:
    """The spec of a stage node. `parents` maps roles to `<stage>/<fingerprint>` of the parents that succeeded."""
    semantics, execution = _BUILDERS[node.step.stage](node, config, roots)
    execution = {
        "threads": config.execution.threads,
        "checkpoints": _checkpoints(config, node.finetune, parents),
        **execution,
    }
    return StageSpec(
        stage=node.step.stage,
        workspace=str(workspace),
        semantics=semantics,
        execution=execution,
        parents=parents,
    )


def _checkpoints(config: RunConfig, name: str | None, parents: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Where the models lie that a stage reads, by role. Locations are execution: a moved model is the same model."""
    places: dict[str, dict[str, Any]] = {"load_aligned": place_of(config, None)}
    if config.unaligned is not None:
        places["load_unaligned"] = {"path": str(config.unaligned)}
    places |= {f"load:{other.name}": place_of(config, other) for other in config.finetunes}
    if name is not None:
        members = {member.name: place_of(config, member) for member in config.members(name)}
        places["load"] = {"members": members} if config.merge_named(name) else members[name]
    return {role: place for role, place in places.items() if role in parents}


def place_of(config: RunConfig, finetune: FinetuneConfig | None) -> dict[str, Any]:
    """How the aligned model (None) or a finetune is opened."""
    factors = {"factors": True} if config.mask.track == "factors" else {}
    if finetune is not None:
        base = {"base": str(config.base), "base_equal": finetune.base_equal}
        return {"path": str(finetune.path), **base, **factors}
    if config.aligned_base is None:
        return {"path": str(config.aligned)}
    base = {"base": str(config.aligned_base), "base_equal": config.aligned_base_equal}
    return {"path": str(config.aligned), **base, **factors}


def _load(node: Node, config: RunConfig, roots: Roots) -> Parts:
    if node.finetune is not None:
        [finetune] = config.members(node.finetune)
        place = place_of(config, finetune)
        semantics = {"role": "finetune", "identity": roots.models[f"finetune:{finetune.name}"]}
    elif node.step.name == "load_unaligned":
        place = {"path": str(config.unaligned)}
        semantics = {"role": UNALIGNED, "identity": roots.models[UNALIGNED]}
    else:
        place = place_of(config, None)
        semantics = {"role": ALIGNED, "identity": roots.models[ALIGNED]}
    # How a model is opened decides what every later stage sees of it; where it lies does not.
    semantics |= {key: place[key] for key in ("base_equal", "factors") if key in place}
    checkpoints = {"self": place}
    if semantics["role"] != ALIGNED:
        checkpoints["load_aligned"] = place_of(config, None)
    return semantics, {"checkpoints": checkpoints}


def _merge(node: Node, config: RunConfig, roots: Roots) -> Parts:
    merge = config.merge_named(node.finetune)
    assert merge is not None
    tuned = config.fusion.tuned[merge.name].merge if node.step.variant == "tuned" else None
    chosen = tuned or merge
    settings = chosen.model_dump(mode="json", exclude={"name", "of"})
    if chosen.method in ("ties", "dare", "dare_ties"):
        settings["density"] = chosen.kept  # the default written out is no other merge
    return {"merge": settings, "finetunes": [f.name for f in config.members(merge.name)]}, {}


def _nothing(node: Node, config: RunConfig, roots: Roots) -> Parts:
    return {}, {}


def _train_mask(node: Node, config: RunConfig, roots: Roots) -> Parts:
    assert node.finetune is not None
    # A control is trained as published: overrides are for the run's own mask.
    settings = config.mask.published if node.step.variant else config.mask.resolved
    semantics: dict[str, Any] = {"mask": settings.model_dump(mode="json")}
    files: dict[str, Any] = {}
    for role, data in (("preferences", config.mask.preferences), ("preferences_dev", config.mask.preferences_dev)):
        if data is not None:
            semantics[role], files[role] = _preferences(data, roots)
    if settings.anchor_weight > 0:
        files["anchors"] = [str(f.anchor) for f in config.members(node.finetune) if f.anchor is not None]
        semantics["anchors"] = [roots.files[path] for path in files["anchors"]]
    mask = config.execution.mask
    return semantics, {"files": files, "mask": mask.model_dump(mode="json"), "spread": mask.spread}


def _preferences(data: PreferenceData, roots: Roots) -> tuple[Any, Any]:
    """(What preference data is, where it lies): a file's bytes, or a dataset's name, revision and rows."""
    found = roots.files[data.where]
    if data.hub is not None:
        pinned = data.model_copy(update={"rows": found}).to_json()
        return pinned, pinned
    return (found, str(data.file)) if data.prompts is None else ({"prompts": found}, data.to_json())


def _sets(sets: Sequence[SetSettings], roots: Roots) -> Parts:
    """Prompt sets with their identity in place of their path, a published one as what its name stands for; the paths in the
    same order, None for a hub dataset."""
    semantics = [
        {
            **s.model_dump(mode="json", exclude={"known": True, "path": True, "attack": {"path"}}),
            "headline": s.counts,
            "sha256": roots.files[s.files],
        }
        for s in sets
    ]
    attacks = [str(s.attack.path) if s.attack and s.attack.path else None for s in sets]
    return {"sets": semantics}, {"sets": [s.path and str(s.path) for s in sets], "attacks": attacks}


def sets_asked(node: Node, config: RunConfig) -> list[SetSettings]:
    """Prompt sets that a stage looks at."""
    sets = config.sets_of(node.finetune)
    if node.step.stage == "landscape":
        assert config.landscape is not None
        return config.landscape.sets_of(sets, whose=node.finetune)
    if node.step.stage == "search_scale":
        return [s for s in sets if s.split == "dev" and s.kind in ("harmful", "task")]
    # Dev sets choose between the forms of the realigned model; all other variants are only reported.
    splits = ("dev", "test") if node.step.variant in FORMS else ("test",)
    return [s for s in sets if s.split in splits]


def _search_scale(node: Node, config: RunConfig, roots: Roots) -> Parts:
    semantics, execution = _sets(sets_asked(node, config), roots)
    semantics |= {
        "method": node.step.variant,
        "candidates": list(config.fusion.candidates),
        "max_asr": config.fusion.max_asr,
    }
    evaluation, judging = _evaluation(config, roots)
    return semantics | evaluation, {**execution, **judging, "batch_size": config.execution.batch_size}


def _fuse(node: Node, config: RunConfig, roots: Roots) -> Parts:
    variant = node.step.variant
    if variant == "before":
        return {"fusion": FusionSettings(method="interpolation", alpha=1.0).model_dump(mode="json")}, {}
    if variant == "tuned":
        assert node.finetune is not None
        return {"fusion": config.fusion.tuned[node.finetune].fusion.model_dump(mode="json")}, {}
    if variant in ("interpolation", "resta"):
        return {"fusion": {"method": variant}}, {}  # the stage takes the scale from its search
    mask = config.mask.published if variant.startswith("paper_") else config.mask.resolved
    settings = form_settings(mask, "soft" if variant.endswith("soft") else "binary")
    if variant == "random_mask":  # as the mask beside it: same rescaling, same scale
        settings = FusionSettings(method="random_mask", rescale=settings.rescale, scale=settings.scale)
    return {"fusion": settings.model_dump(mode="json")}, {}


def _export_adapter(node: Node, config: RunConfig, roots: Roots) -> Parts:
    assert config.fusion.adapter is not None
    chosen = {"select": config.fusion.select, "max_asr": config.fusion.max_asr}
    return {"rank": config.fusion.adapter.rank, **chosen}, {}


def _evaluate(node: Node, config: RunConfig, roots: Roots) -> Parts:
    semantics, execution = _sets(sets_asked(node, config), roots)
    evaluation, judging = _evaluation(config, roots)
    capability = config.evaluation.capability
    if capability is not None:
        semantics["capability"] = semantics_of(capability, roots.capability)
        execution["capability"] = paths_of(capability)
    if config.aligned_base is not None:
        execution["base"] = str(config.aligned_base)  # what is fused of adapters is an adapter
    how = config.execution.evaluation
    execution |= {"evaluation": how.model_dump(mode="json"), "spread": not how.in_process}
    return semantics | evaluation, {**execution, **judging, "batch_size": config.execution.batch_size}


def _landscape(node: Node, config: RunConfig, roots: Roots) -> Parts:
    section = config.landscape
    assert section is not None
    semantics, execution = _sets(sets_asked(node, config), roots)
    evaluation, judging = _evaluation(config, roots)
    scans = [scan.model_dump(mode="json") for scan in section.scans_of(node.step.variant)]
    drawn = {"scans": scans, "sets": [one["name"] for one in semantics["sets"]], "limit": section.limit}
    capability = section.capability_of(config.evaluation.capability)
    if capability is not None:
        identities = {task.name: roots.capability[task.name] for task in capability.tasks}
        semantics["capability"] = semantics_of(capability, identities)
        execution["capability"] = paths_of(capability)
    semantics |= {"landscape": drawn, "variant": node.step.variant}
    if node.step.variant in ("between", "realigned"):
        semantics |= {"select": config.fusion.select, "max_asr": config.fusion.max_asr}
    if config.aligned_base is not None:
        execution["base"] = str(config.aligned_base)  # what is fused of adapters is an adapter
    how = config.execution.landscape
    # As many as its processes want: a landscape may take hours, and others' processes would wait for room in vain.
    spread = 0 if how.in_process else how.actors * config.execution.threads
    execution |= {"evaluation": how.model_dump(mode="json"), "spread": spread}
    return semantics | evaluation, {**execution, **judging, "batch_size": config.execution.batch_size}


def _evaluation(config: RunConfig, roots: Roots) -> Parts:
    """A judge's model is what it is, wherever it lies."""
    settings = config.evaluation.model_dump(mode="json", exclude={"sets", "judge", "capability"})
    judge, how = semantics_and_execution(config.evaluation.judge, roots.files)
    return {"evaluation": {**settings, "judge": judge}}, {
        "judges": how,
        "judge_models": sum(isinstance(one, OwnModel) for one in judges_in(config.evaluation.judge)),
        "judge": config.execution.judge.model_dump(mode="json"),
    }


_BUILDERS: dict[str, Callable[[Node, RunConfig, Roots], Parts]] = {
    "load": _load,
    "extract_delta": _nothing,
    "compare_deltas": _nothing,
    "merge": _merge,
    "train_mask": _train_mask,
    "search_scale": _search_scale,
    "fuse": _fuse,
    "export_adapter": _export_adapter,
    "evaluate": _evaluate,
    "landscape": _landscape,
}
