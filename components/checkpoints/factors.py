"""A LoRA adapter's factors as a TensorSource: A and B are the tensors, the base is not among them.

For finetunes that continued one safety LoRA (the PEFT track of arXiv 2405.09055): what they have in common with it are the
factors, and a mask, a delta or a fusion is taken of each factor by itself, A = A_s + m_A ⊙ (A_t − A_s), B likewise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from components.checkpoints.adapter_parsing import PREFIX
from components.checkpoints.adapters import LoraSource
from components.checkpoints.source import TensorSource, TensorSpec
from components.errors import CheckpointError, listed

_ADAPTER = "default"


class FactorSource:
    """TensorSource of the factors of an adapter, under the names that PEFT saves them by
    (`base_model.model.….lora_A.weight`).

    Raises CheckpointError for an adapter that carries whole tensors (they have no factors) and for DoRA, whose norms tie the
    factors to the base.
    """

    def __init__(self, lora: LoraSource) -> None:
        self.lora = lora
        if lora.saved():
            raise CheckpointError(
                f"{lora.adapter_dir}: carries whole tensors ({listed(sorted(lora.saved()), 3)}); mask.track: factors masks "
                "A and B alone: train without modules_to_save, bias and saved embeddings, or merge and use track: weights"
            )
        scaled = sorted(name for name, pair in lora.pairs().items() if pair.magnitude is not None)
        if scaled:
            raise CheckpointError(
                f"{lora.adapter_dir}: is a DoRA adapter ({listed(scaled, 3)}); its weights are rescaled to norms of base and "
                "factors together, so that masks of A and B alone are no mask of what it does: use track: weights"
            )
        keys = [key for pair in lora.pairs().values() for key in (pair.a, pair.b)]
        self._keys = {PREFIX + key.removeprefix(PREFIX): key for key in keys}

    @property
    def adapter_dir(self) -> Path:
        """Where the adapter lies."""
        return self.lora.adapter_dir

    @property
    def base(self) -> TensorSource:
        """The weights under the adapter."""
        return self.lora.base

    def names(self) -> list[str]:
        """Every factor."""
        return sorted(self._keys)

    def aliases(self) -> Mapping[str, str]:
        """None: factors are not tied."""
        return {}

    def spec(self, name: str) -> TensorSpec:
        """As stored."""
        key = self._keys.get(name)
        if key is None:
            raise CheckpointError(f"{self.adapter_dir}: no factor named {name}")
        return self.lora.weights.header.tensors[key].spec

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened factor."""
        return self.lora.weights.read(self._keys[name], start, self.spec(name).numel if stop is None else stop)

    def scaling_differences(self, other: FactorSource) -> list[str]:
        """Modules that both adapt and that `other` scales otherwise: equal factors would then mean unequal weights."""
        mine, theirs = self.lora.pairs(), other.lora.pairs()
        return [
            f"module {mine[name].module} is scaled by {theirs[name].scaling:g}, not {mine[name].scaling:g}"
            for name in sorted(mine.keys() & theirs.keys())
            if mine[name].scaling != theirs[name].scaling
        ]


def add_factors(model: Any, source: FactorSource) -> Any:
    """The base model with PEFT's LoRA layers for the adapter's factors, in place and in eval mode. Nothing but the factors
    takes a gradient; their values are whoever's calls this to write."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig.from_pretrained(str(source.adapter_dir))
    config.inference_mode = False
    injected = inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    injected.requires_grad_(False)
    for parameter in factor_parameters(injected).values():
        parameter.requires_grad_(True)
    return injected.eval()


def factor_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Name as PEFT saves it -> the factor's parameter in a model that `add_factors` made."""
    return {
        PREFIX + re.sub(rf"(\.lora_\w+)\.{_ADAPTER}(?=\.|$)", r"\1", name): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }
