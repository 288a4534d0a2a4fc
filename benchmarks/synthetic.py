"""Llama checkpoints of random weights in any size, written block by block, and finetunes that differ a bit everywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SHAPES: Mapping[str, dict[str, int]] = {
    "quick": {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4,
              "num_attention_heads": 4, "num_key_value_heads": 2},
    "1b": {"vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
           "num_attention_heads": 32, "num_key_value_heads": 4},
    "7b": {"vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 32},
}  # fmt: skip
"""0.9 M, 1.19 B and 6.74 B parameters; 2 bytes each."""
_SPREAD, _DELTA = 0.02, 0.002
"""Standard deviations of the base's weights and of what a finetune adds."""
_BLOCK = 1 << 20


def specs_of(shape: Mapping[str, int], dtype: str = "bfloat16") -> dict[str, Any]:
    """tensor -> TensorSpec of an untied Llama."""

    from components.checkpoints.dtypes import named
    from components.checkpoints.source import TensorSpec

    hidden, inner, vocabulary = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    narrow = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    layer = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (narrow, hidden), "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        f"model.layers.{i}.{part}.weight": size
        for i in range(shape["num_hidden_layers"])
        for part, size in layer.items()
    }
    shapes |= {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    shapes["model.norm.weight"] = (hidden,)
    return {name: TensorSpec(named(dtype), size) for name, size in shapes.items()}


def nbytes(shape: Mapping[str, int]) -> int:
    """Size of one checkpoint's weights."""
    return sum(spec.nbytes for spec in specs_of(shape).values())


def make_model(
    out: Path,
    shape: Mapping[str, int],
    *,
    seed: int,
    base: Path | None = None,
    shard: int = 2 * 10**9,
    dtype: str = "bfloat16",
) -> None:
    """Write a checkpoint; with `base` a finetune of that one, every weight moved by a tenth of the weights' own spread."""
    import torch

    from components.checkpoints.safetensors import SafetensorsSource
    from components.checkpoints.source import blocks
    from components.checkpoints.writer import CheckpointWriter

    specs = specs_of(shape, dtype)
    before = None if base is None else SafetensorsSource(base)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.empty(_BLOCK)
    with CheckpointWriter(out, specs, max_shard_bytes=shard) as writer:
        for name, spec in sorted(specs.items()):
            for start, stop in blocks(spec.numel, _BLOCK):
                values = noise[: stop - start].normal_(0, _SPREAD if before is None else _DELTA, generator=generator)
                if before is not None:
                    values = values + before.read(name, start, stop)
                writer.write(name, start, values.to(spec.dtype))
        writer.finish()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **shape, "tie_word_embeddings": False,
              "torch_dtype": dtype, "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048,
              "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    (out / "config.json").write_text(json.dumps(config, indent=2))


def make_family(
    root: Path, shape: Mapping[str, int], *, shard: int = 2 * 10**9, dtype: str = "bfloat16"
) -> dict[str, Path]:
    """A base and two finetunes, `a` and `b`, under `root`."""
    found = {name: root / name for name in ("base", "a", "b")}
    for seed, (name, path) in enumerate(found.items()):
        before = None if name == "base" else found["base"]
        make_model(path, shape, seed=seed, base=before, shard=shard, dtype=dtype)
    return found
