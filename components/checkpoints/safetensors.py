"""A checkpoint directory as a TensorSource: one safetensors file, or shards with an index.

Opening reads headers only; a read maps the file and touches the pages of the range that is asked for. Weights that lie in an
object store are read there by range.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from components.checkpoints.dtypes import Bits, as_tensor
from components.checkpoints.headers import Header, Placed, read_header
from components.checkpoints.places import Located
from components.checkpoints.quantised import quantised_config, quantised_tensors
from components.checkpoints.source import TensorSource, TensorSpec, bits_of, blocks
from components.checkpoints.windows import WindowedFile, Windows
from components.errors import CheckpointError, listed
from components.mapped import FileMap, array_over, map_file

if TYPE_CHECKING:
    import torch

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
"""How names of input embeddings end."""
HEADS = ("lm_head.weight", "embed_out.weight")
"""And those of output heads."""
_COMPUTED = ("rotary_emb.inv_freq", "attn.masked_bias")
"""Buffers that older transformers stored with the weights and newer ones compute themselves: no parameter takes them."""
_COMPARE_BLOCK = 1 << 20


class MappedFile:
    """One safetensors file whose tensors are read through a private map (never writable to the file)."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self._map: FileMap | None = None

    def bits(self, name: str, start: int, stop: int) -> Bits:
        """Elements [start, stop) of a tensor, aliasing the map."""
        placed = self.header.tensors[name]
        dtype = placed.spec.kind.bits
        if start == stop:
            return np.empty(0, dtype)
        if self._map is None:
            with self.header.path.open("rb") as file:
                # Private: torch takes it as writable (no warning), and the file cannot be changed through it.
                self._map = map_file(file, private=True)
        offset = placed.offset + start * dtype.itemsize
        if offset % dtype.itemsize:  # foreign writers may leave tensors unaligned
            raw = bytearray(self._map[offset : offset + (stop - start) * dtype.itemsize])
            return np.frombuffer(raw, dtype)
        return array_over(self._map, dtype, stop - start, offset)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """The same as a tensor, 1-D."""
        return as_tensor(self.bits(name, start, stop), self.header.tensors[name].spec.kind)


class SafetensorsSource:
    """TensorSource over a Hugging Face model directory with safetensors weights.

    Args:
        model: the directory, or where its files lie if not all of them lie there.
        windows: how much of files in an object store is in memory.

    Raises CheckpointError listing everything that is wrong: config.json missing or quantised, pickle weights, missing
    or truncated shards, tensors that the index names and no shard has, tensors that the index does not name.
    """

    def __init__(self, model: Path | Located, *, windows: Windows | None = None) -> None:
        model = Located(model, str(model)) if isinstance(model, Path) else model
        self.directory = model.path
        self.where = model.where
        self.config = read_config(model.path)
        self.files, headers = _open_weights(model)
        _refuse_quantised(model.path, quantised_tensors(name for header in headers for name in header.tensors))
        windows = windows or Windows()
        files = [_reader(header, model, windows) for header in headers]
        self._files = {name: file for file in files for name in file.header.tensors}
        self._placed: dict[str, Placed] = {name: header.tensors[name] for header in headers for name in header.tensors}
        self.computed = sorted(n for n in self._placed if any(n.endswith(f".{end}") for end in _COMPUTED))
        """Stored buffers that are left out: the model computes them."""
        for name in self.computed:
            del self._placed[name], self._files[name]
        self._aliases: dict[str, str] = {}
        self._aliases = self._tie()

    def names(self) -> list[str]:
        """Every distinct tensor, sorted, without aliases."""
        return sorted(self._placed)

    def aliases(self) -> Mapping[str, str]:
        """alias -> listed name, where the config ties the output head to the input embedding."""
        return dict(self._aliases)

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape, from the header."""
        return self._placed[self._listed_name(name)].spec

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor; aliases a private read-only map."""
        spec = self.spec(name)
        return as_tensor(self.bits(name, start, spec.numel if stop is None else stop), spec.kind)

    def bits(self, name: str, start: int, stop: int) -> Bits:
        """The same as plain memory."""
        name = self._listed_name(name)
        numel = self._placed[name].spec.numel
        assert 0 <= start <= stop <= numel, (name, start, stop, numel)
        return self._files[name].bits(name, start, stop)

    def file_of(self, name: str) -> Path:
        """The shard that holds a tensor."""
        return self._files[self._listed_name(name)].header.path

    def _listed_name(self, name: str) -> str:
        name = self._aliases.get(name, name)
        if name not in self._placed:
            raise CheckpointError(f"{self.where}: no tensor {name}")
        return name

    def _tie(self) -> dict[str, str]:
        """Find the tied pair; drop a redundant stored head. The model cannot do without a head, so a lone embedding is
        tied whatever the config leaves unsaid."""
        embedding = _only(self._placed, EMBEDDINGS)
        head = _only(self._placed, HEADS)
        tied = _config_ties(self.config)
        if embedding and not head:
            is_causal = any("ForCausalLM" in a or "LMHead" in a for a in self.config.get("architectures") or [])
            return {_head_name(self.config): embedding} if tied or (tied is None and is_causal) else {}
        if not (embedding and head):
            return {}
        if tied is None:
            tied = _class_default_ties(self.config)
        if not tied:
            return {}
        if self._placed[embedding].spec != self._placed[head].spec or not same_values(self, embedding, head):
            raise CheckpointError(
                f"{self.directory}: config.json ties {head} to {embedding} but the two hold different weights; "
                "set tie_word_embeddings to false if the head is separate"
            )
        del self._placed[head]
        del self._files[head]
        return {head: embedding}


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory. Raises CheckpointError when missing, unreadable or quantised."""
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory}: no config.json; give the directory that save_pretrained wrote")
    config = read_json(path)
    _refuse_quantised(directory, quantised_config(directory, config))
    return config


def _refuse_quantised(directory: Path, found: str | None) -> None:
    if found:
        raise CheckpointError(
            f"{directory}: weights are quantised ({found}); codes have no difference that could be masked or merged: give "
            "the bf16, fp16 or fp32 model that it was made from"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a CheckpointError that names the file."""
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); copy it again") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: a JSON object was expected")
    return parsed


def same_values(source: TensorSource, first: str, second: str) -> bool:
    """Whether two tensors of one source hold the same bits (both specs equal)."""
    for start, stop in blocks(source.spec(first).numel, _COMPARE_BLOCK):
        one, other = (bits_of(source, name, start, stop) for name in (first, second))
        if not np.array_equal(one, other):
            return False
    return True


def _reader(header: Header, model: Located, windows: Windows) -> MappedFile | WindowedFile:
    file = model.files.get(header.path.name)
    return MappedFile(header) if file is None else WindowedFile(header, file, windows)


def _open_weights(model: Located) -> tuple[list[Path], list[Header]]:
    index, single = model.path / INDEX_NAME, model.path / SINGLE_NAME
    if model.has(INDEX_NAME) and model.has(SINGLE_NAME):
        raise CheckpointError(f"{model.path}: has both {SINGLE_NAME} and {INDEX_NAME}; remove the one that is stale")
    if model.has(SINGLE_NAME):
        return [single], [read_header(single, model.files.get(SINGLE_NAME))]
    if not index.is_file():
        raise CheckpointError(_no_weights(model))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map")
    return _open_shards(model, weight_map)


def _open_shards(model: Located, weight_map: Mapping[str, str]) -> tuple[list[Path], list[Header]]:
    directory = model.path
    problems: list[str] = []
    present: list[str] = []
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            problems.append(f"{INDEX_NAME} names {shard}, which is not a file of this directory")
        elif not model.has(shard):
            count = sum(1 for s in weight_map.values() if s == shard)
            problems.append(f"missing shard {shard} ({count} tensors): copy it again")
        else:
            present.append(shard)
    headers, unreadable = _read_headers(model, present)
    problems += unreadable
    seen: dict[str, str] = {}
    for header in headers:
        shard = header.path.name
        absent = sorted(n for n, s in weight_map.items() if s == shard and n not in header.tensors)
        if absent:
            problems.append(
                f"{INDEX_NAME} names tensors that {shard} does not have: {listed(absent)}; save or copy both again"
            )
        for name in sorted(header.tensors):
            if name in seen:
                problems.append(f"tensor {name} is in both {seen[name]} and {shard}")
            elif weight_map.get(name) != shard:
                problems.append(f"tensor {name} of {shard} is not in {INDEX_NAME}")
            seen[name] = shard
    if problems:
        raise CheckpointError(f"{directory}: {listed(problems)}")
    return [directory / INDEX_NAME, *(header.path for header in headers)], headers


def _read_headers(model: Located, shards: list[str]) -> tuple[list[Header], list[str]]:
    """Headers in order, and what is wrong with the others. Files elsewhere are asked side by side."""

    def one(shard: str) -> Header | str:
        try:
            return read_header(model.path / shard, model.files.get(shard))
        except CheckpointError as error:
            return str(error).removeprefix(f"{model.path}/")

    if model.files:
        with ThreadPoolExecutor(max_workers=8) as pool:
            found = list(pool.map(one, shards))
    else:
        found = [one(shard) for shard in shards]
    return [f for f in found if isinstance(f, Header)], [f for f in found if isinstance(f, str)]


def _no_weights(model: Located) -> str:
    directory = model.path
    pickles = model.names(".bin", ".pt", ".pth", ".ckpt")
    if pickles:
        return (
            f"{directory}: only pickle weights ({listed(pickles, 2)}), which can run code when loaded; "
            "convert it to safetensors: load it where you trust it and save_pretrained it again"
        )
    return f"{directory}: no weights ({SINGLE_NAME} or {INDEX_NAME}); give the directory that save_pretrained wrote"


def _only(names: Iterable[str], suffixes: tuple[str, ...]) -> str | None:
    found = [n for n in names if any(n == s or n.endswith("." + s) for s in suffixes)]
    return found[0] if len(found) == 1 else None


def _config_ties(config: Mapping[str, Any]) -> bool | None:
    nested = config.get("text_config")
    for part in (config, nested if isinstance(nested, dict) else {}):
        if "tie_word_embeddings" in part:
            return bool(part["tie_word_embeddings"])
    return None


def _class_default_ties(config: Mapping[str, Any]) -> bool:
    """What transformers assumes where config.json is silent (old configs leave defaults out)."""
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        return False
    return bool(getattr(CONFIG_MAPPING[model_type](), "tie_word_embeddings", False))


def _head_name(config: Mapping[str, Any]) -> str:
    return "embed_out.weight" if config.get("model_type") == "gpt_neox" else "lm_head.weight"
