"""One fusion into an object store: each weights file is one worker's, read, computed and sent on in blocks; the record last.

Nothing of the model is ever on a disk here. What a run that was cut off had sent whole is kept.
"""

from __future__ import annotations

import json
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from components.checkpoints.dtypes import Bits, as_tensor
from components.checkpoints.remote_writer import Output, open_output, write_shard
from components.checkpoints.safetensors import INDEX_NAME
from components.checkpoints.source import TensorSpec
from components.checkpoints.uploads import Written
from components.checkpoints.writer import plan_shards
from components.errors import StorageError
from components.fusion.fused import FusedSource
from components.fusion.making import Fused, Making, alone, code_fingerprint, make_part
from components.fusion.recipe import Recipe
from components.storage import Progress
from components.workers import spread


def fuse_to_store(
    recipe: Recipe, url: str, *, processes: int = 1, overwrite: bool = False, progress: Progress | None = None
) -> Fused:
    """Make the model of a recipe under a URL (`s3://bucket/prefix`). Arguments and errors as `job.fuse`'s; with `overwrite`
    the model that is there goes first."""
    began = time.monotonic()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    making = Making.of(recipe)
    output = open_output(url, job=f"{making.fingerprint}-{code_fingerprint()}")
    there = _published(output, making, overwrite)
    if there is not None:
        output.tidy()
        return Fused(url, there, made=False)
    source = making.source(processes)
    specs = {name: source.spec(name) for name in source.names()}
    shards = plan_shards(specs, source.settings.max_shard_bytes)
    files = output.begin(replace=overwrite)
    unchanged = _send_weights(output, source, shards, files, processes, progress)
    record = making.record(source, unchanged)
    sizes = {file: sum(specs[name].nbytes for name in names) for file, names in shards.items()}
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        names = making.side_files(source, directory)
        written = sum(sizes.values())
        record |= {"bytes_read": _read(making, specs), "bytes_written": written}
        record |= {"gb_per_s": round((record["bytes_read"] + written) / max(time.monotonic() - began, 1e-9) / 1e9, 3)}
        names.append(making.card(record, directory))
        if len(shards) > 1:
            (directory / INDEX_NAME).write_text(_index(shards, specs), encoding="utf-8")
            names.append(INDEX_NAME)
        # Last what loaders look for first.
        for name in sorted(names, key=lambda name: (name == "config.json", name == INDEX_NAME)):
            files[name] = output.put(name, (directory / name).read_bytes())
    making.require_unchanged()
    record |= {"started": started, "seconds": round(time.monotonic() - began, 3)}
    record["outputs"] = {
        name: {"bytes": file.bytes, "sha256": file.sha256, "etag": file.etag} for name, file in sorted(files.items())
    }
    output.commit(files, json.dumps(record, indent=2, ensure_ascii=False).encode())
    return Fused(url, record, made=True)


def _send_weights(
    output: Output,
    source: FusedSource,
    shards: dict[str, list[str]],
    files: dict[str, Written],
    processes: int,
    progress: Progress | None,
) -> list[str]:
    """Add what was sent to `files`; the tensors that are the aligned model's."""

    def send(file: str) -> tuple[Written, list[str]]:
        noting = _Noting(source)
        return write_shard(output, file, noting, shards[file]), noting.unchanged()

    sizes = {file: sum(source.spec(name).nbytes for name in names) for file, names in shards.items()}
    missing = [file for file in shards if file not in files]
    with alone(source):
        found = [
            name for file in shards if file in files for name in shards[file]
            if source.unchanged(name, 0, source.spec(name).numel)
        ]  # fmt: skip
    began, sent, total = time.monotonic(), 0, sum(sizes[file] for file in missing)
    for file, (written, same) in spread(send, missing, processes=processes):
        files[file] = written
        found += same
        sent += sizes[file]
        if progress is not None:
            speed = sent / max(time.monotonic() - began, 1e-9)
            progress({
                "tensor": file, "bytes": sent, "total_bytes": total, "gb_per_s": speed / 1e9,
                "seconds_left": (total - sent) / max(speed, 1.0),
            })  # fmt: skip
    return found


class _Noting:
    """A fused model as it is read, keeping which tensors came out as the aligned model's."""

    def __init__(self, source: FusedSource) -> None:
        self._source = source
        self._changed: set[str] = set()
        self._seen: set[str] = set()

    def names(self) -> list[str]:
        return self._source.names()

    def aliases(self) -> Any:
        return self._source.aliases()

    def spec(self, name: str) -> TensorSpec:
        return self._source.spec(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        spec = self.spec(name)
        return as_tensor(self.bits(name, start, spec.numel if stop is None else stop), spec.kind)

    def bits(self, name: str, start: int, stop: int) -> Bits:
        out = np.empty(stop - start, self.spec(name).kind.bits)

        def put(at: int, bits: Bits) -> None:
            out[at - start : at - start + bits.size] = bits

        same = make_part(self._source, name, start, stop, put)
        self._seen.add(name)
        if not same:
            self._changed.add(name)
        return out

    def unchanged(self) -> list[str]:
        return sorted(self._seen - self._changed)


def _published(output: Output, making: Making, overwrite: bool) -> dict[str, Any] | None:
    raw = output.record()
    if raw is None:
        return None
    try:
        record: dict[str, Any] = json.loads(raw)
        if record["fingerprint"] == making.fingerprint:
            return record
    except (ValueError, KeyError, TypeError):
        pass
    if overwrite:
        return None
    raise StorageError(f"{output.url} holds something else; give another prefix, or replace it with --overwrite")


def _read(making: Making, specs: dict[str, TensorSpec]) -> int:
    return sum(spec.numel * making.bytes_read(name) for name, spec in specs.items())


def _index(shards: dict[str, list[str]], specs: dict[str, TensorSpec]) -> str:
    weight_map = {name: file for file, names in shards.items() for name in names}
    total = sum(spec.nbytes for spec in specs.values())
    return (
        json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"
    )
