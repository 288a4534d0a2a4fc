"""A PEFT LoRA or DoRA adapter over its base as a TensorSource: every tensor is merged as it is read, nothing is written.

LoRA: https://arxiv.org/abs/2106.09685, rsLoRA: https://arxiv.org/abs/2312.03732, DoRA: https://arxiv.org/abs/2402.09353. The
result is what PEFT's `merge_and_unload` gives on the base loaded in fp32, all in fp32, so an adapted tensor's dtype here is
fp32 whatever the base's (rounding the sum to bf16 would lose part of the delta):

    LoRA  W' = V,  V = W + (B A) * scaling
    DoRA  W' = V * m / ‖V‖,  one magnitude m and one norm for each output, over its inputs

Products are taken over fixed row tiles (below), which makes a value independent of the range it was read with; against
PEFT's one product over the whole matrix it may differ in the last bits of the fp32 sum over the rank. DoRA's norms are summed
in fp64, where PEFT does it in fp32. In a weight that is stored as (in, out) an output is a column: its norms take a pass of
their own over the tensor, once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from components.checkpoints.adapter_parsing import (
    ADAPTER_CONFIG,
    LoraPair,
    Parsed,
    fit,
    open_weights,
    read_adapter_config,
)
from components.checkpoints.dtypes import F32
from components.checkpoints.safetensors import MappedFile
from components.checkpoints.source import InFiles, TensorSource, TensorSpec
from components.errors import CheckpointError, listed
from components.mapped import drop

_TILE_ELEMENTS = 1 << 20


class LoraSource:
    """TensorSource over an adapter directory and the source of its base.

    Args:
        adapter_dir: holds adapter_config.json and adapter_model.safetensors.
        base: the weights that the adapter was trained on.
        model_type: the base config's model_type; tells how square GPT-2 weights are stored.
        resized_vocabulary: allow saved embeddings and heads with more or fewer rows than the base's.

    Raises CheckpointError listing every reason why the adapter cannot be merged or does not fit.
    """

    def __init__(
        self,
        adapter_dir: Path,
        base: TensorSource,
        *,
        model_type: str | None = None,
        resized_vocabulary: bool = False,
    ) -> None:
        self.adapter_dir = adapter_dir
        self.base = base
        self.config = read_adapter_config(adapter_dir)
        header = open_weights(adapter_dir)
        self.weights = MappedFile(header)
        """The adapter's file."""
        self.files = [adapter_dir / ADAPTER_CONFIG, header.path]
        parsed = Parsed.of(header)
        self._pairs, self._replaced, problems = fit(
            parsed, header, self.config, base, model_type=model_type, resized_vocabulary=resized_vocabulary
        )
        problems = parsed.problems + problems
        if problems:
            raise CheckpointError(f"{adapter_dir}: {listed(problems)}")
        self._saved = parsed.replaced
        self._tile: tuple[str, int, torch.Tensor] | None = None
        self._norms: dict[str, torch.Tensor] = {}

    def names(self) -> list[str]:
        """The base's tensors."""
        return self.base.names()

    def aliases(self) -> Mapping[str, str]:
        """The base's aliases."""
        return self.base.aliases()

    def adapted(self) -> list[str]:
        """Names of the tensors that the adapter changes."""
        return sorted({*self._pairs, *self._replaced})

    def pairs(self) -> Mapping[str, LoraPair]:
        """Tensor -> its factors."""
        return self._pairs

    def saved(self) -> Mapping[str, str]:
        """Key in the adapter's file -> the tensor whose place it takes. Both ends of a tie may be there."""
        return {key: self.aliases().get(name, name) for name, key in self._saved.items()}

    def spec(self, name: str) -> TensorSpec:
        """The base's spec; fp32 where a LoRA product is added, the saved dtype (and rows) where the adapter replaces the
        tensor."""
        name = self.aliases().get(name, name)
        spec = self.base.spec(name)
        if name in self._pairs:
            return TensorSpec(F32, spec.shape)
        if name in self._replaced:
            return self.weights.header.tensors[self._replaced[name]].spec
        return spec

    def file_of(self, name: str) -> Path:
        """The adapter's file for what it carries whole, else the base's."""
        name = self.aliases().get(name, name)
        if name not in self._replaced and isinstance(self.base, InFiles):
            return self.base.file_of(name)
        return self.weights.header.path

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the merged tensor, flattened. Computes the row tiles that the range touches."""
        name = self.aliases().get(name, name)
        stop = self.spec(name).numel if stop is None else stop
        if name not in self._pairs:
            return self._unadapted(name, start, stop)
        merged = torch.empty(stop - start, dtype=torch.float32)
        plain = self._pairs[name].magnitude is None
        if plain:
            weight = self._unadapted(name, start, stop)
            merged.copy_(weight)
            drop(weight)
        cols = self.spec(name).shape[1]
        per_tile = _tile_rows(cols) * cols
        position = start
        while position < stop:
            tile = position // per_tile
            end = min(stop, (tile + 1) * per_tile)
            values = self._tile_values(name, tile)[position - tile * per_tile : end - tile * per_tile]
            part = merged[position - start : end - start]
            torch.add(part, values, out=part) if plain else part.copy_(values)
            position = end
        return merged

    def _unadapted(self, name: str, start: int, stop: int) -> torch.Tensor:
        """What the factors are added to."""
        if name in self._replaced:
            return self.weights.read(self._replaced[name], start, stop)
        return self.base.read(name, start, stop)

    def _tile_values(self, name: str, tile: int) -> torch.Tensor:
        """Flattened rows of one tile: LoRA's product, or DoRA's merged weight. The last ones are kept, since blocks are read
        in order."""
        cached = self._tile
        if cached is not None and cached[:2] == (name, tile):
            return cached[2]
        plain = self._pairs[name].magnitude is None
        values = (self._product(name, tile) if plain else self._rescaled(name, tile)).reshape(-1)
        self._tile = (name, tile, values)
        return values

    def _rows(self, name: str, tile: int) -> tuple[int, int]:
        """[low, high) of one tile."""
        rows, cols = self.spec(name).shape
        low = tile * _tile_rows(cols)
        return low, min(rows, low + _tile_rows(cols))

    def _product(self, name: str, tile: int) -> torch.Tensor:
        """Rows of (B A) * scaling of one tile."""
        pair = self._pairs[name]
        low, high = self._rows(name, tile)
        a, b = self._factor(pair.a), self._factor(pair.b)
        product = (b @ a[:, low:high]).T if pair.transposed else b[low:high] @ a
        return product * pair.scaling

    def _directed(self, name: str, tile: int) -> torch.Tensor:
        """Rows of W + (B A) * scaling of one tile."""
        low, high = self._rows(name, tile)
        cols = self.spec(name).shape[1]
        weight = self._unadapted(name, low * cols, high * cols)
        directed = weight.reshape(-1, cols).float() + self._product(name, tile)
        drop(weight)
        return directed

    def _rescaled(self, name: str, tile: int) -> torch.Tensor:
        """The same with DoRA's magnitudes."""
        pair = self._pairs[name]
        assert pair.magnitude is not None
        directed, magnitude = self._directed(name, tile), self._factor(pair.magnitude)
        if pair.transposed:
            return directed * (magnitude / self._column_norms(name))
        low, high = self._rows(name, tile)
        norms = directed.double().square().sum(dim=1).sqrt().float()
        return directed * (magnitude[low:high] / norms)[:, None]

    def _column_norms(self, name: str) -> torch.Tensor:
        """Norms of whole columns, kept: every tile needs them."""
        if name not in self._norms:
            rows, cols = self.spec(name).shape
            squares = torch.zeros(cols, dtype=torch.float64)
            for tile in range(-(-rows // _tile_rows(cols))):
                squares += self._directed(name, tile).double().square().sum(dim=0)
            self._norms[name] = squares.sqrt().float()
        return self._norms[name]

    def _factor(self, key: str) -> torch.Tensor:
        spec = self.weights.header.tensors[key].spec
        return self.weights.read(key, 0, spec.numel).reshape(spec.shape).float()


def _tile_rows(cols: int) -> int:
    return max(1, _TILE_ELEMENTS // cols)
