"""Writing a PEFT LoRA adapter directory, and which whole tensors one carries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from components.checkpoints.adapter_parsing import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from components.checkpoints.adapters import LoraSource
from components.checkpoints.reference import Checkpoint
from components.checkpoints.safetensors import read_json
from components.checkpoints.source import TensorSpec
from components.checkpoints.writer import CheckpointWriter, copy_tokenizer, write_json


def saved_whole(source: LoraSource) -> dict[str, str]:
    """Key in the adapter's file -> tensor, of what the adapter carries whole and does not factor. (A factored embedding is
    often stored beside its factors too; the factors alone then say what becomes of it.)"""
    factored = source.pairs()
    return {key: name for key, name in source.saved().items() if name not in factored}


def write_adapter(
    out_dir: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    *,
    base: Checkpoint,
    tokenizer_dir: Path,
) -> None:
    """An adapter directory that PEFT loads: `tensors` under PEFT's names, `config` as arguments of its LoraConfig, and the
    tokenizer. Raises StorageError when the disk refuses."""
    specs = {key: TensorSpec.of(tensor) for key, tensor in tensors.items()}
    with CheckpointWriter(out_dir, specs, single_file=ADAPTER_WEIGHTS) as writer:
        for key, tensor in tensors.items():
            writer.write_whole(key, tensor)
        writer.finish()
    write_adapter_config(out_dir, config, base=base)
    copy_tokenizer(tokenizer_dir, out_dir)


def write_adapter_config(out_dir: Path, config: Mapping[str, Any], *, base: Checkpoint) -> None:
    """adapter_config.json as PEFT writes it, but for lists: PEFT keeps sets, whose order changes from run to run."""
    from peft import LoraConfig

    LoraConfig(**config, base_model_name_or_path=base.lasting_name, inference_mode=True).save_pretrained(out_dir)
    written = read_json(out_dir / ADAPTER_CONFIG)
    texts = {k: v for k, v in written.items() if isinstance(v, list) and all(isinstance(i, str) for i in v)}
    write_json(out_dir / ADAPTER_CONFIG, dict(sorted({**written, **{k: sorted(v) for k, v in texts.items()}}.items())))


def copy_adapter_files(adapter: Checkpoint, out_dir: Path, *, tokenizer_dir: Path) -> list[str]:
    """Beside factors of an adapter's own shapes: its config, with its base named where it lies, and the tokenizer. Returns the
    names written."""
    assert adapter.base is not None
    config = read_json(adapter.path / ADAPTER_CONFIG)
    write_json(out_dir / ADAPTER_CONFIG, {**config, "base_model_name_or_path": adapter.base.lasting_name})
    return [ADAPTER_CONFIG, *copy_tokenizer(tokenizer_dir, out_dir)]
