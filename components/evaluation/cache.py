"""The key-value cache of a batch whose rows come and go.

All rows of a batch stand right-aligned at one column, the last that is filled: a row that joins is written into the columns
before it. So a token is one column for everybody, whatever the model, and each row's columns lie side by side, as sliding
windows and relative positions want them.

Shapes: B rows, H key-value heads, R columns there is room for, L columns filled, D head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from components.errors import EvaluationError


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer in a buffer [B, H, R, D] made once: adding a token writes it and copies nothing. `keys` and
    `values` are views [B, H, L, D] of what is filled."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add columns."""
        start, added = self.get_seq_length(), key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shape = (*key_states.shape[:2], self._room)
            # Zeros: what is not filled is masked, and a masked NaN would still be one.
            self._all_keys = key_states.new_zeros(*shape, key_states.shape[-1])
            self._all_values = value_states.new_zeros(*shape, value_states.shape[-1])
        self._all_keys[:, :, start : start + added] = key_states
        self._all_values[:, :, start : start + added] = value_states
        self._show(start + added)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows."""
        length = self.get_seq_length()
        self._all_keys, self._all_values = self._all_keys[indices], self._all_values[indices]
        self._show(length)

    def clear(self, places: Sequence[int]) -> None:
        """Forget what these rows hold: it may be NaN, and a masked NaN would still be one."""
        if places:
            self._all_keys[places] = self._all_values[places] = 0.0

    def take_in(self, other: RoomyLayer, places: Sequence[int]) -> None:
        """Put another layer's rows in place of these, their last column at the last here."""
        end, width = self.get_seq_length(), other.get_seq_length()
        self._all_keys[places, :, end - width : end] = other.keys
        self._all_values[places, :, end - width : end] = other.values

    def move_left(self, columns: int) -> None:
        """Forget the first columns."""
        length = self.get_seq_length()
        for whole in (self._all_keys, self._all_values):
            whole[:, :, : length - columns] = whole[:, :, columns:length].clone()
        self._show(length - columns)

    def _show(self, length: int) -> None:
        self.keys, self.values = self._all_keys[:, :, :length], self._all_values[:, :, :length]


def make_cache(model: PreTrainedModel, room: int) -> DynamicCache:
    """A cache of `room` columns. Raises EvaluationError for a model that keeps none."""
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise EvaluationError(f"{type(model).__name__} keeps no key-value cache; it cannot be evaluated in process")
    cache = DynamicCache(config=model.config)
    # Other kinds (sliding windows, recurrent states) stay as transformers makes them.
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def can_leave(cache: DynamicCache) -> bool:
    """Whether rows can be taken out."""
    return all(hasattr(layer, "batch_select_indices") for layer in cache.layers)


def can_join(cache: DynamicCache) -> bool:
    """Whether rows can be put in: where every layer keeps every column."""
    return all(type(layer) is RoomyLayer for layer in cache.layers)
