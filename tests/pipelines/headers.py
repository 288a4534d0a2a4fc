"""Llama checkpoints of any size that are headers and nothing else: sparse files, which take no disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from components.checkpoints.dtypes import F32, DType
from components.checkpoints.headers import layout
from components.checkpoints.source import TensorSpec

SHAPES: dict[str, dict[str, int]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "vocab_size": 128256},
    "small": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 256},
}  # fmt: skip
"""Llama 2 7B, Llama 3 70B, and one that fits any machine."""
PARAMETERS = {"7b": 6_738_415_616, "70b": 70_553_706_496}
"""As their model cards count them."""


def llama_specs(shape: dict[str, int], dtype: torch.dtype = torch.bfloat16) -> dict[str, TensorSpec]:
    """Every tensor of an untied Llama."""
    wide, inner, words = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    keys = wide // shape["num_attention_heads"] * shape["num_key_value_heads"]
    sizes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (words, wide), "model.norm.weight": (wide,), "lm_head.weight": (words, wide)
    }  # fmt: skip
    for i in range(shape["num_hidden_layers"]):
        layer = {
            "input_layernorm": (wide,), "post_attention_layernorm": (wide,),
            "self_attn.q_proj": (wide, wide), "self_attn.k_proj": (keys, wide),
            "self_attn.v_proj": (keys, wide), "self_attn.o_proj": (wide, wide),
            "mlp.gate_proj": (inner, wide), "mlp.up_proj": (inner, wide), "mlp.down_proj": (wide, inner),
        }  # fmt: skip
        sizes |= {f"model.layers.{i}.{name}.weight": size for name, size in layer.items()}
    return {name: TensorSpec(DType.of(dtype), size) for name, size in sizes.items()}


def hollow_llama(directory: Path, shape: dict[str, int]) -> Path:
    """A model directory whose weights are a hole in a file."""
    directory.mkdir(parents=True)
    _hollow(directory / "model.safetensors", llama_specs(shape))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False, **shape}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _hollow(path: Path, specs: dict[str, TensorSpec]) -> None:
    raw, header = layout(specs, {"format": "pt"})
    with path.open("wb") as file:
        file.write(raw)
        file.truncate(header.end)


def hollow_adapter(directory: Path, shape: dict[str, int], rank: int, *modules: str) -> int:
    """A LoRA adapter of square projections whose factors are a hole in a file. Returns how many elements they have."""
    directory.mkdir(parents=True)
    wide, specs = shape["hidden_size"], dict[str, TensorSpec]()
    for i in range(shape["num_hidden_layers"]):
        for module in modules:
            name = f"base_model.model.model.layers.{i}.self_attn.{module}"
            specs[f"{name}.lora_A.weight"] = TensorSpec(F32, (rank, wide))
            specs[f"{name}.lora_B.weight"] = TensorSpec(F32, (wide, rank))
    _hollow(directory / "adapter_model.safetensors", specs)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(modules)}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return sum(spec.numel for spec in specs.values())


def hollow_factors(root: Path, size: str, *modules: tuple[str, ...]) -> tuple[Path, int]:
    """A run config of `track: factors`: a safety LoRA (rank 8) on the query and output projections, and a finetune for each of
    `modules`, which it adapts. With it the safety LoRA's elements."""
    path = hollow_config(root, size, mask={"track": "factors"}, aligned="safety", aligned_base="aligned")
    numel = hollow_adapter(root / "safety", SHAPES[size], 8, "q_proj", "o_proj")
    for i, adapted in enumerate(modules):
        hollow_adapter(root / f"lora-{i}", SHAPES[size], 8, *adapted)
    config = yaml.safe_load(path.read_text())
    config["finetunes"] = [
        {"name": f"f{i}", "path": f"lora-{i}", "anchor": "prompts.jsonl"} for i in range(len(modules))
    ]
    path.write_text(yaml.safe_dump(config))
    return path, numel


def hollow_config(root: Path, size: str, *, finetunes: int = 1, **sections: Any) -> Path:
    """A run config over an aligned model and finetunes of a size in SHAPES, with data files of known lengths."""
    hollow_llama(root / "aligned", SHAPES[size])
    for i in range(finetunes):
        hollow_llama(root / f"finetune-{i}", SHAPES[size])
    pair = {"prompt": "p" * 384, "chosen": "c" * 720, "rejected": "r" * 720}
    (root / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    (root / "prompts.jsonl").write_text(json.dumps({"prompt": "q" * 384}) + "\n")
    (root / "harmful.jsonl").write_text(json.dumps({"prompt": "h" * 384}) + "\n")
    harmful = {"name": "harmful", "kind": "harmful", "path": "harmful.jsonl"}
    config = {
        "name": size,
        "aligned": "aligned",
        "finetunes": [{"name": f"f{i}", "path": f"finetune-{i}", "anchor": "prompts.jsonl"} for i in range(finetunes)],
        "mask": {"preferences": "pairs.jsonl"},
        "evaluation": {"sets": [harmful, {**harmful, "split": "dev"}]},
    }
    for section, values in sections.items():
        config[section] = {**config.get(section, {}), **values} if isinstance(values, dict) else values
    path = root / "realign.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
