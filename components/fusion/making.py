"""A recipe with its models open: what is made of them, and what is said of it, wherever it is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from components.checkpoints.dtypes import all_finite
from components.checkpoints.factors import FactorSource
from components.checkpoints.safetensors import read_json
from components.checkpoints.source import stretch_from
from components.checkpoints.stream import Put
from components.checkpoints.writer import copy_side_files, has_tokenizer, write_json
from components.errors import CheckpointError, listed
from components.fusion.card import model_card
from components.fusion.finite import refuse_not_finite
from components.fusion.fuse import widest
from components.fusion.fused import FusedSource, one_thread
from components.fusion.kernels import library
from components.fusion.merge_functions import BLOCK
from components.fusion.merge_settings import MERGE_PAPERS
from components.fusion.merging import MergedSource
from components.fusion.models import Models, open_models, versions
from components.fusion.recipe import Recipe
from components.fusion.trimming import find_thresholds
from components.late import import_now
from components.masks.artifact import MaskArtifact

CARD_FILE = "README.md"
_GENERATION, _TOKEN_ID = "generation_config.json", "_token_id"


@dataclass(frozen=True)
class Fused:
    """A published fusion."""

    place: str
    """Directory or URL."""
    record: dict[str, Any]
    made: bool
    """False: it was there."""


@dataclass(frozen=True)
class Making:
    """One fusion. Raises what `open_models` raises when it is begun."""

    recipe: Recipe
    models: Models

    @staticmethod
    def of(recipe: Recipe) -> Making:
        return Making(recipe, open_models(recipe))

    @cached_property
    def plan(self) -> dict[str, Any]:
        """Everything that decides the bytes: the recipe, and which files were read."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "inputs": self.models.versions,
            "code": _version_of("safety-realign"),
        }

    @property
    def fingerprint(self) -> str:
        """Twenty hex digits of the plan."""
        return hashlib.sha256(json.dumps(self.plan, sort_keys=True).encode()).hexdigest()[:20]

    def require_unchanged(self) -> None:
        """Raise CheckpointError for inputs that were written to meanwhile: what was made of them may be of two models."""
        now = versions(self.models.every(), self.recipe.mask)
        changed = [file for role, files in now.items() for file in files if files != self.models.versions[role]]
        if changed:
            raise CheckpointError(
                f"changed while it was read: {listed(changed, 4)}; run again when nobody writes there"
            )

    def source(self, processes: int) -> FusedSource:
        """The fused model. What takes a look at all tensors is done here, by several processes, before there is anything to
        write. Raises CheckpointError and ConfigError for what does not fit."""
        sources = {name: model.source for name, model in self.models.finetunes.items()}
        aligned, merge = self.models.aligned.source, self.recipe.merge
        finetune = next(iter(sources.values()))
        if merge is not None:
            thresholds = None
            if merge.method == "ties":
                with one_thread():
                    thresholds = find_thresholds(aligned, sources, merge, processes=processes)
            finetune = MergedSource(aligned, sources, merge, thresholds)
        source = FusedSource(
            aligned=aligned,
            finetune=finetune,
            settings=self.recipe.fusion,
            mask=MaskArtifact.open(self.recipe.mask) if self.recipe.mask else None,
            unaligned=self.models.unaligned.source if self.models.unaligned else None,
            safe=self.models.safe.source if self.models.safe else None,
            stored=self.models.stored(),
        )
        source.settled(processes)
        if not source.compiled:
            import_now(torch)
        return source

    def bytes_read(self, name: str) -> int:
        """Bytes that are read for an element of a tensor."""
        return sum(model.source.spec(name).kind.itemsize for model in self.models.every().values())

    def side_files(self, source: FusedSource, directory: Path) -> list[str]:
        """Write configs and tokenizer: of one finetune its own config, of several the aligned model's. Token ids and generation
        config are those of the model whose tokenizer it is: an answer must end where its template ends it."""
        models, owner = self.models, self.models.tokenizer
        own = next(iter(models.finetunes.values())) if len(models.finetunes) == 1 else models.aligned
        files = copy_side_files(
            model_dir=own.model_dir,
            tokenizer_dir=owner.tokenizer_dir,
            out_dir=directory,
            dtype=widest(source.spec(name).kind for name in source.names()),
            fallback_dir=models.aligned.model_dir,
        )
        if owner.model_dir == own.model_dir and not models.config_changes:
            return files
        config = read_json(directory / "config.json") | dict(models.config_changes)
        if owner.model_dir != own.model_dir:
            config = {key: value for key, value in config.items() if not key.endswith(_TOKEN_ID)}
            config |= {key: value for key, value in owner.config.items() if key.endswith(_TOKEN_ID)}
            generation = directory / _GENERATION
            if (owner.model_dir / _GENERATION).is_file():
                generation.write_bytes((owner.model_dir / _GENERATION).read_bytes())
                files = [*dict.fromkeys([*files, _GENERATION])]
            elif generation.is_file():
                generation.unlink()
                files.remove(_GENERATION)
        write_json(directory / "config.json", config)
        return files

    def card(self, record: Mapping[str, Any], directory: Path) -> str:
        """Write the model card; its name."""
        (directory / CARD_FILE).write_text(model_card(self.recipe, record), encoding="utf-8")
        return CARD_FILE

    def record(self, source: FusedSource, unchanged: Iterable[str]) -> dict[str, Any]:
        """What was made of what."""
        inputs = self.plan["inputs"]
        masks = {"mask": {"mask": str(self.recipe.mask), "files": inputs["mask"]}} if self.recipe.mask else {}
        return {
            "schema_version": 1,
            "kind": "fusion",
            "fingerprint": self.fingerprint,
            "method": self.recipe.method,
            "papers": _papers(self.recipe, source),
            "recipe": self.plan["recipe"],
            "inputs": {
                role: {"model": one.where, "kind": one.kind, "files": inputs[role]}
                for role, one in self.models.every().items()
            }
            | masks,
            "tensors": len(source.names()),
            "parameters": sum(source.spec(name).numel for name in source.names()),
            "output_dtypes": sorted({source.spec(n).kind.name for n in source.names()}),
            "unchanged_tensors": sorted(unchanged),
            "tokenizer": self.models.tokenizer_of if has_tokenizer(self.models.tokenizer.tokenizer_dir) else None,
            "notes": [*self.models.notes, *_widened(source)],
            "environment": {name: _version_of(name) for name in ("safety-realign", "torch")}
            | {"kernels": library() is not None},
        }


def make_part(source: FusedSource, name: str, start: int, stop: int, put: Put) -> bool:
    """Give elements [start, stop) to `put`, which must not keep them; whether they are the aligned model's, which then are only
    copied."""
    # Also to compare: an adapter's weights are made as they are read, and threads that a parent had do not live in its forks.
    with alone(source):
        if source.unchanged(name, start, stop):
            found = stretch_from(source.aligned, name, start, stop)
            if not all_finite(*found):
                refuse_not_finite(name, source.spec(name).shape, start, {"aligned": found})
            put(start, found[0])
            return True
        for at, bits in source.pieces(name, BLOCK, start, stop):
            put(at, bits)
    return False


def _widened(source: FusedSource) -> list[str]:
    """A note on tensors that take more room than the aligned model's."""
    kinds = {(source.aligned.spec(name).kind, source.spec(name).kind) for name in source.names()}
    if source.settings.output_dtype is not None or isinstance(source.aligned, FactorSource):
        return []
    return [
        f"written in {wide}, which holds all models' weights, where the aligned model's are {own}; --dtype says otherwise"
        for own, wide in sorted(kinds, key=str)
        if wide.itemsize > own.itemsize
    ]


def alone(source: FusedSource) -> AbstractContextManager[None]:
    """One thread of torch's, where it has a part in it."""
    return nullcontext() if source.compiled else one_thread()


def code_fingerprint() -> str:
    """Another code or torch may round otherwise: what it began is not gone on with."""
    root = Path(__file__).resolve().parents[1]
    found = hashlib.sha256(f"{_version_of('torch')} {library() is not None}".encode())
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.c")]):
        found.update(path.read_bytes())
    return found.hexdigest()[:20]


def _papers(recipe: Recipe, source: FusedSource) -> list[str]:
    found = list(MERGE_PAPERS[recipe.merge.method]) if recipe.merge else []
    return found if recipe.merge and recipe.mask is None else [*found, source.method.paper]


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
