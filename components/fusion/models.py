"""The models of a recipe, opened and brought to one set of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.checkpoints.common import ALIGNED
from components.checkpoints.compare import compare_tensors, require_compatible, require_near
from components.checkpoints.harmonize import harmonize
from components.checkpoints.reference import Checkpoint, open_checkpoint
from components.checkpoints.source import TensorSource
from components.checkpoints.writer import has_template, has_tokenizer
from components.errors import CheckpointError, RealignError
from components.fusion.recipe import Recipe
from components.records import file_sha256

_NEAR_SAMPLE = 4096
"""Elements of each matrix that tell whether two models have one base: enough, and soon read."""


@dataclass(frozen=True)
class Models:
    """What a recipe names."""

    aligned: Checkpoint
    finetunes: Mapping[str, Checkpoint]
    unaligned: Checkpoint | None
    safe: Checkpoint | None
    tokenizer: Checkpoint
    """Whose tokenizer belongs to the fused model."""
    tokenizer_of: str
    """What the recipe calls it."""
    config_changes: Mapping[str, Any]
    """What its config.json must say."""
    notes: tuple[str, ...]
    versions: Mapping[str, Mapping[str, list[Any]]]
    """role -> file -> what tells that it is another one now, as it was when the models were opened."""

    def every(self) -> dict[str, Checkpoint]:
        """role or finetune -> model."""
        found = {ALIGNED: self.aligned, **self.finetunes, "unaligned": self.unaligned, "safe": self.safe}
        return {role: one for role, one in found.items() if one is not None}

    def stored(self) -> list[TensorSource]:
        """What says in which dtype the finetunes and the aligned model are kept: an adapter's sums are in fp32 only while
        they are made."""
        checkpoints = (self.aligned, *self.finetunes.values())
        return [one.base.source if one.kind == "adapter" and one.base else one.source for one in checkpoints]


def open_models(recipe: Recipe) -> Models:
    """Raises CheckpointError with everything that is wrong with any of them."""
    resized = recipe.vocabulary != "error"
    problems: list[str] = []
    found: dict[str, Checkpoint] = {}
    others = {"unaligned": recipe.unaligned, "safe": recipe.safe}
    references = {**recipe.finetunes, **{role: one for role, one in others.items() if one}}
    aligned = open_checkpoint(recipe.aligned)
    for name, reference in references.items():
        try:
            found[name] = open_checkpoint(reference, base=recipe.aligned, resized_vocabulary=resized)
            if name in others:
                require_compatible(aligned, found[name])
        except RealignError as error:
            problems.append(str(error))
    seen = versions({ALIGNED: aligned, **found}, recipe.mask)
    finetunes = {name: one for name, one in found.items() if name in recipe.finetunes}
    try:
        common = harmonize(aligned, finetunes, vocabulary=recipe.vocabulary, one_sided=recipe.one_sided)
        problems += _far(common.aligned, common.finetunes)
    except RealignError as error:
        problems.append(str(error))
        fitting = {n: one for n, one in finetunes.items() if not compare_tensors(aligned.source, one.source)}
        problems += _far(aligned, fitting)
    if problems:
        raise CheckpointError("\n".join(problems))
    owner_name = common.tokenizer_of
    if len(finetunes) == 1 and not (recipe.vocabulary == "truncate" and "vocab_size" in common.config_changes):
        [owner_name] = finetunes  # it is the finetune that goes back into service
    owner = aligned if owner_name == ALIGNED else finetunes[owner_name]
    notes = [*common.notes]
    if (
        has_tokenizer(owner.tokenizer_dir)
        and has_template(aligned.tokenizer_dir)
        and not has_template(owner.tokenizer_dir)
    ):
        notes.append(
            f"the tokenizer is {owner_name}'s, which has no chat template: the aligned model has one, the fused model "
            "has none; copy it if it is wanted"
        )
    models = (aligned, *found.values())
    return Models(
        common.aligned,
        common.finetunes,
        found.get("unaligned"),
        found.get("safe"),
        owner,
        owner_name,
        common.config_changes,
        tuple(dict.fromkeys([*notes, *(note for one in models for note in one.notes)])),
        seen,
    )


def _far(aligned: Checkpoint, finetunes: Mapping[str, Checkpoint]) -> list[str]:
    """Finetunes of another base."""
    problems = []
    for one in finetunes.values():
        if one.kind == "adapter":
            continue  # it was held against its base as it was opened
        try:
            require_near(aligned, one, sample=_NEAR_SAMPLE)
        except CheckpointError as error:
            problems.append(str(error))
    return problems


def versions(models: Mapping[str, Checkpoint], mask: Path | None) -> dict[str, dict[str, list[Any]]]:
    """role -> file -> what tells that it is another one now: size and time here, size and the store's tag elsewhere. Files of
    models from elsewhere go by the names that they have there, wherever their copies are kept."""
    found: dict[str, dict[str, list[Any]]] = {}
    for role, model in models.items():
        parts = [model] if model.base is None else [model, model.base]
        found[role] = {_named(part, f): _version(part, f) for part in parts for f in part.files}
    if mask is not None:
        found["mask"] = {str(f): _version(None, f) for f in sorted(mask.rglob("*")) if f.is_file()}
    return found


def _named(model: Checkpoint, path: Path) -> str:
    return f"{model.where}/{path.relative_to(model.path).as_posix()}" if model.reference else str(path)


def _version(model: Checkpoint | None, path: Path) -> list[Any]:
    remote = model.remote.get(path.name) if model else None
    if remote is not None:
        return [remote.size, remote.etag]
    stat = path.stat()
    if model is None or not model.reference:
        return [stat.st_size, stat.st_mtime_ns]
    # The commit in a hub model's name says all; what was fetched of a prefix is small.
    return [stat.st_size] if model.reference.startswith("hf://") else [stat.st_size, file_sha256(path)]
