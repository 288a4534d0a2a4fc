"""What a PEFT LoRA adapter directory holds, and whether it can be merged into its base: config, factors, magnitudes, whole
tensors. Everything here is read from headers and JSON; `adapters.py` does the arithmetic."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from components.checkpoints.headers import Header, read_header
from components.checkpoints.safetensors import MappedFile, read_json
from components.checkpoints.source import TensorSource, TensorSpec
from components.checkpoints.vocabularies import is_by_token
from components.errors import CheckpointError, listed

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_FACTORS = {
    ".lora_A.weight": ("A", False),
    ".lora_B.weight": ("B", False),
    ".lora_embedding_A": ("A", True),
    ".lora_embedding_B": ("B", True),
}
_MAGNITUDE = ".lora_magnitude_vector"
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt"})  # their layers keep weights as (in, out)
_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "true", "false"})
_REFUSED: Mapping[str, str] = {
    "use_qalora": "QALoRA pools its inputs and has no plain merged weight",
    "lora_bias": "a bias inside LoRA (lora_bias) is not supported; merge it with PEFT and give the result",
    "alora_invocation_tokens": "activated LoRA switches on in mid-prompt and cannot be merged",
    "target_parameters": "LoRA on bare parameters (target_parameters) is not supported; merge it with PEFT",
    "trainable_token_indices": "trained single tokens (trainable_token_indices) are not supported; merge it with PEFT",
    "layer_replication": "replicated layers change the architecture",
    "use_bdlora": "block-diagonal LoRA is not supported; merge it with PEFT",
    "arrow_config": "Arrow routes between adapters at run time and cannot be merged",
    "kasa_config": "KaSA is not supported; merge it with PEFT",
    "monteclora_config": "MonteCLoRA is not supported; merge it with PEFT",
    "megatron_config": "Megatron adapters are not supported",
}


@dataclass(frozen=True)
class LoraPair:
    """The factors of one adapted weight: A is (rank, in), B is (out, rank), the weight (out, in), or (in, out) when
    `transposed`. `magnitude`, (out,), is DoRA's. Names are those in the adapter's file, `module` is the base's."""

    module: str
    a: str
    b: str
    rank: int
    scaling: float
    transposed: bool
    magnitude: str | None = None


def read_adapter_config(adapter_dir: Path) -> dict[str, Any]:
    """adapter_config.json, refused with every reason at once when it is no plain LoRA."""
    path = adapter_dir / ADAPTER_CONFIG
    config = read_json(path)
    kind = str(config.get("peft_type", "unknown"))
    if kind != "LORA":
        raise CheckpointError(
            f"{path}: peft_type {kind} is not supported, only LORA; merge it with PEFT and give the result"
        )
    problems = [reason for key, reason in _REFUSED.items() if config.get(key)]
    init = config.get("init_lora_weights", True)
    if str(init).lower() not in _PLAIN_INITS:
        problems.append(
            f"init_lora_weights={init} changes the base's weights; "
            "save it with PEFT's path_initial_model_for_weight_conversion"
        )
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or config[key] <= 0:
            problems.append(f"{key} must be a positive number, not {config.get(key)!r}")
    if problems:
        raise CheckpointError(f"{path}: {listed(problems)}")
    return config


@dataclass(frozen=True)
class Parsed:
    """The adapter's tensors by purpose."""

    factors: Mapping[str, Mapping[str, str]]
    """module -> (A or B -> key)"""
    embeddings: frozenset[str]
    """Modules whose factors are an embedding's."""
    magnitudes: Mapping[str, str]
    """module -> key of its DoRA magnitudes"""
    replaced: Mapping[str, str]
    """base tensor -> key of what takes its place"""
    problems: list[str]

    @staticmethod
    def of(header: Header) -> Parsed:
        """Sort a file's tensors by their names."""
        factors: dict[str, dict[str, str]] = {}
        embeddings: set[str] = set()
        magnitudes: dict[str, str] = {}
        replaced: dict[str, str] = {}
        problems: list[str] = []
        for key in sorted(header.tensors):
            plain = key.removeprefix(PREFIX)
            suffix = next((s for s in _FACTORS if plain.endswith(s)), None)
            if suffix is not None:
                module = plain.removesuffix(suffix)
                letter, is_embedding = _FACTORS[suffix]
                factors.setdefault(module, {})[letter] = key
                if is_embedding:
                    embeddings.add(module)
            elif plain.endswith(_MAGNITUDE):
                magnitudes[plain.removesuffix(_MAGNITUDE)] = key
            elif ".original_module." in plain:
                continue  # what a module of modules_to_save was before it was trained; PEFT saves it when it saves embeddings
            elif ".lora_" in plain:
                problems.append(f"tensor {key} belongs to an adapter kind that is not supported")
            else:
                replaced[plain.replace(".modules_to_save.", ".").replace(".base_layer.", ".")] = key
        if not factors:
            problems.append(f"{ADAPTER_WEIGHTS} holds no LoRA factors")
        return Parsed(factors, frozenset(embeddings), magnitudes, replaced, problems)


def fit(
    parsed: Parsed,
    header: Header,
    config: Mapping[str, Any],
    base: TensorSource,
    *,
    model_type: str | None,
    resized_vocabulary: bool,
) -> tuple[dict[str, LoraPair], dict[str, str], list[str]]:
    """Match what the adapter holds with what the base has: (tensor -> factors, tensor -> key of its replacement, problems)."""
    problems = _magnitude_problems(parsed, config)
    names = set(base.names())
    aliases = base.aliases()
    pairs: dict[str, LoraPair] = {}
    for module, keys in parsed.factors.items():
        name = f"{module}.weight"
        if name in aliases:
            problems.append(f"adapts {name}, which the base ties to {aliases[name]}; untie it or merge with PEFT")
        elif name not in names:
            problems.append(f"adapts module {module}, which the base does not have")
        elif set(keys) != {"A", "B"}:
            problems.append(f"module {module} has only its {' '.join(keys)} factor")
        else:
            problem, pair = _pair(module, parsed, header, config, base.spec(name), model_type)
            problems += problem
            if pair is not None:
                pairs[name] = pair
    replaced, more = _replacements(parsed.replaced, header, base, resized_vocabulary)
    return pairs, replaced, problems + more + _missing(parsed, config, names)


def _pair(
    module: str,
    parsed: Parsed,
    header: Header,
    config: Mapping[str, Any],
    weight: TensorSpec,
    model_type: str | None,
) -> tuple[list[str], LoraPair | None]:
    keys, is_embedding = parsed.factors[module], module in parsed.embeddings
    shape_a, shape_b = (header.tensors[keys[k]].spec.shape for k in ("A", "B"))
    if len(shape_a) != 2 or len(shape_b) != 2 or len(weight.shape) != 2:
        return [f"module {module}: only matrices can be adapted (A {list(shape_a)}, base {list(weight.shape)})"], None
    rank, fan_in = shape_a
    fan_out = shape_b[0]
    want = int(_by_pattern(config.get("rank_pattern"), module, config["r"]))
    if rank != want or shape_b[1] != want:
        return [f"module {module}: A {list(shape_a)} and B {list(shape_b)} are not of rank {want}"], None
    fits = {False: weight.shape == (fan_out, fan_in), True: weight.shape == (fan_in, fan_out)}
    if not any(fits.values()):
        return [f"module {module}: B A is {[fan_out, fan_in]}, the base's weight {list(weight.shape)}"], None
    transposed = (
        fits[True] if not all(fits.values()) else is_embedding or _stored_transposed(module, config, model_type)
    )
    if is_embedding and not transposed:
        return [f"module {module}: embedding factors do not fit the base's {list(weight.shape)}"], None
    magnitude = parsed.magnitudes.get(module)
    if magnitude is not None and header.tensors[magnitude].spec.shape != (fan_out,):
        shape = list(header.tensors[magnitude].spec.shape)
        return [f"module {module}: magnitudes are {shape}, one for each of {fan_out} outputs was expected"], None
    alpha = float(_by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"]))
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return [], LoraPair(module, keys["A"], keys["B"], rank, scaling, transposed, magnitude)


def _magnitude_problems(parsed: Parsed, config: Mapping[str, Any]) -> list[str]:
    """PEFT goes by the config: it would not load magnitudes that it does not expect, nor miss those that it does."""
    factored, scaled = set(parsed.factors), set(parsed.magnitudes)
    if not config.get("use_dora"):
        found = listed([parsed.magnitudes[module] for module in sorted(scaled)], 3)
        return [f"holds DoRA magnitudes ({found}), but {ADAPTER_CONFIG} does not say use_dora"] if scaled else []
    problems = [f"module {module} has DoRA magnitudes and no factors" for module in sorted(scaled - factored)]
    return problems + [
        f"module {module} has no DoRA magnitudes, use_dora asks for them" for module in sorted(factored - scaled)
    ]


def _stored_transposed(module: str, config: Mapping[str, Any], model_type: str | None) -> bool:
    """A square matrix does not show its orientation. PEFT goes by the layer's class and leaves its last finding in the
    config; GPT-2's Conv1D layers are known by the model's type."""
    if model_type in _CONV1D_MODELS:
        return not module.endswith("lm_head")
    return bool(config.get("fan_in_fan_out"))


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule for rank_pattern and alpha_pattern: the first pattern that matches a dotted tail of the module."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _replacements(
    saved: Mapping[str, str], header: Header, base: TensorSource, resized_vocabulary: bool
) -> tuple[dict[str, str], list[str]]:
    """Whole tensors (modules_to_save, trained biases, saved embeddings) that take the place of the base's."""
    problems: list[str] = []
    names, aliases = set(base.names()), base.aliases()
    replaced: dict[str, str] = {}
    for name, key in saved.items():
        target = aliases.get(name, name)
        if target not in names:
            problems.append(f"saves {name}, which the base does not have")
        elif not _fits(target, header.tensors[key].spec.shape, base.spec(target).shape, resized_vocabulary):
            shapes = f"{list(header.tensors[key].spec.shape)}, the base's is {list(base.spec(target).shape)}"
            problems.append(f"saves {name} of shape {shapes} (a resized vocabulary is not supported)")
        else:
            replaced[target] = key
    for alias, target in aliases.items():
        both = [n for n in (alias, target) if n in saved]
        if both and not _equal_saved(both, saved, header):
            problems.append(
                f"saves {listed(both)}, but the base ties {alias} to {target}: only one matrix can result; "
                "train with tie_word_embeddings=false, or save both equal"
            )
    return replaced, problems


def _fits(name: str, shape: tuple[int, ...], in_base: tuple[int, ...], resized_vocabulary: bool) -> bool:
    return shape == in_base or (resized_vocabulary and is_by_token(name) and shape[1:] == in_base[1:])


def _equal_saved(names: Sequence[str], saved: Mapping[str, str], header: Header) -> bool:
    """Both ends of a tie saved with the same bits."""
    if len(names) < 2:
        return False
    file = MappedFile(header)
    specs = [header.tensors[saved[n]].spec for n in names]
    first, second = (file.read(saved[n], 0, s.numel) for n, s in zip(names, specs, strict=True))
    return specs[0] == specs[1] and torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def _missing(parsed: Parsed, config: Mapping[str, Any], names: set[str]) -> list[str]:
    """Modules that the config targets and the file lacks: a cut or wrongly saved adapter would merge to half its
    effect."""
    targets = config.get("target_modules")
    restricted = any(config.get(k) for k in ("layers_to_transform", "exclude_modules", "layers_pattern"))
    if not isinstance(targets, list) or restricted:
        return []
    modules = {n.removesuffix(".weight") for n in names if n.endswith(".weight")}
    saved = {n.removesuffix(".weight") for n in parsed.replaced}
    wanted = {m for m in modules if any(m == t or m.endswith(f".{t}") for t in targets)} - saved
    absent = sorted(wanted - set(parsed.factors))
    return [f"{ADAPTER_CONFIG} targets {listed(absent)}, for which there are no factors"] if absent else []


def open_weights(adapter_dir: Path) -> Header:
    """The header of an adapter's one file. Raises CheckpointError for a pickle."""
    path = adapter_dir / ADAPTER_WEIGHTS
    if path.is_file():
        return read_header(path)
    if (adapter_dir / "adapter_model.bin").is_file():
        raise CheckpointError(
            f"{adapter_dir}: adapter_model.bin is a pickle, which can run code when loaded; "
            "convert it to safetensors: load it where you trust it and save_pretrained it again"
        )
    raise CheckpointError(f"{adapter_dir}: no {ADAPTER_WEIGHTS}")
