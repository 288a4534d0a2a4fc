"""Tiny random models, adapters and tokenizers on disk, and sources in memory, for the tests of checkpoints and fusion."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from components.checkpoints.source import TensorSpec


class MemorySource:
    """A TensorSource over a dict of tensors."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], aliases: Mapping[str, str] | None = None) -> None:
        self.tensors = dict(tensors)
        self._aliases = dict(aliases or {})

    def names(self) -> list[str]:
        return sorted(self.tensors)

    def aliases(self) -> Mapping[str, str]:
        return self._aliases

    def spec(self, name: str) -> TensorSpec:
        tensor = self.tensors[self._aliases.get(name, name)]
        return TensorSpec.of(tensor)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return self.tensors[self._aliases.get(name, name)].reshape(-1)[start:stop]


class LogitMask:
    """A mask over logits in memory."""

    def __init__(self, logits: Mapping[str, torch.Tensor], left_out: tuple[str, ...] = ()) -> None:
        self.left_out = left_out
        self.values = {n: t.float().reshape(-1) for n, t in logits.items()}

    def names(self) -> list[str]:
        return sorted(self.values)

    def numel(self, name: str) -> int:
        return self.values[name].numel()

    def is_masked(self, name: str) -> bool:
        return name not in self.left_out

    def soft(self, name: str, start: int, stop: int, *, temperature: float = 1.0) -> torch.Tensor:
        return torch.sigmoid(self.values[name][start:stop] / temperature)

    def binary(self, name: str, start: int, stop: int, *, threshold: float = 0.0) -> torch.Tensor:
        return self.values[name][start:stop] > threshold

    def soft_mean(self, name: str, *, temperature: float = 1.0) -> float:
        return float(torch.sigmoid(self.values[name].double() / temperature).mean())

    def density(self, name: str, *, threshold: float = 0.0) -> float:
        return float((self.values[name] > threshold).double().mean())

    def unit(self, name: str) -> int:
        return 1


def llama(seed: int, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**config, **overrides})).to(dtype).eval()


def qwen(seed: int, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**{**config, **overrides})).to(dtype).eval()


def gpt2(seed: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).eval()


def save(model: Any, path: Path, *, shard: str = "5GB") -> Path:
    model.save_pretrained(path, max_shard_size=shard)
    return path


def save_tokenizer(path: Path, *, words: int = 60, template: str = "{{ messages[0]['content'] }}") -> None:
    """A word-level tokenizer with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i + 3 for i in range(words)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)


def perturbed(model: Any, seed: int, scale: float = 0.05) -> Any:
    """The model with noise on every weight, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_((parameter.float() + noise).to(parameter.dtype))
    return model


def rewrite(file: Path, **changes: torch.Tensor | None) -> None:
    """Replace (or with None remove) tensors of one safetensors file; `__` in a keyword stands for a dot."""
    tensors = load_file(file)
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, file, metadata={"format": "pt"})


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file."""
    value = json.loads(file.read_text())
    value.update(changes)
    file.write_text(json.dumps(value))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and every bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
