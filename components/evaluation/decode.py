"""Greedy decoding of one batch, with rows leaving as soon as they have ended.

Shapes: B rows still in the batch, P padded prompt length, L tokens in the cache, H key-value heads, D head width.

transformers' own `generate` carries every row to the end of the longest and copies the whole key-value cache at each
token; both cost more than the model does when answers are short and of mixed lengths. This loop gives the same tokens
(a test holds it to `generate`) and asks of a model only what its `forward` says it takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from components.errors import EvaluationError

CHECK_EVERY = 4
"""Tokens between two looks at whether an answer is decided: decoding 128 rows costs about a small model's step."""
LEAVE_AT = 0.75
"""Ended rows leave when at most this share is still open: leaving copies the cache once."""

End = Literal["model", "limit", "decided"]


@dataclass
class Row:
    """One answer in the making: its tokens without the end token, and what ended it (a token, where the model did)."""

    tokens: list[int] = field(default_factory=list)
    end: End = "limit"
    end_token: int | None = None
    open: bool = True

    def close(self, end: End) -> None:
        self.open, self.end = False, end


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer: those of the generation config, as a server takes them, else the tokenizer's."""
    stated = model.generation_config.eos_token_id if model.generation_config is not None else None
    if stated is None:
        stated = tokenizer.eos_token_id
    return set() if stated is None else {stated} if isinstance(stated, int) else set(stated)


def pad_token(tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> int:
    """What fills a batch up. No row looks at it, so any token does where the tokenizer names none."""
    return int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else min(ends, default=0)


@torch.inference_mode()
def greedy(
    *,
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    pad: int,
    ends: set[int],
    max_new_tokens: int,
    decided: Callable[[list[list[int]]], list[bool]] | None = None,
    all_done: Callable[[bool], bool] | None = None,
) -> list[Row]:
    """The most likely continuation of each prompt (token ids), in the prompts' order.

    `decided` is shown unfinished answers every few tokens and says which need not go on. `all_done` is told after each token
    whether every row here has ended, and says whether to stop: a forward of a model whose weights are spread over
    processes needs them all. Raises EvaluationError for a model that keeps no key-value cache.
    """
    rows = [Row() for _ in prompts]
    batch = list(rows)  # which row stands at which place of the batch
    longest = max(len(p) for p in prompts)
    room = longest + max_new_tokens
    cache = _cache(model, room)
    ids_BP = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=model.device)
    mask_BL = torch.ones(len(prompts), room, dtype=torch.long, device=model.device)
    for place, prompt in enumerate(prompts):
        mask_BL[place, : longest - len(prompt)] = 0
    positions = (mask_BL[:, :longest].cumsum(-1) - 1).clamp(min=0)
    for step in range(1, max_new_tokens + 1):
        seen = longest + step - 1
        logits_BV = _forward(model, ids_BP, mask_BL[:, :seen], positions, cache)
        chosen = logits_BV.argmax(-1)
        for row, token in zip(batch, chosen.tolist(), strict=True):
            if row.open and token in ends:
                row.close("model")
                row.end_token = token
            elif row.open:
                row.tokens.append(token)
        if decided is not None and step % CHECK_EVERY == 0:
            _close_decided(batch, decided)
        kept = [place for place, row in enumerate(batch) if row.open]
        done = not kept if all_done is None else all_done(not kept)
        if done or step == max_new_tokens:
            break
        ids_BP, positions = chosen[:, None], positions[:, -1:] + 1
        if 0 < len(kept) <= LEAVE_AT * len(batch) and _can_leave(cache):
            places = torch.tensor(kept, device=model.device)
            cache.batch_select_indices(places)
            ids_BP, positions, mask_BL = ids_BP[places], positions[places], mask_BL[places]
            batch = [batch[place] for place in kept]
    return rows


def _forward(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache
) -> torch.Tensor:
    """Logits [B, V] of the token after the last, fp32."""
    takes = inspect.signature(model.forward).parameters
    optional: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1}
    given = {name: value for name, value in optional.items() if name in takes}
    out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **given)
    logits: torch.Tensor = out.logits[:, -1].float()
    return logits


def _close_decided(batch: Sequence[Row], decided: Callable[[list[list[int]]], list[bool]]) -> None:
    unfinished = [row for row in batch if row.open]
    if not unfinished:
        return
    for row, known in zip(unfinished, decided([row.tokens for row in unfinished]), strict=True):
        if known:
            row.close("decided")


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer in a buffer made once for the longest answer: adding a token writes it and copies
    nothing. `keys` and `values` are views [B, H, L, D] of what is filled."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start, added = self.get_seq_length(), key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shape = (*key_states.shape[:2], self._room)
            self._all_keys = key_states.new_empty(*shape, key_states.shape[-1])
            self._all_values = value_states.new_empty(*shape, value_states.shape[-1])
        self._all_keys[:, :, start : start + added] = key_states
        self._all_values[:, :, start : start + added] = value_states
        self._show(start + added)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        length = self.get_seq_length()
        self._all_keys, self._all_values = self._all_keys[indices], self._all_values[indices]
        self._show(length)

    def _show(self, length: int) -> None:
        self.keys, self.values = self._all_keys[:, :, :length], self._all_values[:, :, :length]


def _cache(model: PreTrainedModel, room: int) -> DynamicCache:
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise EvaluationError(f"{type(model).__name__} keeps no key-value cache; it cannot be evaluated in process")
    cache = DynamicCache(config=model.config)
    # Other kinds (sliding windows, recurrent states) stay as transformers makes them.
    cache.layers = [_RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _can_leave(cache: DynamicCache) -> bool:
    return all(hasattr(layer, "batch_select_indices") for layer in cache.layers)
