"""Write safetensors shards whose every shape is known before the first byte: headers first, then slices to their
offsets.

Memory is one slice whatever the model's size; slices may come in any order and from several threads. The directory
given is an attempt's own: publishing it (by rename) is the caller's. `finish` refuses unless every element was written
once.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from components.checkpoints.dtypes import Bits, DType, as_bits
from components.checkpoints.headers import Header, layout
from components.checkpoints.safetensors import INDEX_NAME, SINGLE_NAME, read_json
from components.checkpoints.source import TensorSpec
from components.errors import StorageError, listed
from components.storage import sync

DEFAULT_SHARD_BYTES = 5_000_000_000
METADATA = {"format": "pt"}  # transformers refuses files without it
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATE_DIRECTORY = "additional_chat_templates"


def plan_shards(specs: Mapping[str, TensorSpec], max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> dict[str, list[str]]:
    """file name -> its tensors: names in order, a new file when the next tensor would pass the limit. A tensor larger
    than the limit has a file of its own. A function of specs and limit only, so that every process plans the same."""
    groups: list[list[str]] = []
    used = 0
    for name in sorted(specs):
        size = specs[name].nbytes
        if not groups or used + size > max_shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    if len(groups) == 1:
        return {SINGLE_NAME: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": g for i, g in enumerate(groups, start=1)}


def shard_index(plan: Mapping[str, list[str]], specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """What the index of a plan's files says."""
    weight_map = {name: file_name for file_name, names in plan.items() for name in names}
    total = sum(specs[name].nbytes for name in weight_map)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


@dataclass
class _Shard:
    path: Path
    header: Header
    fd: int


class CheckpointWriter:
    """Streams tensors into a model directory's safetensors files.

    Args:
        out_dir: an existing or new directory without weights.
        specs: every tensor that will be written, with dtype and shape.
        max_shard_bytes: files hold at most this much (a larger tensor has a file of its own).
        single_file: the name of the one file that takes everything, instead of shards.
        resume: go on with the files that a writer of the same specs left; say with `mark` what of them is written.
        join: only `put` into the files of a writer that is at work in another process, perhaps on another machine.

    Forked processes may `put` into the files that their parent's writer opened, and the parent `mark` it.

    Raises StorageError when the disk refuses or is too small.
    """

    def __init__(
        self,
        out_dir: Path,
        specs: Mapping[str, TensorSpec],
        *,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        single_file: str | None = None,
        resume: bool = False,
        join: bool = False,
    ) -> None:
        assert specs, "a checkpoint without tensors"
        self.out_dir = out_dir
        self.bytes_written = 0
        self._plan = {single_file: sorted(specs)} if single_file else plan_shards(specs, max_shard_bytes)
        self._specs = dict(specs)
        self._written = {name: _Ranges() for name in specs}
        self._lock = threading.Lock()
        self._shards: list[_Shard] = []
        self._of: dict[str, _Shard] = {}
        try:
            self._create(resume or join, join)
        except OSError as error:
            self.close()
            raise StorageError(f"{out_dir}: cannot be written ({error.strerror or error})") from error

    @property
    def nbytes(self) -> int:
        """Size of all tensors together."""
        return sum(spec.nbytes for spec in self._specs.values())

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Put a 1-D slice that begins at flattened element `start`. Its dtype must be the tensor's."""
        assert values.dim() == 1, values.shape
        assert values.dtype == self._specs[name].dtype, (name, values.dtype, self._specs[name].kind)
        self.put(name, start, as_bits(values.contiguous()))
        self.mark(name, start, start + values.numel())

    def put(self, name: str, start: int, bits: Bits) -> None:
        """The same, in a process whose parent has this writer and marks what was put."""
        spec = self._specs[name]
        assert bits.dtype == spec.kind.bits, (name, bits.dtype, spec.kind)
        assert 0 <= start <= start + bits.size <= spec.numel, (name, start, bits.size, spec.numel)
        shard = self._of[name]
        offset = shard.header.tensors[name].offset + start * spec.kind.itemsize
        self._pwrite(shard, memoryview(bits.view(np.uint8).data), offset)

    def mark(self, name: str, start: int, stop: int) -> None:
        """Take elements [start, stop) as written."""
        with self._lock:
            self._written[name].add(start, stop, name)
            self.bytes_written += (stop - start) * self._specs[name].kind.itemsize

    def write_whole(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor of its full shape."""
        assert tuple(tensor.shape) == self._specs[name].shape, (name, tensor.shape)
        self.write(name, 0, tensor.detach().reshape(-1))

    def finish(self, *, durable: bool = True) -> list[Path]:
        """Check that nothing is missing, make it durable, write the index. Returns the weight files (index first)."""
        holes = [
            f"{n} ({self._written[n].total} of {s.numel} elements)"
            for n, s in sorted(self._specs.items())
            if self._written[n].total != s.numel
        ]
        assert not holes, f"{self.out_dir}: unwritten tensors: {listed(holes)}"
        paths = [shard.path for shard in self._shards]
        try:
            if durable:
                self.sync()
            if len(self._shards) > 1:
                paths.insert(0, self._write_index())
            sync(self.out_dir)
        except OSError as error:
            raise StorageError(f"{self.out_dir}: cannot be written ({error.strerror or error})") from error
        finally:
            self.close()
        return paths

    def sync(self) -> None:
        """Wait until what was put would survive a power cut. Raises StorageError when the disk refuses."""
        for shard in self._shards:
            try:
                os.fsync(shard.fd)
            except OSError as error:
                raise StorageError(f"{shard.path}: cannot be written ({error.strerror or error})") from error

    def close(self) -> None:
        """Close the files without any check (after an error; `finish` calls it too)."""
        for shard in self._shards:
            if shard.fd >= 0:
                os.close(shard.fd)
                shard.fd = -1

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _create(self, resume: bool, join: bool) -> None:
        if not join:
            self._require_room(resume)
        for file_name, names in self._plan.items():
            raw, header = layout({n: self._specs[n] for n in names}, METADATA)
            path = self.out_dir / file_name
            fd = os.open(path, os.O_WRONLY | (0 if resume else os.O_CREAT | os.O_EXCL), 0o644)
            shard = _Shard(path=path, header=header, fd=fd)
            self._shards.append(shard)
            self._of.update(dict.fromkeys(names, shard))
            if not join:
                os.ftruncate(fd, header.end)
                self._pwrite(shard, memoryview(raw), 0)

    def _require_room(self, resume: bool) -> None:
        self.out_dir.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.out_dir).free
        there = sum(_taken(self.out_dir / file_name) for file_name in self._plan) if resume else 0
        if free + there < self.nbytes:
            raise StorageError(
                f"{self.out_dir}: the disk has {free / 1e9:.3g} GB left, the model needs {(self.nbytes - there) / 1e9:.3g} GB"
            )

    def _pwrite(self, shard: _Shard, view: memoryview, offset: int) -> None:
        done = 0
        try:
            while done < view.nbytes:  # one call writes at most 2 GiB
                done += os.pwrite(shard.fd, view[done:], offset + done)
        except OSError as error:
            raise StorageError(f"{shard.path}: cannot be written ({error.strerror or error})") from error

    def _write_index(self) -> Path:
        path = self.out_dir / INDEX_NAME
        write_json(path, shard_index(self._plan, self._specs))
        return path


def _taken(path: Path) -> int:
    """Bytes of the disk that a file has."""
    return path.stat().st_blocks * 512 if path.is_file() else 0


class _Ranges:
    """Written [start, stop) ranges of one tensor, merged; a range written twice is our bug."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        self.total = 0

    def add(self, start: int, stop: int, name: str) -> None:
        if start == stop:
            return
        i = bisect_left(self._ranges, (start, start))
        before = self._ranges[i - 1] if i > 0 else None
        after = self._ranges[i] if i < len(self._ranges) else None
        assert before is None or before[1] <= start, f"{name} written twice"
        assert after is None or stop <= after[0], f"{name} written twice"
        low, high = i, i
        if before is not None and before[1] == start:
            low, start = i - 1, before[0]
        if after is not None and after[0] == stop:
            high, stop = i + 1, after[1]
        self.total += (stop - start) - sum(b - a for a, b in self._ranges[low:high])
        self._ranges[low:high] = [(start, stop)]


def copy_side_files(
    *, model_dir: Path, tokenizer_dir: Path, out_dir: Path, dtype: DType, fallback_dir: Path | None = None
) -> list[str]:
    """Give a directory of weights all that `from_pretrained` wants: config.json (dtype set to the weights'), generation
    config, tokenizer and chat template; the code of a class of its own.

    config and generation config come from `model_dir`, the tokenizer's files all from `tokenizer_dir`; what those lack
    is taken from `fallback_dir` (the aligned model). Files of two tokenizers are never mixed. Returns the names
    written.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    config = read_json(model_dir / "config.json")
    config.pop("_name_or_path", None)  # a path of another machine
    dtype_key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config.pop("dtype", None)
    config[dtype_key] = dtype.name
    write_json(out_dir / "config.json", config)
    written = ["config.json"]
    if "auto_map" in config:  # the model's class comes with it; whoever loads it decides whether to trust that
        for path in sorted(model_dir.glob("*.py")):
            _copy(path, out_dir)
            written.append(path.name)
    for source in (model_dir, fallback_dir):
        if source is not None and (source / "generation_config.json").is_file():
            _copy(source / "generation_config.json", out_dir)
            written.append("generation_config.json")
            break
    for source in (tokenizer_dir, model_dir, fallback_dir):
        if source is not None and has_tokenizer(source):
            written += copy_tokenizer(source, out_dir)
            break
    return written


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory has a tokenizer of its own (a chat template alone is none)."""
    return any((directory / f).is_file() for f in TOKENIZER_FILES if not f.startswith("chat_template"))


def has_template(directory: Path) -> bool:
    """Whether a directory has a chat template, as a file or in its tokenizer's config."""
    if any((directory / f).is_file() for f in TOKENIZER_FILES if f.startswith("chat_template")):
        return True
    config = directory / "tokenizer_config.json"
    return config.is_file() and bool(read_json(config).get("chat_template"))


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of a directory that make its tokenizer and chat templates, in a fixed order."""
    found = [directory / f for f in TOKENIZER_FILES if (directory / f).is_file()]
    return found + sorted((directory / TEMPLATE_DIRECTORY).glob("*.jinja"))


def write_json(path: Path, value: Any) -> None:
    """Indented UTF-8 JSON with a final newline, made durable."""
    path.write_bytes(json_bytes(value))
    sync(path)


def json_bytes(value: Any) -> bytes:
    """Indented UTF-8 JSON with a final newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def copy_tokenizer(source: Path, out_dir: Path) -> list[str]:
    """A directory's tokenizer and chat templates. Returns the names written."""
    names = []
    for path in tokenizer_files(source):
        relative = path.relative_to(source)
        (out_dir / relative).parent.mkdir(exist_ok=True)
        _copy(path, (out_dir / relative).parent)
        names.append(relative.as_posix())
    return names


def _copy(path: Path, directory: Path) -> None:
    target = directory / path.name
    target.write_bytes(path.read_bytes())
    sync(target)
