"""Several finetunes as one: their task vectors merged slice by slice as they are read, nothing stored.

Notation: a = aligned, τ_t = f_t − a, w_t and λ the factors. A mask m shared by all task vectors goes through every merge here:
Merge({m ⊙ τ_t}) = m ⊙ Merge({τ_t}). Averages, sums and drops that a seed decides are linear by element; TIES elects the sign
of m Σ τ_t, which is that of Σ τ_t, and what it trims is decided by the task vectors as they are (the official code trims after
masking, by which a masked-out weight makes room for one that was too small to count). So masking the merged task vector trains
the shared mask on the merge itself, and the gradient of m is the sum of every task's part. Spherical interpolation is no such
merge: under a mask it is what the mask makes of (slerp − a), no more.

Where mergekit (0.1.5) computes otherwise (`benchmarks/mergekit_values.py` measures it):

* TIES keeps everything that is at least as large as the k-th magnitude, k = round(density · N) and at least 1; mergekit keeps
  exactly int(density · N), at least 1, of equal magnitudes those that its sort puts first.
* Where the task vectors cancel to exactly zero no sign is elected and nothing is added; mergekit takes the positive ones.
* The mean over those that agree divides by the sum of |w_t|; mergekit (`normalize`) by the sum of w_t, which with negative
  weights is another number and may be near zero.
* `dare_ties` averages by default, as TIES does; mergekit's sums (`normalize: false`): `aggregate: sum`.
* DARE's drops are a function of seed, finetune, tensor and position; mergekit's are drawn from torch's generator. What is kept
  is divided by the density, as published; mergekit (`rescale`) restores the tensor's own sum of magnitudes, so that its factor
  varies from tensor to tensor.
* `weights` are used as given; mergekit's `linear` divides by their sum (`normalize: true`).
* Slerp takes its dot product and norms in fp64 and starts from the nearer end when it falls back to a straight line, so equal
  weights stay equal; a tensor of zeros goes straight too, where mergekit still follows a quarter circle.
* All arithmetic is fp32 whatever the inputs' dtype; mergekit computes task vectors in `dtype` or the inputs' own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from components.checkpoints.compare import compare_tensors, same_bits
from components.checkpoints.dtypes import F32, Bits, DType, Stretch, as_bits, as_tensor
from components.checkpoints.source import TensorSource, TensorSpec, bits_of, blocks, has_bits
from components.errors import CheckpointError, ConfigError, listed
from components.fusion.finite import refuse_not_finite
from components.fusion.kernels import KNOWN, MergeKernel, known, library, narrow
from components.fusion.merge_functions import (
    BLOCK,
    CHUNK,
    Angle,
    Draws,
    angle_between,
    dropped,
    slerp,
    ties,
    weighted_sum,
    widened,
)
from components.fusion.merge_settings import MergeSettings, factor_for, merge_problems
from components.fusion.trimming import Thresholds
from components.mapped import drop

_DROPS = ("dare", "dare_ties")
"""Leave elements out by chance: what is not finite may not show in the sum. What TIES trims is small."""


@dataclass(frozen=True)
class _Factors:
    """One tensor's numbers."""

    scale: float
    weights: list[float]
    t: float


@dataclass(frozen=True)
class _Piece:
    """A stretch of one tensor, of all models."""

    name: str
    start: int
    models: Sequence[Stretch]
    """The aligned model's and each finetune's."""

    @property
    def numel(self) -> int:
        return self.models[0][0].size


class MergedSource:
    """TensorSource of aligned + λ Merge({τ_t}) in fp32. Tensors of integers must be equal everywhere.

    `slerp` is between the weights of two models: the two finetunes in their order, where the aligned model then only says which
    tensors there are, or, with one finetune, the aligned model (t = 0) and it (t = 1).

    `thresholds` are those of `find_thresholds`, for TIES. Raises CheckpointError listing all tensors that do not fit,
    ConfigError listing all weights and patterns that fit nothing.
    """

    def __init__(
        self,
        aligned: TensorSource,
        finetunes: Mapping[str, TensorSource],
        settings: MergeSettings,
        thresholds: Thresholds | None = None,
    ) -> None:
        problems = [f"{name}: {p}" for name, source in finetunes.items() for p in compare_tensors(aligned, source)]
        if problems:
            raise CheckpointError(f"these finetunes cannot be merged: {listed(problems, 12)}")
        problems = merge_problems(settings, list(finetunes), aligned.names())
        if problems:
            hints = [f"the finetunes are {', '.join(finetunes)}"] if any(" names " in p for p in problems) else []
            if any("pattern" in p for p in problems):
                hints.append(f"tensors are named like {' and '.join(aligned.names()[1:3])}")
            raise ConfigError("; ".join([f"the merge does not fit its models: {listed(problems, 12)}", *hints]))
        self._aligned, self._finetunes, self._settings = aligned, finetunes, settings
        self._thresholds = thresholds or {}
        assert settings.method != "ties" or set(self._thresholds) == set(finetunes)
        self._factors: dict[str, _Factors] = {}
        self._angles: dict[str, Angle] = {}

    def names(self) -> list[str]:
        """The aligned model's tensors."""
        return self._aligned.names()

    def aliases(self) -> Mapping[str, str]:
        """The aligned model's aliases."""
        return self._aligned.aliases()

    def spec(self, name: str) -> TensorSpec:
        """fp32: a merged task vector is no multiple of anybody's 16-bit steps."""
        spec = self._aligned.spec(name)
        return TensorSpec(F32, spec.shape) if spec.kind.is_float else spec

    @property
    def compiled(self) -> bool:
        """Whether compiled kernels do all of it, from files: torch has no part in it."""
        every = (self._aligned, *self._finetunes.values())
        return library() is not None and self._settings.method != "slerp" and all(has_bits(type(one)) for one in every)

    def members(self) -> Mapping[str, TensorSource]:
        """The finetunes."""
        return self._finetunes

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the merged tensor, flattened."""
        spec = self.spec(name)
        stop = spec.numel if stop is None else stop
        out = np.empty(stop - start, spec.kind.bits)
        for low, high in blocks(stop - start, CHUNK):
            for at, bits in self.pieces(name, start + low, start + high, spec.kind):
                out[at - start : at - start + bits.size] = bits
            for source in self._finetunes.values():
                if has_bits(type(source)):  # to ask others is to compute
                    drop(bits_of(source, name, start + low, start + high))
        return as_tensor(out, spec.kind)

    def pieces(self, name: str, start: int, stop: int, kind: DType) -> Iterator[tuple[int, Bits]]:
        """Elements [start, stop) piece by piece, rounded to `kind` (tensors of integers stay what they are): where each begins,
        and its bits, which the next one overwrites."""
        if start == stop:
            return
        name = self.aliases().get(name, name)
        sources = [self._aligned, *self._finetunes.values()]
        kinds = [source.spec(name).kind for source in sources]
        merge, size = self._way(name, kind, stop - start)
        for low, high in blocks(stop - start, CHUNK):
            # Once a chunk, not once a block: to ask costs as much as a pass over a small block.
            chunk = [bits_of(source, name, start + low, start + high) for source in sources]
            for first, last in blocks(high - low, size):
                at = start + low + first
                models = [(bits[first:last], one) for bits, one in zip(chunk, kinds, strict=True)]
                yield at, merge(_Piece(name, at, models))

    def unchanged(self, name: str, start: int, stop: int) -> bool:
        """Whether no finetune differs from the aligned model there, bit for bit."""
        return all(same_bits(self._aligned, one, name, start, stop) for one in self._finetunes.values())

    def _way(self, name: str, kind: DType, numel: int) -> tuple[Callable[[_Piece], Bits], int]:
        """How pieces of a tensor are merged, and how many elements a piece should have."""
        if not self._aligned.spec(name).kind.is_float:
            return self._same_integers, CHUNK
        kernel, draws = self._kernel(name), self._draws(name)
        if kernel is None:
            size = min(BLOCK, numel)
            out = torch.empty(size, dtype=kind.in_torch)
            rooms = [torch.empty(size) for _ in (self._aligned, *self._finetunes)]
            return lambda piece: self._by_torch(piece, kind, out[: piece.numel], rooms, draws), size
        size = min(CHUNK, numel)
        room = np.empty(size, (kind if kind in KNOWN else F32).bits)
        return lambda piece: self._by_kernel(piece, kind, room[: piece.numel], kernel, draws), size

    def _same_integers(self, piece: _Piece) -> Bits:
        (stored, kind), *tuned = piece.models
        for whose, (bits, other) in zip(self._finetunes, tuned, strict=True):
            if other != kind or not np.array_equal(stored, bits):
                raise CheckpointError(f"{piece.name} holds integers that differ in {whose}; they cannot be merged")
        return stored

    def _by_kernel(
        self, piece: _Piece, kind: DType, room: Bits, kernel: MergeKernel, draws: Mapping[str, Draws]
    ) -> Bits:
        keys = [draws.keys(piece.start, room.size) for draws in draws.values()] or None
        base, *tuned = (known(*one) for one in piece.models)
        merged = room, kind if kind in KNOWN else F32
        total = kernel(base, tuned, merged, start=piece.start, keys=keys)
        self._require_finite(piece, total, merged)
        return narrow(room, kind)

    def _by_torch(
        self, piece: _Piece, kind: DType, out: torch.Tensor, rooms: Sequence[torch.Tensor], draws: Mapping[str, Draws]
    ) -> Bits:
        stored, *tuned = (as_tensor(*one) for one in piece.models)
        room, *others = (room[: stored.numel()] for room in rooms)
        aligned = widened(stored, room)
        if self._settings.method == "slerp":
            models = [widened(one, room) for one, room in zip(tuned, others, strict=True)]
            merged = self._slerp(piece.name, aligned, models)
            # Also those that t gives no part.
            self._require_finite(piece, sum(float(one.sum()) for one in (aligned, *models)))
        else:
            merged = self._merge(piece.name, self._deltas(piece, aligned, tuned, others, draws))
            scale = self._numbers(piece.name).scale
            if scale != 1:
                merged.mul_(scale)
            merged.add_(aligned)
        self._require_finite(piece, float(merged.sum()), (as_bits(merged), F32))
        return as_bits(merged if kind == F32 else out.copy_(merged))

    def _deltas(
        self,
        piece: _Piece,
        aligned: torch.Tensor,
        tuned: Sequence[torch.Tensor],
        rooms: Sequence[torch.Tensor],
        draws: Mapping[str, Draws],
    ) -> list[torch.Tensor]:
        """The task vectors in `rooms`, with those elements dropped that are to be."""
        total = 0.0
        deltas = []
        for one, values, room in zip(self._finetunes, tuned, rooms, strict=True):
            delta = torch.sub(widened(values, room), aligned, out=room)
            if one in draws:
                total += float(delta.sum())  # before anything is dropped
                drawn = draws[one].at(piece.start, delta.numel())
                delta = dropped(delta, drawn, keep=self._settings.kept_of(one, piece.name))
            deltas.append(delta)
        self._require_finite(piece, total)
        return deltas

    def _require_finite(self, piece: _Piece, total: float, merged: Stretch | None = None) -> None:
        """A sum tells, and hardly costs."""
        if not math.isfinite(total):
            aligned, *tuned = piece.models
            slices = {**dict(zip(self._finetunes, tuned, strict=True)), "aligned": aligned}
            slices |= {} if merged is None else {"fused": merged}
            refuse_not_finite(piece.name, self.spec(piece.name).shape, piece.start, slices)

    def _merge(self, name: str, deltas: list[torch.Tensor]) -> torch.Tensor:
        settings, weights = self._settings, self._numbers(name).weights
        if settings.method in ("ties", "dare_ties"):
            limits = self._limits(name) or [0.0] * len(weights)
            return ties(deltas, weights, limits, mean=settings.aggregate == "mean")
        return weighted_sum(deltas, weights)

    def _limits(self, name: str) -> list[float] | None:
        return [self._thresholds[one][name] for one in self._finetunes] if self._settings.method == "ties" else None

    def _kernel(self, name: str) -> MergeKernel | None:
        """All but slerp, of tensors that are not integers."""
        lib, settings = library(), self._settings
        if lib is None or settings.method == "slerp" or not self.spec(name).kind.is_float:
            return None
        drops, numbers = settings.method in _DROPS, self._numbers(name)
        return MergeKernel(
            lib,
            weights=numbers.weights,
            scale=numbers.scale,
            keeps=[settings.kept_of(one, name) for one in self._finetunes] if drops else None,
            thresholds=self._limits(name),
            elect=settings.aggregate if settings.method in ("ties", "dare_ties") else None,
        )

    def _draws(self, name: str) -> dict[str, Draws]:
        """By finetune, what decides which elements are dropped; none where none are."""
        if self._settings.method not in _DROPS or not self.spec(name).kind.is_float:
            return {}
        return {one: Draws(seed=self._settings.seed, name=f"{one}/{name}") for one in self._finetunes}

    def _slerp(self, name: str, aligned: torch.Tensor, tuned: Sequence[torch.Tensor]) -> torch.Tensor:
        models = list(self._finetunes.values())
        first, second = models if len(models) == 2 else (self._aligned, models[0])
        if name not in self._angles:
            self._angles[name] = angle_between(first, second, name)
        x, y = tuned if len(models) == 2 else (aligned, tuned[0])
        return slerp(x, y, t=self._numbers(name).t, angle=self._angles[name])

    def _numbers(self, name: str) -> _Factors:
        if name not in self._factors:
            settings = self._settings
            layer = factor_for(settings.layers, name)
            found = [factor_for(settings.weights.get(one, 1.0), name) for one in self._finetunes]
            place = None if settings.t is None else factor_for(settings.t, name)
            self._factors[name] = _Factors(
                scale=settings.scale * (1.0 if layer is None else layer),
                weights=[1.0 if weight is None else weight for weight in found]
                if settings.method != "average"
                else [1 / len(found)] * len(found),
                t=0.0 if place is None else place,
            )
        return self._factors[name]
