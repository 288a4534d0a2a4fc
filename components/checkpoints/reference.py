"""A reference to a model, opened: a local directory now, other places later, behind the same object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from components.checkpoints.adapter_parsing import ADAPTER_CONFIG
from components.checkpoints.adapters import LoraSource
from components.checkpoints.factors import FactorSource
from components.checkpoints.identity import weights_digest
from components.checkpoints.safetensors import INDEX_NAME, SINGLE_NAME, SafetensorsSource, read_json
from components.checkpoints.source import TensorSource
from components.checkpoints.writer import has_tokenizer, tokenizer_files
from components.errors import CheckpointError, listed


@dataclass(frozen=True)
class Checkpoint:
    """A model that later stages can read, whatever its kind."""

    path: Path
    kind: Literal["full", "adapter", "merge"]
    model_dir: Path
    """Holds config.json: the checkpoint itself, or an adapter's base."""
    tokenizer_dir: Path
    """Holds the tokenizer and chat template: the checkpoint's own where it has one, else the base's."""
    source: TensorSource
    config: Mapping[str, Any]
    files: list[Path]
    """The files that define its identity: weights, config, tokenizer."""
    base: Checkpoint | None = None
    notes: tuple[str, ...] = field(default=())
    """What was taken on trust, for the record."""


def open_checkpoint(
    path: Path,
    *,
    base: Path | None = None,
    base_declared_equal: bool = False,
    factors: bool = False,
    resized_vocabulary: bool = False,
) -> Checkpoint:
    """Open a model directory or a LoRA adapter directory; reads headers and JSON only.

    Args:
        path: what `save_pretrained` of transformers or PEFT wrote.
        base: the model that an adapter belongs to (required there); lends a checkpoint without a tokenizer its own.
        base_declared_equal: the user says that `base` is what the adapter was trained on, though it names another.
        resized_vocabulary: an adapter may carry an embedding and head of other size than its base's. `model_dir` and
            `config` are the base's all the same.
        factors: `source` is an adapter's factors, not the weights that it makes of its base.

    Raises CheckpointError with everything that is wrong with it.
    """
    if not path.is_dir():
        what = "is a file, not a model directory" if path.exists() else "does not exist"
        raise CheckpointError(f"{path}: {what}")
    is_adapter = (path / ADAPTER_CONFIG).is_file()
    has_weights = (path / SINGLE_NAME).is_file() or (path / INDEX_NAME).is_file()
    if is_adapter and has_weights:
        raise CheckpointError(
            f"{path}: has model weights and {ADAPTER_CONFIG}; keep the adapter in a directory of its own"
        )
    if factors and not is_adapter:
        raise CheckpointError(f"{path}: is no LoRA adapter; mask.track: factors is for adapters over one base alone")
    if not is_adapter:
        return _open_full(path, base)
    if base is None:
        raise CheckpointError(f"{path}: is an adapter; name its base model")
    opened = _open_adapter(path, open_checkpoint(base), base_declared_equal, resized_vocabulary)
    if factors:
        assert isinstance(opened.source, LoraSource)
        return replace(opened, source=FactorSource(opened.source))
    return opened


def _open_full(path: Path, base: Path | None) -> Checkpoint:
    source = SafetensorsSource(path)
    files = [*source.files, path / "config.json", *tokenizer_files(path)]
    if (path / "generation_config.json").is_file():
        files.append(path / "generation_config.json")  # says what ends an answer: part of what the model is
    notes: list[str] = []
    if source.computed:
        notes.append(f"stored buffers left out, the model computes them: {listed(source.computed, 3)}")
    tokenizer_dir = path
    if not has_tokenizer(path) and base is not None:
        tokenizer_dir = base
        notes.append(f"{path.name} has no tokenizer; that of {base.name} is used")
    return Checkpoint(path, "full", path, tokenizer_dir, source, source.config, files, notes=tuple(notes))


def _open_adapter(path: Path, base: Checkpoint, declared_equal: bool, resized_vocabulary: bool) -> Checkpoint:
    if base.kind != "full":
        raise CheckpointError(f"{path}: its base {base.path} is an adapter itself; merge that first")
    notes = _check_base(path, base, declared_equal)
    model_type = base.config.get("model_type")
    lora = LoraSource(path, base.source, model_type=model_type, resized_vocabulary=resized_vocabulary)
    tokenizer_dir = path if has_tokenizer(path) else base.tokenizer_dir
    own = tokenizer_files(path) if tokenizer_dir == path else []
    return Checkpoint(
        path, "adapter", base.model_dir, tokenizer_dir, lora, base.config, [*lora.files, *own], base, notes
    )


def _check_base(path: Path, base: Checkpoint, declared_equal: bool) -> tuple[str, ...]:
    """Is `base` the model that the adapter names? The same directory, or one with the same weight bytes.

    A relative name is looked up from the adapter's directory (a family can be moved as a whole). A hub id matches a
    base inside a hub cache of that id. Equal directory names prove nothing.
    """
    named = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
    if declared_equal:
        return (f"base {base.path.name} declared equal to the adapter's {named!r}",)
    if not named:
        return (f"the adapter names no base; {base.path.name} was given",)
    candidate = path / named if not Path(named).is_absolute() else Path(named)
    if candidate.is_dir():
        if candidate.resolve() == base.path.resolve():
            return ()
        try:
            other = SafetensorsSource(candidate)
        except CheckpointError:
            other = None  # named but unusable: certainly not the base that was given
        if other is not None and weights_digest(other.files) == weights_digest(_weight_files(base)):
            return ()
    elif f"models--{str(named).replace('/', '--')}" in base.path.resolve().parts:
        return ()
    raise CheckpointError(
        f"{path}: the adapter was trained on {named}, not on {base.path}; "
        "give that model as the aligned one, or, if the two are equal, say so (base_equal: true under the finetune; "
        "aligned_base_equal: true where it is the aligned adapter)"
    )


def _weight_files(checkpoint: Checkpoint) -> list[Path]:
    return [f for f in checkpoint.files if f.suffix == ".safetensors"]
