"""The mask as an artifact of its own: `mask.safetensors` (bf16 logits or packed bits) and `mask.json` (statistics,
settings).

The tensors file is written header first and its pieces go to their offsets as they come, so nobody holds a whole mask.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from components.errors import CheckpointError, listed
from components.mapped import drop, map_file, reserve, tensor_over
from components.masks.concrete import BLOCK, binary_mask, soft_mask
from components.masks.granularity import spread, units
from components.masks.settings import MaskSettings

TENSORS_FILE, STATISTICS_FILE = "mask.safetensors", "mask.json"
FORMAT = "realign-mask-1"
SOFT_UNIT = 1 << 24


@dataclass
class _Tally:
    """Running sums over one tensor's stored logits."""

    seen: int = 0
    kept: int = 0
    soft: int = 0
    """Σ σ(ℓ) in units of 2⁻²⁴: whole numbers, so that the sum does not depend on how the mask was cut."""

    def count(self, logits: torch.Tensor, threshold: float = 0.0, temperature: float = 1.0) -> torch.Tensor:
        """Add some logits; which of them are kept."""
        keep = binary_mask(logits, threshold)
        self.seen += logits.numel()
        self.kept += int(keep.sum())
        self.soft += int((soft_mask(logits.float(), temperature) * SOFT_UNIT).round_().to(torch.int64).sum())
        return keep


def write_artifact(
    directory: Path,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    shards: Iterable[tuple[str, int, int, torch.Tensor]],
    settings: MaskSettings,
    unmasked: Mapping[str, int] | None = None,
    statistics: Mapping[str, Mapping[str, Any]] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write the two files into `directory`.

    `shapes`: every masked tensor. `shards`: (name, start, stop, logits) slices that together cover each tensor's logits (one
    for each element, row or tensor: `settings.granularity`) once, in any order. `unmasked`: tensors (name -> elements) that
    keep the finetune's weights. `statistics`: more figures per tensor, `extra`: of the whole mask. What is counted is what is
    stored: logits are rounded to bf16 first. Raises OSError when the disk is too small."""
    directory.mkdir(parents=True, exist_ok=True)
    bits = settings.storage == "bits"
    unit = {name: settings.unit(shape) for name, shape in sorted(shapes.items())}
    logits_of = {name: _numel(shapes[name]) // unit[name] for name in unit}
    text, offsets, at = _header(shapes, logits_of, settings)
    path = directory / TENSORS_FILE
    with path.open("wb") as file:
        reserve(file, 0, 8 + len(text) + at)
        file.write(struct.pack("<Q", len(text)) + text)
    tallies = {name: _Tally() for name in shapes}
    if at:
        with path.open("r+b") as file:
            mapped = map_file(file, private=False)
        data = tensor_over(mapped, torch.uint8, at, 8 + len(text))
        for name, start, stop, logits in shards:
            _store(data.numpy(), offsets[name], start, logits, tallies[name], bits=bits)
            assert stop - start == logits.numel(), name
            drop(data)
        mapped.flush()
    incomplete = [name for name, tally in tallies.items() if tally.seen != logits_of[name]]
    assert not incomplete, f"shards do not cover {listed(incomplete)}"
    tensors = {
        name: {
            "shape": list(shapes[name]),
            "density": tally.kept / max(tally.seen, 1),
            "soft_mean": tally.soft / SOFT_UNIT / max(tally.seen, 1),
            **((statistics or {}).get(name, {})),
        }
        for name, tally in sorted(tallies.items())
    }
    total = max(sum(_numel(shape) for shape in shapes.values()), 1)
    summary = {
        "format": FORMAT,
        "storage": settings.storage,
        "settings": settings.model_dump(mode="json"),
        "settings_fingerprint": settings.fingerprint(),
        "elements": total,
        "density": sum(unit[n] * t.kept for n, t in tallies.items()) / total,
        "soft_mean": sum(unit[n] * t.soft for n, t in tallies.items()) / SOFT_UNIT / total,
        "unmasked": dict(sorted((unmasked or {}).items())),
        **(extra or {}),
        "tensors": tensors,
    }
    (directory / STATISTICS_FILE).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def _header(
    shapes: Mapping[str, tuple[int, ...]], logits_of: Mapping[str, int], settings: MaskSettings
) -> tuple[bytes, dict[str, int], int]:
    """The header of a safetensors file, each tensor's offset in the data behind it, and the data's size."""
    bits = settings.storage == "bits"
    header: dict[str, Any] = {
        "__metadata__": {"format": FORMAT, "storage": settings.storage, "settings": settings.fingerprint()}
    }
    offsets, at = {}, 0
    for name, count in logits_of.items():
        size = (count + 7) // 8 if bits else 2 * count
        shape = [size] if bits else list(shapes[name]) if count == _numel(shapes[name]) else [count]
        header[name] = {"dtype": "U8" if bits else "BF16", "shape": shape, "data_offsets": [at, at + size]}
        offsets[name] = at
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), offsets, at


def _numel(shape: Iterable[int]) -> int:
    n = 1
    for s in shape:
        n *= s
    return n


def _store(
    data: npt.NDArray[np.uint8],
    offset: int,
    start: int,
    logits: torch.Tensor,
    tally: _Tally,
    *,
    bits: bool,
) -> None:
    """Put one slice at its place, in pieces, and count it."""
    flat = logits.detach().reshape(-1)
    for low in range(0, flat.numel(), 2 * BLOCK):
        piece = flat[low : low + 2 * BLOCK].to("cpu", torch.bfloat16)
        keep = tally.count(piece)
        first = start + low
        if bits:
            # A slice may begin inside a byte that its neighbour ends in, so bits are added to what is there.
            packed = np.packbits(np.pad(keep.numpy(), (first % 8, 0)), bitorder="little")
            data[offset + first // 8 : offset + first // 8 + packed.size] |= packed
        else:
            data[offset + 2 * first : offset + 2 * (first + piece.numel())] = piece.view(torch.uint8).numpy()


class MaskArtifact:
    """A mask on disk, read by range. A tensor that got no mask reads as all ones: it keeps the finetune's weights."""

    def __init__(self, path: Path, metadata: dict[str, Any], offsets: dict[str, int]) -> None:
        self.path = path
        self.metadata = metadata
        """What mask.json holds."""
        self.settings = MaskSettings.model_validate(metadata["settings"])
        self._offsets = offsets
        self._numel = {name: _numel(t["shape"]) for name, t in metadata["tensors"].items()}
        self._unit = {name: self.settings.unit(t["shape"]) for name, t in metadata["tensors"].items()}
        self._unmasked: dict[str, int] = metadata["unmasked"]
        self._tallies: dict[tuple[str, float, float], tuple[float, float]] = {}
        self._data = np.memmap(path / TENSORS_FILE, dtype=np.uint8, mode="r") if offsets else np.zeros(0, np.uint8)

    @classmethod
    def open(cls, path: Path) -> Self:
        """From its directory. Raises CheckpointError when a file is missing, broken, or they do not belong together."""
        try:
            metadata = json.loads((path / STATISTICS_FILE).read_text(encoding="utf-8"))
            with (path / TENSORS_FILE).open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(size))
                ends = file.seek(0, 2)
        except (OSError, ValueError, struct.error) as error:
            raise CheckpointError(f"{path}: not a mask artifact ({error})") from None
        about = header.pop("__metadata__", {})
        if metadata.get("format") != FORMAT or about.get("format") != FORMAT:
            raise CheckpointError(f"{path}: not a mask of format {FORMAT}; train it again with this version")
        if about["settings"] != metadata["settings_fingerprint"] or set(header) != set(metadata["tensors"]):
            raise CheckpointError(f"{path}: {TENSORS_FILE} and {STATISTICS_FILE} are of different masks")
        if ends != 8 + size + max((t["data_offsets"][1] for t in header.values()), default=0):
            raise CheckpointError(f"{path / TENSORS_FILE}: truncated; copy or train it again")
        return cls(path, metadata, {name: 8 + size + t["data_offsets"][0] for name, t in header.items()})

    def names(self) -> list[str]:
        """Every tensor that the mask speaks of, sorted, with those that got no mask."""
        return sorted([*self._numel, *self._unmasked])

    def numel(self, name: str) -> int:
        """Elements of one tensor."""
        if name not in self._numel and name not in self._unmasked:
            raise CheckpointError(f"{self.path}: the mask has no tensor {name!r}; it has {listed(self.names(), 4)}")
        return self._numel[name] if name in self._numel else self._unmasked[name]

    def is_masked(self, name: str) -> bool:
        """Whether a mask was trained for the tensor."""
        return self.numel(name) > 0 and name in self._numel

    def logits(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """ℓ of elements [start, stop): 1-D fp32; +inf for a tensor without a mask."""
        stop = self.numel(name) if stop is None else stop
        if name in self._unmasked:
            return torch.full((stop - start,), torch.inf)
        self._require_logits()
        if start == stop:
            return torch.zeros(0)
        return spread(self._stored(name, *units(self._unit[name], start, stop)), self._unit[name], start, stop)

    def _stored(self, name: str, first: int, last: int) -> torch.Tensor:
        """Logits of units [first, last), 1-D fp32."""
        raw = self._data[self._offsets[name] + 2 * first : self._offsets[name] + 2 * last]
        return torch.from_numpy(np.array(raw)).view(torch.bfloat16).float()

    def _require_logits(self) -> None:
        if self.metadata["storage"] == "bits":
            raise CheckpointError(
                f"{self.path}: keeps bits only; train with mask.storage: logits for a soft mask or another threshold"
            )

    def soft(self, name: str, start: int = 0, stop: int | None = None, *, temperature: float = 1.0) -> torch.Tensor:
        """σ(ℓ / temperature) of elements [start, stop): 1-D fp32 in [0, 1]."""
        return soft_mask(self.logits(name, start, stop), temperature)

    def binary(self, name: str, start: int = 0, stop: int | None = None, *, threshold: float = 0.0) -> torch.Tensor:
        """ℓ > threshold of elements [start, stop): 1-D bool. A mask that keeps bits only knows no threshold but 0."""
        stop = self.numel(name) if stop is None else stop
        if self.metadata["storage"] != "bits" or name in self._unmasked or threshold != 0:
            return binary_mask(self.logits(name, start, stop), threshold)
        at = self._offsets[name]
        first, last = units(self._unit[name], start, stop)
        raw = self._data[at + first // 8 : at + (last + 7) // 8]
        found = np.unpackbits(raw, bitorder="little")[first % 8 : first % 8 + last - first]
        return spread(torch.from_numpy(found.astype(np.bool_)), self._unit[name], start, stop)

    def figures(self) -> dict[str, Any]:
        """What its training measured, and how much it keeps."""
        return {**self.metadata["metrics"], **{key: self.metadata[key] for key in ("density", "soft_mean")}}

    def density(self, name: str, *, threshold: float = 0.0) -> float:
        """Share of the tensor's elements that the binary mask keeps."""
        return self._statistic(name, "density") if threshold == 0 else self._counted(name, threshold=threshold)[0]

    def soft_mean(self, name: str, *, temperature: float = 1.0) -> float:
        """Mean of σ(ℓ / temperature) over the whole tensor."""
        return (
            self._statistic(name, "soft_mean") if temperature == 1 else self._counted(name, temperature=temperature)[1]
        )

    def unit(self, name: str) -> int:
        """Neighbours of a flattened tensor that share a logit."""
        return self._unit.get(name, 1)

    def _counted(self, name: str, *, threshold: float = 0.0, temperature: float = 1.0) -> tuple[float, float]:
        """Density and mean at other values than those that were counted when the mask was written: the same sums, made when
        first asked for."""
        if name in self._unmasked:
            return 1.0, 1.0
        key = name, threshold, temperature
        if key not in self._tallies:
            self._require_logits()
            tally, count = _Tally(), self.numel(name) // self._unit[name]
            for start in range(0, count, 2 * BLOCK):
                tally.count(self._stored(name, start, min(start + 2 * BLOCK, count)), threshold, temperature)
            seen = max(tally.seen, 1)
            self._tallies[key] = tally.kept / seen, tally.soft / SOFT_UNIT / seen
        return self._tallies[key]

    def _statistic(self, name: str, key: str) -> float:
        if self.numel(name) and name in self._unmasked:
            return 1.0
        return float(self.metadata["tensors"][name][key])
