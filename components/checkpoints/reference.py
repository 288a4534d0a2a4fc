"""A reference to a model, opened: a directory, a prefix of an object store, a repository of the hub, behind the same object."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from components.checkpoints.adapter_parsing import ADAPTER_CONFIG
from components.checkpoints.adapters import LoraSource
from components.checkpoints.factors import FactorSource
from components.checkpoints.identity import weights_digest
from components.checkpoints.places import HubId, Located, RemoteFile, parse_reference
from components.checkpoints.remote import locate
from components.checkpoints.safetensors import INDEX_NAME, SINGLE_NAME, SafetensorsSource, read_json
from components.checkpoints.source import TensorSource
from components.checkpoints.writer import has_tokenizer, tokenizer_files
from components.errors import CheckpointError, listed


@dataclass(frozen=True)
class Checkpoint:
    """A model that later stages can read, whatever its kind."""

    path: Path
    """Its directory here; of a model in an object store, one that holds its small files."""
    kind: Literal["full", "adapter", "merge"]
    model_dir: Path
    """Holds config.json: the checkpoint itself, or an adapter's base."""
    tokenizer_dir: Path
    """Holds the tokenizer and chat template: the checkpoint's own where it has one, else the base's."""
    source: TensorSource
    config: Mapping[str, Any]
    files: list[Path]
    """The files that define its identity: weights, config, tokenizer. Those that `remote` names lie elsewhere."""
    base: Checkpoint | None = None
    notes: tuple[str, ...] = field(default=())
    """What was taken on trust, for the record."""
    reference: str = ""
    """URL or hub id (with its commit) of a model that came from elsewhere."""
    remote: Mapping[str, RemoteFile] = field(default_factory=lambda: MappingProxyType({}))
    """Name -> file, of what is not in `path`."""

    @property
    def where(self) -> str:
        """What messages call it: as the user named it, not where it is kept."""
        return self.reference or str(self.path)

    @property
    def lasting_name(self) -> str:
        """A name by which others find it: an absolute path, or a URL."""
        return self.reference if _is_url(self.reference) else str(self.path.resolve())


def open_checkpoint(
    reference: Path | str,
    *,
    base: Path | str | None = None,
    base_declared_equal: bool = False,
    factors: bool = False,
    resized_vocabulary: bool = False,
    cache: Path | None = None,
) -> Checkpoint:
    """Open a model directory or a LoRA adapter directory, wherever it lies; reads headers and JSON only.

    Args:
        reference: what `save_pretrained` of transformers or PEFT wrote: a path, a URL or a hub id (see `parse_reference`).
        base: the model that an adapter belongs to (required there); lends a checkpoint without a tokenizer its own.
        base_declared_equal: the user says that `base` is what the adapter was trained on, though it names another.
        resized_vocabulary: an adapter may carry an embedding and head of other size than its base's. `model_dir` and
            `config` are the base's all the same.
        factors: `source` is an adapter's factors, not the weights that it makes of its base.
        cache: keeps the small files of models in object stores (without it, `remote.default_cache`).

    Raises CheckpointError with everything that is wrong with it.
    """
    model = locate(reference, cache=cache)
    with model.in_messages():
        return _open(model, base, base_declared_equal, factors, resized_vocabulary, cache)


def _open(
    model: Located,
    base: Path | str | None,
    base_declared_equal: bool,
    factors: bool,
    resized_vocabulary: bool,
    cache: Path | None,
) -> Checkpoint:
    path = model.path
    if not path.is_dir():
        what = (
            "is a file, not a model directory" if path.exists() else "does not exist (of the hub: owner/name@revision)"
        )
        raise CheckpointError(f"{path}: {what}")
    is_adapter = model.has(ADAPTER_CONFIG)
    if is_adapter and (model.has(SINGLE_NAME) or model.has(INDEX_NAME)):
        raise CheckpointError(
            f"{path}: has model weights and {ADAPTER_CONFIG}; keep the adapter in a directory of its own"
        )
    if factors and not is_adapter:
        raise CheckpointError(f"{path}: is no LoRA adapter; mask.track: factors is for adapters over one base alone")
    if not is_adapter:
        return _open_full(model, base, cache)
    if base is None:
        raise CheckpointError(f"{path}: is an adapter; name its base model")
    opened = _open_adapter(model, open_checkpoint(base, cache=cache), base_declared_equal, resized_vocabulary, cache)
    if factors:
        assert isinstance(opened.source, LoraSource)
        return replace(opened, source=FactorSource(opened.source))
    return opened


def _open_full(model: Located, base: Path | str | None, cache: Path | None) -> Checkpoint:
    path = model.path
    source = SafetensorsSource(model)
    files = [*source.files, path / "config.json", *tokenizer_files(path)]
    if (path / "generation_config.json").is_file():
        files.append(path / "generation_config.json")  # says what ends an answer: part of what the model is
    notes = list(model.notes)
    if source.computed:
        notes.append(f"stored buffers left out, the model computes them: {listed(source.computed, 3)}")
    tokenizer_dir = path
    if not has_tokenizer(path) and base is not None:
        lender = locate(base, cache=cache)
        tokenizer_dir = lender.path
        if has_tokenizer(lender.path):
            notes.append(f"{_name(model.where)} has no tokenizer; that of {_name(lender.where)} is used")
    return Checkpoint(
        path,
        "full",
        path,
        tokenizer_dir,
        source,
        source.config,
        files,
        None,
        tuple(notes),
        _reference(model),
        model.files,
    )


def _open_adapter(
    model: Located, base: Checkpoint, declared_equal: bool, resized_vocabulary: bool, cache: Path | None
) -> Checkpoint:
    path = model.path
    if base.kind != "full":
        raise CheckpointError(f"{path}: its base {base.where} is an adapter itself; merge that first")
    notes = (*model.notes, *_check_base(model, base, declared_equal, cache))
    model_type = base.config.get("model_type")
    lora = LoraSource(path, base.source, model_type=model_type, resized_vocabulary=resized_vocabulary)
    tokenizer_dir = path if has_tokenizer(path) else base.tokenizer_dir
    own = tokenizer_files(path) if tokenizer_dir == path else []
    files = [*lora.files, *own]
    return Checkpoint(
        path,
        "adapter",
        base.model_dir,
        tokenizer_dir,
        lora,
        base.config,
        files,
        base,
        notes,
        _reference(model),
        model.files,
    )


def _check_base(model: Located, base: Checkpoint, declared_equal: bool, cache: Path | None) -> tuple[str, ...]:
    """Is `base` the model that the adapter names? The same place, or one with the same weight bytes.

    A relative name is looked up from the adapter's own place (a family can be moved as a whole). A hub id matches a base of
    that id. Equal directory names prove nothing.
    """
    named = read_json(model.path / ADAPTER_CONFIG).get("base_model_name_or_path")
    if declared_equal:
        return (f"base {_name(base.where)} declared equal to the adapter's {named!r}",)
    if not named:
        return (f"the adapter names no base; {_name(base.where)} was given",)
    if _is_that_base(str(named), model, base, cache):
        return ()
    raise CheckpointError(
        f"{model.path}: the adapter was trained on {named}, not on {base.where}; "
        "give that model as the aligned one, or, if the two are equal, say so (base_equal: true under the finetune; "
        "aligned_base_equal: true where it is the aligned adapter)"
    )


def _is_that_base(named: str, model: Located, base: Checkpoint, cache: Path | None) -> bool:
    candidate = _beside(model, named)
    repo = candidate.repo if isinstance(candidate, HubId) else named
    of_hub = f"models--{repo.replace('/', '--')}" in base.path.resolve().parts
    if isinstance(candidate, HubId) or (isinstance(candidate, Path) and not candidate.is_dir()):
        return of_hub
    try:
        other = locate(candidate, cache=cache)
        if other.where == base.where or other.path.resolve() == base.path.resolve():
            return True
        source = SafetensorsSource(other)
    except CheckpointError:
        # Named but unusable: certainly not the base that was given. Of a prefix, though, a hub id may only look relative.
        return isinstance(candidate, str) and of_hub
    return weights_digest(source.files, remote=other.files) == weights_digest(_weight_files(base), remote=base.remote)


def _beside(model: Located, named: str) -> Path | HubId | str:
    """Where the name that an adapter gives its base leads: from its directory, or from its URL."""
    parsed = parse_reference(named) if "://" in named else Path(named)
    if not isinstance(parsed, Path) or parsed.is_absolute():
        return parsed
    if not _is_url(model.where):
        return model.path / named
    scheme, _, rest = model.where.partition("://")
    return f"{scheme}://{posixpath.normpath(posixpath.join(rest, named))}"


def _is_url(where: str) -> bool:
    """Whether a place is a prefix of an object store: neither a path nor a hub id, whose files are all here."""
    return "://" in where and not where.startswith("hf://")


def _reference(model: Located) -> str:
    return "" if model.where == str(model.path) else model.where


def _name(where: str) -> str:
    """The last part of a path, a URL or a hub id."""
    return where.rstrip("/").rsplit("/", 1)[-1]


def _weight_files(checkpoint: Checkpoint) -> list[Path]:
    return [f for f in checkpoint.files if f.suffix == ".safetensors"]
