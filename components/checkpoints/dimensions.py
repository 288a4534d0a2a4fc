"""The sizes of a decoder that say how much memory its forward takes, from its config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from components.errors import CheckpointError


@dataclass(frozen=True)
class Dimensions:
    """Of a decoder-only transformer; what a config does not say is as transformers would take it."""

    hidden: int
    layers: int
    inner: int
    """Width of a layer's feed-forward part that one token goes through, over its experts."""
    queries: int
    """Heads × head width."""
    keys: int
    """Key-value heads × head width."""
    vocabulary: int

    @classmethod
    def of(cls, config: Mapping[str, Any], where: object = "config.json") -> Dimensions:
        """Raises CheckpointError for a config that names no hidden size, layers, heads or vocabulary."""
        text = config.get("text_config")
        known = {**config, **text} if isinstance(text, dict) else dict(config)

        def find(*names: str, default: int | None = None) -> int:
            found = next((known[name] for name in names if isinstance(known.get(name), int)), default)
            if found is None:
                raise CheckpointError(f"{where}: has none of {', '.join(names)}; memory cannot be estimated")
            return int(found)

        hidden, heads = find("hidden_size", "n_embd", "d_model"), find("num_attention_heads", "n_head")
        width = find("head_dim", default=hidden // heads)
        experts = find("num_experts_per_tok", "num_experts_per_token", default=1)
        return cls(
            hidden=hidden,
            layers=find("num_hidden_layers", "n_layer"),
            inner=experts * find("moe_intermediate_size", "intermediate_size", "n_inner", default=4 * hidden),
            queries=heads * width,
            keys=width * find("num_key_value_heads", default=heads),
            vocabulary=find("vocab_size"),
        )

    def cached(self, itemsize: int) -> int:
        """Bytes of keys and values that a token leaves in the cache."""
        return 2 * self.keys * self.layers * itemsize
