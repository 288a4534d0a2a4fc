"""Which checkpoints hold quantised weights: codes and scales of blocks, which have no difference that could be taken, masked
or averaged. Known by what the config says, by a file beside it, or by the names of tensors alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from components.errors import listed

_CONFIG_KEYS = ("quantization_config", "compression_config")
SIDE_FILES = {
    "quantize_config.json": "GPTQ, as AutoGPTQ writes it",
    "quant_config.json": "AWQ, as AutoAWQ writes it",
    "hf_quant_config.json": "ModelOpt",
}
# The end of a tensor's name, or a piece of it between two dots.
_ENDS = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "scales": "GPTQ or AWQ",
    "g_idx": "GPTQ",
    "absmax": "bitsandbytes, 4 bits",
    "nested_absmax": "bitsandbytes, 4 bits",
    "quant_map": "bitsandbytes, 4 bits",
    "nested_quant_map": "bitsandbytes, 4 bits",
    "quant_state": "bitsandbytes, 4 bits",
    "SCB": "bitsandbytes, 8 bits",
    "weight_format": "bitsandbytes, 8 bits",
    "weight_scale_inv": "fp8 in blocks",
    "weight_scale": "fp8 or compressed-tensors",
    "input_scale": "fp8 or compressed-tensors",
    "weight_packed": "compressed-tensors",
    "weight_zero_point": "compressed-tensors",
    "W_q": "HQQ",
}
_BLOCKS = ("_blocks", "_scales")
"""MXFP4 keeps a tensor as a pair of these."""


def quantised_config(directory: Path, config: Mapping[str, Any]) -> str | None:
    """Where and how a model's config says that its weights are quantised: `config.json says quant_method gptq`; None: it does
    not."""
    nested = config.get("text_config")
    for part in (config, nested if isinstance(nested, dict) else {}):
        for key in _CONFIG_KEYS:
            if part.get(key):
                return f"config.json: {_method(key, part[key])}"
    for file, kind in SIDE_FILES.items():
        if (directory / file).is_file():
            return f"{kind}: there is a {file}; remove it if the weights are plain"
    return None


def quantised_tensors(names: Iterable[str]) -> str | None:
    """The same from the names of tensors: the most frequent kind and its first; None: these are plain weights."""
    names = set(names)
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        kind = next((kind for piece in name.split(".") if (kind := _ENDS.get(piece))), None)
        if kind is None and name.endswith(_BLOCKS[0]) and name.removesuffix(_BLOCKS[0]) + _BLOCKS[1] in names:
            kind = "MXFP4"
        if kind is not None:
            found.setdefault(kind, []).append(name)
    if not found:
        return None
    kind, group = max(found.items(), key=lambda item: len(item[1]))
    return f"{kind}: {listed(group, 2)}"


def _method(key: str, section: Any) -> str:
    if not isinstance(section, dict):
        return key
    kind = section.get("quant_method") or next(
        (k for k in ("load_in_4bit", "load_in_8bit") if section.get(k)), "unknown"
    )
    if kind in {"load_in_4bit", "load_in_8bit"}:
        kind = f"bitsandbytes, {kind}"
    details = [str(section[k]) for k in ("format", "fmt", "bnb_4bit_quant_type") if section.get(k)]
    bits = [f"{section['bits']} bits"] if section.get("bits") else []
    return ", ".join([str(kind), *details, *bits])
