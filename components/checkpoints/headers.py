"""The header of a safetensors file: what is in it and where, before a byte of a tensor is read.

Format (https://huggingface.co/docs/safetensors): eight bytes of header length (little endian), that many bytes of JSON
`{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}`, then the tensors without holes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.checkpoints.dtypes import DTYPES
from components.checkpoints.places import RemoteFile
from components.checkpoints.source import TensorSpec
from components.errors import CheckpointError

_GUESS = 1 << 17
"""Bytes that are asked for first of a file elsewhere."""
_MAX_HEADER = 100_000_000  # the format's own limit; a larger number means that the file is something else


@dataclass(frozen=True)
class Placed:
    """One tensor of a file: its spec and the absolute byte offset of its first element."""

    spec: TensorSpec
    offset: int


@dataclass(frozen=True)
class Header:
    """What one file holds. `end` is the size that the file must have."""

    path: Path
    tensors: Mapping[str, Placed]
    end: int
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_header(path: Path, file: RemoteFile | None = None) -> Header:
    """Parse and check one file's header against its size: of the file at `path`, or of `file`, which `path` then only names.
    Raises CheckpointError naming the file and what is wrong."""
    try:
        raw, size = _raw_header(path, file)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        parsed = json.loads(raw)
    except ValueError as error:
        raise CheckpointError(f"{path}: header is garbage ({error}); this is not a safetensors file") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: header is garbage (not a JSON object); this is not a safetensors file")
    metadata = parsed.pop("__metadata__", None) or {}
    data_start = 8 + len(raw)
    tensors = {name: _placed(path, name, entry, data_start) for name, entry in parsed.items()}
    end = max((t.offset + t.spec.nbytes for t in tensors.values()), default=data_start)
    if end > size:
        cut = sorted(name for name, t in tensors.items() if t.offset + t.spec.nbytes > size)
        raise CheckpointError(
            f"{path}: truncated: the header needs {end} bytes, the file has {size} "
            f"({len(cut)} tensors cut off, first {cut[0]}); fetch it again"
        )
    if end < size:
        raise CheckpointError(f"{path}: {size - end} bytes beyond what the header describes; fetch it again")
    _check_no_overlap(path, tensors)
    return Header(path=path, tensors=tensors, end=end, metadata=metadata)


def _raw_header(path: Path, remote: RemoteFile | None) -> tuple[bytes, int]:
    """The header's JSON and the file's size."""
    if remote is not None:
        # One request where the header is small, as most are.
        start = remote.read(0, min(_GUESS, remote.size))
        length = _header_length(path, start[:8], remote.size)
        return (start[8 : 8 + length] + remote.read(min(len(start), 8 + length), 8 + length)), remote.size
    size = path.stat().st_size
    with path.open("rb") as file:
        length = _header_length(path, file.read(8), size)
        return file.read(length), size


def _header_length(path: Path, prefix: bytes, size: int) -> int:
    if len(prefix) < 8:
        raise CheckpointError(f"{path}: not a safetensors file ({size} bytes); fetch it again")
    length = int(struct.unpack("<Q", prefix)[0])
    if length > _MAX_HEADER:
        raise CheckpointError(f"{path}: header is garbage (length {length}); this is not a safetensors file")
    if 8 + length > size:
        raise CheckpointError(f"{path}: truncated inside its header ({size} bytes); fetch it again")
    return length


def _placed(path: Path, name: str, entry: Any, data_start: int) -> Placed:
    try:
        code, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
        begin, end = (int(n) for n in entry["data_offsets"])
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: header entry of tensor {name} is garbage ({error!r})") from error
    if code not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name} has dtype {code}; quantised and 8-bit weights cannot be fused: "
            "give the bf16, fp16 or fp32 model"
        )
    spec = TensorSpec(DTYPES[code], shape)
    if begin < 0 or min(shape, default=0) < 0 or end - begin != spec.nbytes:
        raise CheckpointError(f"{path}: tensor {name} {list(shape)} {code} does not fit its {end - begin} bytes")
    return Placed(spec=spec, offset=data_start + begin)


def _check_no_overlap(path: Path, tensors: Mapping[str, Placed]) -> None:
    previous, reached = "", 0
    for name, t in sorted(tensors.items(), key=lambda item: item[1].offset):
        if t.offset < reached:
            raise CheckpointError(f"{path}: header is garbage: tensors {previous} and {name} overlap")
        previous, reached = name, t.offset + t.spec.nbytes


def layout(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None) -> tuple[bytes, Header]:
    """The header bytes of a file that holds `specs`, and where each tensor goes. The path of the result is empty.

    Wider dtypes come first, then names in order: every tensor is aligned to its own element size, as the reference
    implementation does, so that mapped tensors need no copy.
    """
    order = sorted(specs, key=lambda name: (-specs[name].kind.itemsize, name))
    entries: dict[str, Any] = {}
    if metadata:
        entries["__metadata__"] = dict(sorted(metadata.items()))
    begin = 0
    begins: dict[str, int] = {}
    for name in order:
        spec = specs[name]
        begins[name] = begin
        entries[name] = {
            "dtype": spec.kind.code,
            "shape": list(spec.shape),
            "data_offsets": [begin, begin + spec.nbytes],
        }
        begin += spec.nbytes
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (math.ceil(len(raw) / 8) * 8 - len(raw))
    data_start = 8 + len(raw)
    tensors = {name: Placed(spec=specs[name], offset=data_start + begins[name]) for name in order}
    header = Header(path=Path(), tensors=tensors, end=data_start + begin, metadata=dict(metadata or {}))
    return struct.pack("<Q", len(raw)) + raw, header
