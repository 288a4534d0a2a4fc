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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from components.checkpoints.compare import compare_tensors, same_bits
from components.checkpoints.safetensors import SafetensorsSource
from components.checkpoints.source import TensorSource, TensorSpec, blocks
from components.errors import CheckpointError, ConfigError, listed
from components.fusion.finite import refuse_not_finite
from components.fusion.kernels import MergeKernel, knows, library
from components.fusion.merge_functions import (
    BLOCK,
    CHUNK,
    KERNEL_BLOCK,
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
class _Desk:
    """What one pass over a tensor works with."""

    out: torch.Tensor
    """A block of the result."""
    rooms: Sequence[torch.Tensor]
    """A block in fp32 for each finetune, the aligned model and one more."""
    draws: Mapping[str, Draws]
    """By finetune, what decides which elements are dropped; none where none are."""
    kernel: MergeKernel | None
    """Where it was compiled: needs rooms for what it does not know alone."""

    def fit(self, numel: int) -> _Desk:
        """With so much room in each place."""
        if self.out.numel() == numel:
            return self
        return replace(self, out=self.out[:numel], rooms=[room[:numel] for room in self.rooms])


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
            raise ConfigError(
                f"the merge does not fit its models: {listed(problems, 12)}; there are {', '.join(finetunes)}, and tensors are "
                f"named like {listed(aligned.names()[1:], 2)}"
            )
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
        return TensorSpec(torch.float32, spec.shape) if spec.dtype.is_floating_point else spec

    def members(self) -> Mapping[str, TensorSource]:
        """The finetunes."""
        return self._finetunes

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the merged tensor, flattened."""
        spec = self.spec(name)
        stop = spec.numel if stop is None else stop
        out = torch.empty(stop - start, dtype=spec.dtype)
        for low, high in blocks(stop - start, CHUNK):
            for at, values in self.slices(name, start + low, start + high):
                out[at - start : at - start + values.numel()] = values
            for source in self._finetunes.values():
                if isinstance(source, SafetensorsSource):  # to ask others is to compute
                    drop(source.read(name, start + low, start + high))
        return out

    def slices(
        self, name: str, start: int, stop: int, dtype: torch.dtype = torch.float32
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Elements [start, stop) piece by piece, rounded to `dtype`: where each begins, and its values, which the next one
        overwrites. Tensors of integers stay what they are."""
        if start == stop:
            return
        name = self.aliases().get(name, name)
        sources = [self._aligned, *self._finetunes.values()]
        kernel = self._kernel(name)
        size = min(BLOCK if kernel is None else KERNEL_BLOCK, stop - start)
        desk = _Desk(
            torch.empty(size, dtype=dtype), [torch.empty(size) for _ in (*sources, None)], self._draws(name), kernel
        )
        for low, high in blocks(stop - start, CHUNK):
            # Once a chunk, not once a block: to ask costs as much as a pass over a small block.
            chunk = [source.read(name, start + low, start + high).split(size) for source in sources]  # type: ignore[no-untyped-call]
            at = start + low
            for stored, *tuned in zip(*chunk, strict=True):
                yield at, self._merged(name, at, stored, tuned, desk.fit(stored.numel()))
                at += stored.numel()

    def unchanged(self, name: str, start: int, stop: int) -> bool:
        """Whether no finetune differs from the aligned model there, bit for bit."""
        return all(same_bits(self._aligned, one, name, start, stop) for one in self._finetunes.values())

    def _merged(
        self, name: str, start: int, stored: torch.Tensor, tuned: Sequence[torch.Tensor], desk: _Desk
    ) -> torch.Tensor:
        if not stored.dtype.is_floating_point:
            for whose, values in zip(self._finetunes, tuned, strict=True):
                if not torch.equal(stored, values):
                    raise CheckpointError(f"{name} holds integers that differ in {whose}; they cannot be merged")
            return stored
        if desk.kernel is not None:
            keys = [draws.keys(start, stored.numel()) for draws in desk.draws.values()] or None
            spare = iter(desk.rooms)
            base, *others = (one if knows(one) else next(spare).copy_(one) for one in (stored, *tuned))
            out = desk.out if knows(desk.out) else next(spare)
            total = desk.kernel(base, others, out, start=start, keys=keys)
            self._require_finite(name, start, total, stored, tuned, out)
            return out if out is desk.out else desk.out.copy_(out)
        room, *rooms = desk.rooms[:-1]
        aligned = widened(stored, room)
        if self._settings.method == "slerp":
            models = [widened(one, room) for one, room in zip(tuned, rooms, strict=True)]
            merged = self._slerp(name, aligned, models)
            # Also those that t gives no part.
            self._require_finite(name, start, sum(float(one.sum()) for one in (aligned, *models)), stored, tuned)
        else:
            deltas = self._deltas(name, start, stored, aligned, tuned, rooms, desk.draws)
            merged, scale = self._merge(name, deltas), self._numbers(name).scale
            if scale != 1:
                merged.mul_(scale)
            merged.add_(aligned)
        self._require_finite(name, start, float(merged.sum()), stored, tuned, merged)
        return merged if desk.out.dtype == torch.float32 else desk.out.copy_(merged)

    def _deltas(
        self,
        name: str,
        start: int,
        stored: torch.Tensor,
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
                drawn = draws[one].at(start, delta.numel())
                delta = dropped(delta, drawn, keep=self._settings.kept_of(one, name))
            deltas.append(delta)
        self._require_finite(name, start, total, stored, tuned)
        return deltas

    def _require_finite(
        self,
        name: str,
        start: int,
        total: float,
        stored: torch.Tensor,
        tuned: Sequence[torch.Tensor],
        merged: torch.Tensor | None = None,
    ) -> None:
        """A sum tells, and hardly costs."""
        if not math.isfinite(total):
            slices = {**dict(zip(self._finetunes, tuned, strict=True)), "aligned": stored}
            refuse_not_finite(
                name, self.spec(name).shape, start, slices if merged is None else {**slices, "fused": merged}
            )

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
        if lib is None or settings.method == "slerp" or not self.spec(name).dtype.is_floating_point:
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
        if self._settings.method not in _DROPS or not self.spec(name).dtype.is_floating_point:
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
