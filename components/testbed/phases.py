"""The training phases of a family. Each runs in a process of its own choosing with a fixed number of threads, reads the
model before it from disk and leaves a finished directory, so the bytes do not depend on who runs it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from components.testbed.settings import Architecture, FamilySettings, FinetuneSettings, ModelShape, Task, TrainSettings
from components.testbed.tokenizer import train_tokenizer
from components.testbed.trainer import encode, train
from components.testbed.world import Example

MAX_POSITIONS = 128
_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def new_model(architecture: Architecture, shape: ModelShape, words: Any) -> Any:
    """An untrained fp32 model. `qwen` has biases in attention and ties its embeddings; `llama` has neither."""
    common: dict[str, Any] = {
        "vocab_size": -(-len(words) // 8) * 8,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "max_position_embeddings": MAX_POSITIONS,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
        "tie_word_embeddings": architecture == "qwen",
        # The usual 0.02 is for wide models; at this width it leaves the first hundred steps to growing the weights.
        "initializer_range": 0.125,
    }
    if architecture == "qwen":
        return Qwen2ForCausalLM(Qwen2Config(**common))
    model = LlamaForCausalLM(LlamaConfig(**common))
    with torch.no_grad():
        # Not tied, but started equal: copying a word from the prompt is then nearly there from the first step.
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    return model


def load_float32(path: Path) -> Any:
    """A stored model in fp32, the precision every phase trains in."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def save_model(model: Any, words: Any, out: Path, *, dtype: torch.dtype, shard_bytes: int) -> None:
    """Write weights in `dtype` in shards, with config, generation config, tokenizer and chat template; whole or not at all."""
    model.to(dtype)
    model.generation_config.update(
        do_sample=False,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    with _whole(out) as tmp:
        model.save_pretrained(tmp, max_shard_size=shard_bytes)
        words.save_pretrained(tmp)


def ready() -> None:
    """Nothing: calling it loads this module, and with it torch and transformers, while the parent does other work."""


def tokenizer(texts: set[str], out: Path) -> None:
    """The family's tokenizer."""
    with _whole(out) as tmp:
        train_tokenizer(texts).save_pretrained(tmp)


def pretrain(examples: list[Example], tokenizer_dir: Path, settings: FamilySettings, seed: int, out: Path) -> float:
    """The unaligned model, from nothing."""
    _use_threads(settings.pretrain.threads)
    words = AutoTokenizer.from_pretrained(tokenizer_dir)
    torch.manual_seed(seed)
    model = new_model(settings.architecture, settings.shape, words)
    loss = _train(model, words, examples, settings.pretrain, seed)
    save_model(model, words, out, dtype=torch.bfloat16, shard_bytes=settings.shard_bytes)
    return loss


def align(examples: list[Example], unaligned: Path, settings: FamilySettings, seed: int, out: Path) -> float:
    """The aligned model, from the unaligned one as it is stored."""
    _use_threads(settings.align.threads)
    words = AutoTokenizer.from_pretrained(unaligned)
    model = load_float32(unaligned)
    loss = _train(model, words, examples, settings.align, seed + 1)
    save_model(model, words, out, dtype=torch.bfloat16, shard_bytes=settings.shard_bytes)
    return loss


def finetune(
    examples: list[Example],
    aligned: Path,
    settings: FinetuneSettings,
    task: Task,
    seed: int,
    out: Path,
    shard_bytes: int,
) -> float:
    """One finetune of the aligned model as it is stored: a whole model, or a LoRA adapter beside its base."""
    _use_threads(settings.train.threads)
    words = AutoTokenizer.from_pretrained(aligned)
    model = load_float32(aligned)
    phase_seed = seed + 2 + sum(map(ord, task))
    if settings.kind == "lora":
        return train_adapter(model, words, examples, settings.train, phase_seed, out, base=aligned, rank=settings.rank)
    loss = _train(model, words, examples, settings.train, phase_seed)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype]
    save_model(model, words, out, dtype=dtype, shard_bytes=shard_bytes * dtype.itemsize // 2)
    return loss


def train_adapter(
    model: Any,
    words: Any,
    examples: list[Example],
    settings: TrainSettings,
    seed: int,
    out: Path,
    *,
    base: Path,
    rank: int,
    start: Path | None = None,
) -> float:
    """A LoRA adapter of `model`, which lies in `base`: a new one, or one that continues the adapter `start`."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(seed)
    if start is None:
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_LINEAR, task_type="CAUSAL_LM")
        adapted = get_peft_model(model, config)
    else:
        adapted = PeftModel.from_pretrained(model, str(start), is_trainable=True)
    loss = _train(adapted.get_base_model(), words, examples, settings, seed)
    with _whole(out) as tmp:
        adapted.save_pretrained(tmp, safe_serialization=True)
        # PEFT writes the path it loaded from, a model card, and sets in no fixed order.
        (tmp / "README.md").unlink(missing_ok=True)
        path = tmp / "adapter_config.json"
        content = json.loads(path.read_text())
        content["base_model_name_or_path"] = os.path.relpath(base, out)
        content = {
            k: sorted(v) if isinstance(v, list) and all(isinstance(x, str) for x in v) else v
            for k, v in content.items()
        }
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    return loss


def _train(model: Any, words: Any, examples: list[Example], settings: TrainSettings, seed: int) -> float:
    return train(model, encode(words, examples), settings, pad=words.pad_token_id, seed=seed)


def _use_threads(threads: int) -> None:
    torch.set_num_threads(threads)


class _whole:  # noqa: N801 - used as a with-statement
    """A temporary directory beside `out` that takes its name only when the block ends well."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._tmp = out.with_name(f".{out.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        shutil.rmtree(self._tmp, ignore_errors=True)
        self._tmp.mkdir(parents=True)
        return self._tmp

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._tmp.rename(self._out)
        else:
            shutil.rmtree(self._tmp, ignore_errors=True)
