"""A fused model's delta as a LoRA adapter over the aligned model: per tensor the nearest matrix of a given rank.

A mask takes elements away, so what it leaves of a product of rank r is itself of full rank: the adapter is an approximation,
and how far off it is gets measured on the factors that are written. (DoRA rescales the base, which is of full rank too: such a
finetune leaves as a plain LoRA.) Whole tensors that the finetune's adapter carries (modules_to_save, trained biases) are
written as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from components.checkpoints.adapter_files import saved_whole, write_adapter
from components.checkpoints.adapter_parsing import LoraPair
from components.checkpoints.adapters import LoraSource
from components.checkpoints.reference import Checkpoint
from components.checkpoints.source import TensorSource, blocks, read_whole

_BLOCK = 1 << 20
_EIGH = 9.0
"""Operations of all eigenvectors of a symmetric n × n matrix, as a multiple of n³ (Golub & Van Loan, section 8.3)."""


@dataclass(frozen=True)
class LowRankTensor:
    """One adapted tensor. Norms are Frobenius norms, taken in fp64 of fp32 elements."""

    rank: int
    delta_norm: float
    """‖Δ‖, Δ = fused − aligned."""
    lost_norm: float
    """‖Δ − B A‖ of the factors as they are written."""

    @property
    def error(self) -> float:
        """‖Δ − B A‖ / ‖Δ‖; 0 where the delta is."""
        return self.lost_norm / self.delta_norm if self.delta_norm else 0.0


@dataclass(frozen=True)
class LowRankReport:
    """What an adapter keeps of a fused model."""

    tensors: Mapping[str, LowRankTensor]
    whole: tuple[str, ...]
    """Tensors that the adapter carries as they are."""

    @property
    def error(self) -> float:
        """‖Δ − B A‖ / ‖Δ‖ over all adapted tensors together."""
        lost, norm = (
            math.sqrt(sum(getattr(t, key) ** 2 for t in self.tensors.values())) for key in ("lost_norm", "delta_norm")
        )
        return lost / norm if norm else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        tensors = {name: {**asdict(t), "error": t.error} for name, t in self.tensors.items()}
        return {"error": self.error, "whole": list(self.whole), "tensors": tensors}


def best_of_rank(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, A) with B A the nearest matrix to `delta` of that rank in the Frobenius norm (Eckart & Young 1936): B [out, rank]
    with orthonormal columns, A [rank, in], fp32; or the same with the roles swapped where `delta` has fewer columns than
    rows.

    The singular vectors of the shorter side are the eigenvectors of that side's Gram matrix, in fp64: a projection onto
    them loses what the exact SVD does, up to the vectors' error squared, in a fraction of the time: a 4096 × 11008 matrix
    takes 37 s and 1.3 GB on one core.
    """
    if delta.shape[0] > delta.shape[1]:
        a, b = best_of_rank(delta.T, rank)
        return b.T.contiguous(), a.T.contiguous()
    assert 0 < rank <= delta.shape[0], (rank, delta.shape)
    wide = delta.double()
    _, vectors = torch.linalg.eigh(wide @ wide.T)  # ascending eigenvalues
    b = vectors[:, -rank:].flip(1)
    return b.float().contiguous(), (b.T @ wide).float()


@dataclass(frozen=True)
class ExportSizes:
    """What `export_adapter` takes, from headers alone."""

    adapter: int
    """Bytes of the factors and whole tensors that are written, and held until then."""
    working: int
    """Bytes beside them while the largest tensor is factored."""
    operations: float
    """In fp64, of all Gram matrices, their eigenvectors and the projections."""


def export_sizes(source: LoraSource, rank: int | None) -> ExportSizes:
    """Of a finetune that came as the adapter `source`, exported with `rank` (None: each tensor's own)."""
    adapter, working, operations = 0, 0, 0.0
    for name, pair in source.pairs().items():
        shape = source.spec(name).shape
        short, long = min(shape), max(shape)
        kept = min(pair.rank if rank is None else rank, short)
        adapter += 4 * kept * (short + long)
        working = max(working, 6 * 4 * short * long)
        operations += 2.0 * short * short * long + _EIGH * short**3 + 2.0 * kept * short * long
    for name in saved_whole(source).values():
        adapter += source.spec(name).nbytes
    return ExportSizes(adapter, working, operations)


def export_adapter(
    *,
    aligned: Checkpoint,
    finetune: Checkpoint,
    fused: TensorSource,
    rank: int | None,
    out_dir: Path,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> LowRankReport:
    """Write the PEFT adapter of `fused` over `aligned` into `out_dir`: factors, config, tokenizer.

    `finetune` came as an adapter; the new one adapts the same tensors, each with its own rank (`rank` None) or with `rank`,
    at most as many as it has rows or columns. lora_alpha / r is 1: the scaling stands in the factors. Memory is the
    adapter's and, for one tensor at a time, six times its own in fp32. Raises StorageError when the disk refuses.
    """
    source = finetune.source
    assert isinstance(source, LoraSource)
    _assert_untouched(aligned.source, fused, set(source.adapted()))
    tensors: dict[str, torch.Tensor] = {}
    found: dict[str, LowRankTensor] = {}
    pairs = source.pairs()
    for done, (name, pair) in enumerate(sorted(pairs.items()), 1):
        tensors[pair.a], tensors[pair.b], found[name] = _factored(name, pair, aligned.source, fused, rank)
        if progress is not None:
            progress({"tensor": name, "done": done, "total": len(pairs)})
    whole = saved_whole(source)
    tensors |= {key: read_whole(fused, name) for key, name in whole.items()}
    config = _config(source, {pairs[name].module: t.rank for name, t in found.items()})
    write_adapter(out_dir, tensors, config, base=aligned, tokenizer_dir=finetune.tokenizer_dir)
    return LowRankReport(found, tuple(sorted(set(whole.values()))))


def _factored(
    name: str, pair: LoraPair, aligned: TensorSource, fused: TensorSource, rank: int | None
) -> tuple[torch.Tensor, torch.Tensor, LowRankTensor]:
    """A, B and what they lose, of one tensor."""
    delta = read_whole(fused, name).float() - read_whole(aligned, name).float()
    delta = delta.T if pair.transposed else delta
    kept = min(pair.rank if rank is None else rank, *delta.shape)
    b, a = best_of_rank(delta, kept)
    return a, b, LowRankTensor(kept, _norm(delta), _norm(delta - b @ a))


def _norm(values: torch.Tensor) -> float:
    return math.sqrt(float(values.double().square().sum()))


def _config(source: LoraSource, ranks: Mapping[str, int]) -> dict[str, Any]:
    """LoraConfig's arguments: what the finetune's adapter says of whole tensors and orientation, and the new ranks."""
    common = max(ranks.values())
    others = {re.escape(module): rank for module, rank in sorted(ranks.items()) if rank != common}
    carried = ("modules_to_save", "bias", "fan_in_fan_out", "task_type")
    return {
        **{key: source.config[key] for key in carried if source.config.get(key) is not None},
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
    }


def _assert_untouched(aligned: TensorSource, fused: TensorSource, adapted: set[str]) -> None:
    """What an adapter does not cover, no fusion with it can have changed."""
    for name in sorted(set(aligned.names()) - adapted):
        for start, stop in blocks(aligned.spec(name).numel, _BLOCK):
            assert torch.equal(aligned.read(name, start, stop), fused.read(name, start, stop)), name
