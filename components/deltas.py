"""What a finetune changed: statistics of τ = finetune − aligned, taken in fp32 as it is read and never stored.

Sums are accumulated in fp64, block by block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from components.checkpoints.compare import compare_tensors
from components.checkpoints.source import TensorSource, blocks
from components.errors import CheckpointError, listed
from components.storage import Progress

BLOCK = 262_144
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class DeltaStatistics:
    """Of one tensor, or of the whole model."""

    numel: int
    norm: float
    """‖τ‖₂."""
    aligned_norm: float
    """‖θ_safe‖₂."""
    relative_norm: float
    """‖τ‖ / ‖θ_safe‖; 0 where both are 0, infinite where only θ_safe is."""
    zeros: float
    """Share of elements that did not change at all."""
    max_abs: float
    """max |τ|."""
    one_ulp: float | None
    """Of the changed elements, the share that moved by one unit in the last place of their 16-bit type: there a soft
    mask rounds to a binary one. None when the two tensors are not both bf16 or both fp16, or nothing changed."""


@dataclass(frozen=True)
class DeltaReport:
    """Statistics of every tensor and of all weights together."""

    overall: DeltaStatistics
    tensors: dict[str, DeltaStatistics]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types (an infinite ratio becomes null)."""
        return {"overall": _plain(self.overall), "tensors": {n: _plain(s) for n, s in self.tensors.items()}}


@dataclass(frozen=True)
class DeltaCosines:
    """Cosines between the deltas of several finetunes: `overall[a][b]`, and by tensor. NaN where a delta is zero."""

    names: list[str]
    overall: dict[str, dict[str, float]]
    tensors: dict[str, dict[str, dict[str, float]]]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types (NaN becomes null)."""
        return {
            "names": self.names,
            "overall": _nan_to_none(self.overall),
            "tensors": {n: _nan_to_none(t) for n, t in self.tensors.items()},
        }


@dataclass
class _Sums:
    numel: int = 0
    square: float = 0.0
    aligned_square: float = 0.0
    zeros: int = 0
    max_abs: float = 0.0
    half_changed: int = 0
    one_ulp: int = 0

    def add(self, other: _Sums) -> None:
        self.numel += other.numel
        self.square += other.square
        self.aligned_square += other.aligned_square
        self.zeros += other.zeros
        self.max_abs = max(self.max_abs, other.max_abs)
        self.half_changed += other.half_changed
        self.one_ulp += other.one_ulp

    def statistics(self) -> DeltaStatistics:
        norm, aligned_norm = math.sqrt(self.square), math.sqrt(self.aligned_square)
        relative = norm / aligned_norm if aligned_norm else (math.inf if norm else 0.0)
        return DeltaStatistics(
            numel=self.numel,
            norm=norm,
            aligned_norm=aligned_norm,
            relative_norm=relative,
            zeros=self.zeros / self.numel if self.numel else 1.0,
            max_abs=self.max_abs,
            one_ulp=self.one_ulp / self.half_changed if self.half_changed else None,
        )


def delta_statistics(
    aligned: TensorSource, finetune: TensorSource, *, block: int = BLOCK, progress: Progress | None = None
) -> DeltaReport:
    """Statistics of τ per tensor and overall; reads both models once.

    `progress` is called after each tensor with {"tensor", "done", "total"} (tensors). Raises CheckpointError listing
    all tensors that do not fit.
    """
    _require_fit(aligned, {"finetune": finetune})
    names = aligned.names()
    total = _Sums()
    tensors: dict[str, DeltaStatistics] = {}
    for i, name in enumerate(names, start=1):
        sums = _Sums()
        for start, stop in blocks(aligned.spec(name).numel, block):
            sums.add(_block_sums(aligned.read(name, start, stop), finetune.read(name, start, stop)))
        tensors[name] = sums.statistics()
        total.add(sums)
        if progress is not None:
            progress({"tensor": name, "done": i, "total": len(names)})
    return DeltaReport(overall=total.statistics(), tensors=tensors)


def delta_cosines(
    aligned: TensorSource,
    finetunes: Mapping[str, TensorSource],
    *,
    block: int = BLOCK,
    progress: Progress | None = None,
) -> DeltaCosines:
    """cos(τ_a, τ_b) for every pair of finetunes, overall and per tensor; reads each model once, block by block.

    Raises CheckpointError listing all tensors of all finetunes that do not fit the aligned model.
    """
    _require_fit(aligned, finetunes)
    labels = list(finetunes)
    total = torch.zeros(len(labels), len(labels), dtype=torch.float64)
    tensors: dict[str, dict[str, dict[str, float]]] = {}
    names = aligned.names()
    for i, name in enumerate(names, start=1):
        gram = torch.zeros_like(total)
        for start, stop in blocks(aligned.spec(name).numel, block):
            base = aligned.read(name, start, stop).float()
            deltas = torch.stack([f.read(name, start, stop).float() - base for f in finetunes.values()]).double()
            gram += deltas @ deltas.T
        tensors[name] = _cosines(gram, labels)
        total += gram
        if progress is not None:
            progress({"tensor": name, "done": i, "total": len(names)})
    return DeltaCosines(names=labels, overall=_cosines(total, labels), tensors=tensors)


def ulp_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many representable values lie between two tensors of one 16-bit float type, plus one; 0 when equal. int32.

    Sign and magnitude are mapped to one line of integers, on which both zeros are 0.
    """
    assert a.dtype == b.dtype
    assert a.dtype in _HALF
    lines = []
    for values in (a, b):
        bits = values.view(torch.int16).int()
        magnitude = bits & 0x7FFF
        lines.append(torch.where(bits < 0, -magnitude, magnitude))
    return (lines[0] - lines[1]).abs()


def _block_sums(aligned: torch.Tensor, finetune: torch.Tensor) -> _Sums:
    base = aligned.float()
    delta = finetune.float() - base
    sums = _Sums(
        numel=delta.numel(),
        square=float(delta.double().square().sum()),
        aligned_square=float(base.double().square().sum()),
        zeros=int((delta == 0).sum()),
        max_abs=float(delta.abs().max()) if delta.numel() else 0.0,
    )
    if aligned.dtype == finetune.dtype and aligned.dtype in _HALF:
        sums.half_changed = sums.numel - sums.zeros
        sums.one_ulp = int((ulp_distance(aligned, finetune) == 1).sum())
    return sums


def _cosines(gram: torch.Tensor, labels: list[str]) -> dict[str, dict[str, float]]:
    norms = gram.diagonal().sqrt()
    cosines = (gram / (norms[:, None] * norms[None, :])).tolist()
    return {a: dict(zip(labels, row, strict=True)) for a, row in zip(labels, cosines, strict=True)}


def _require_fit(aligned: TensorSource, finetunes: Mapping[str, TensorSource]) -> None:
    problems = [f"{label}: {p}" for label, f in finetunes.items() for p in compare_tensors(aligned, f)]
    if problems:
        raise CheckpointError(f"no delta can be taken: {listed(problems, 12)}")


def _plain(statistics: DeltaStatistics) -> dict[str, Any]:
    values = asdict(statistics)
    if math.isinf(statistics.relative_norm):
        values["relative_norm"] = None
    return values


def _nan_to_none(table: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    return {a: {b: None if math.isnan(c) else c for b, c in row.items()} for a, row in table.items()}
