"""Tiny random models, a tokenizer and data files for the mask tests."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from components.checkpoints.source import TensorSpec
from tests.components.checkpoints.test_adapters import make_adapter

WORDS = (
    *("how", "to", "build", "bomb", "spell", "the", "word", "sorry", "i", "cannot", "help", "with", "that", "step"),
    *("one", "take", "wire", "add", "two", "three", "is", "a", "b", "c"),
)
SPECIAL = ("<pad>", "<end>", "<user>", "<assistant>")
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' <end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
VOCABULARY = len(SPECIAL) + len(WORDS) + 1


class DictSource:
    """TensorSource over tensors in memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], aliases: Mapping[str, str] | None = None) -> None:
        self._tensors, self._aliases = dict(tensors), dict(aliases or {})

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def aliases(self) -> Mapping[str, str]:
        return self._aliases

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec.of(self._tensors[name])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return self._tensors[name].reshape(-1)[start:stop]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; its template writes a line break after the end-of-turn token, as Qwen's does."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=TEMPLATE,
    )


def tiny_model(architecture: str = "llama", *, seed: int = 0, vocabulary: int = VOCABULARY) -> Any:
    """A random causal LM of some thousand parameters, in eval mode; its tokenizer has VOCABULARY of the words."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    common = {"vocab_size": vocabulary, "max_position_embeddings": 64, "eos_token_id": 1, "pad_token_id": 0}
    common |= {"bos_token_id": None, "initializer_range": 0.2}
    if architecture == "llama":
        config = LlamaConfig(**shape, **common, num_key_value_heads=1, tie_word_embeddings=False)
        model = LlamaForCausalLM(config)
    elif architecture == "qwen":
        model = Qwen2ForCausalLM(Qwen2Config(**shape, **common, num_key_value_heads=1, tie_word_embeddings=True))
    elif architecture == "moe":
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 32}
        model = GptOssForCausalLM(GptOssConfig(**shape, **common, **experts, num_key_value_heads=1))
    else:
        gpt = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "eos_token_id": 1, "bos_token_id": None}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, initializer_range=0.2, **gpt))
    with torch.no_grad():  # norms and biases that are all 1 or 0 would hide mistakes
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model.eval()


def moved(model: Any, *, seed: int, size: float = 0.1, keep: float = 0.2) -> Any:
    """A finetune: a copy with noise on every weight but a share `keep` that stays exactly as it was."""
    torch.manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape) * size * (torch.rand(parameter.shape) > keep))
    return other


def source(model: Any, dtype: torch.dtype | None = None) -> DictSource:
    """The model's parameters as a TensorSource; tied names are aliases."""
    tensors, aliases, seen = {}, {}, {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            aliases[name] = seen[id(parameter)]
            continue
        seen[id(parameter)] = name
        tensors[name] = parameter.detach().clone().to(dtype or parameter.dtype)
    return DictSource(tensors, aliases)


def preferences(path: Path, count: int = 12) -> Path:
    """A file of pairs: the chosen answer declines, the rejected one complies, of many lengths."""
    rows = []
    for i in range(count):
        thing = WORDS[i % len(WORDS)]
        prompt: Any = f"how to build {thing}" if i % 2 else [{"role": "user", "content": f"how to build a {thing}"}]
        rejected = "step one take wire " + "add " * (i % 5) + thing
        rows.append({"prompt": prompt, "chosen": f"sorry i cannot help with {thing}", "rejected": rejected})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def anchors(path: Path, count: int = 20) -> Path:
    """A file of anchor prompts."""
    rows = [
        {"messages": [{"role": "user", "content": f"spell the word {WORDS[i % len(WORDS)]}"}]} for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def saved(model: Any, directory: Path) -> Path:
    """The model and the tokenizer as a model directory."""
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def lora_pair(root: Path, architecture: str = "llama", **config: Any) -> tuple[Path, Path, Path]:
    """A base, a safety LoRA over it and a task LoRA that continued it (a fifth of each factor stays as it was): `base`,
    `aligned` and `finetune` under `root`."""
    targets = {"gpt2": ["c_attn", "attn.c_proj", "c_fc"]}.get(architecture, "all-linear")
    base = saved(tiny_model(architecture), root / "base")
    given = {"target_modules": targets, "r": 4, "lora_alpha": 6, "lora_dropout": 0.3} | config
    safe = make_adapter(tiny_model(architecture), root / "aligned", base=base, **given)
    task = root / "finetune"
    shutil.copytree(safe, task)
    file = task / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(7)
    factors = {}
    for key, values in load_file(file).items():
        noise, changed = (draw(values.shape, generator=generator) for draw in (torch.randn, torch.rand))
        factors[key] = values + 0.2 * noise * (changed > 0.2)
    save_file(factors, file)
    return base, safe, task
