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
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from components.checkpoints.compare import compare_tensors
from components.checkpoints.safetensors import SafetensorsSource
from components.checkpoints.source import TensorSource, TensorSpec, blocks
from components.errors import CheckpointError, ConfigError, listed
from components.fusion.finite import refuse_not_finite
from components.fusion.merge_functions import BLOCK, Angle, angle_between, dropped, slerp, ties, weighted_sum
from components.fusion.merge_settings import MergeSettings, factor_for, merge_problems
from components.fusion.thresholds import kth_largest_magnitude
from components.mapped import QUICK, drop, return_freed_memory
from components.workers import spread

_LET_GO = 8 * BLOCK
"""Elements after which files' pages are let go of: often enough to hold few, seldom enough not to fetch any twice."""
_PEEK = 1024
_TASTE, _SAMPLE = 256, 1 << 16
"""Elements that are read in one place, and in all, to find where a threshold must lie."""

Thresholds = Mapping[str, Mapping[str, float]]
"""finetune -> tensor -> the smallest magnitude that TIES keeps."""


@dataclass(frozen=True)
class _Factors:
    """One tensor's numbers."""

    scale: float
    weights: list[float]
    t: float


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
        name = self.aliases().get(name, name)
        spec = self.spec(name)
        stop = spec.numel if stop is None else stop
        if 0 < stop - start <= BLOCK:
            return self._block(name, start, stop)
        out = torch.empty(stop - start, dtype=spec.dtype)
        for low, high in blocks(stop - start, _LET_GO):
            for at, end in blocks(high - low, BLOCK):
                out[low + at : low + end] = self._block(name, start + low + at, start + low + end)
            for source in self._finetunes.values():
                if isinstance(source, SafetensorsSource):  # to ask others is to compute
                    drop(source.read(name, start + low, start + high))
        return out

    def unchanged(self, name: str, start: int, stop: int) -> bool:
        """Whether no finetune differs from the aligned model there, bit for bit."""
        return all(same_bits(self._aligned, one, name, start, stop) for one in self._finetunes.values())

    def _block(self, name: str, start: int, stop: int) -> torch.Tensor:
        stored = self._aligned.read(name, start, stop)
        if not stored.dtype.is_floating_point:
            for whose, source in self._finetunes.items():
                if not torch.equal(stored, source.read(name, start, stop)):
                    raise CheckpointError(f"{name} holds integers that differ in {whose}; they cannot be merged")
            return stored
        if self._settings.method == "slerp":
            return self._slerp(name, start, stop)
        aligned = stored.float()
        deltas = []
        for source in self._finetunes.values():
            deltas.append(_difference(source.read(name, start, stop), aligned))
        # Looked at before anything is dropped or trimmed away; a sum tells, and hardly costs.
        if not math.isfinite(sum(float(delta.sum()) for delta in deltas)):
            slices = {one: source.read(name, start, stop) for one, source in self._finetunes.items()}
            refuse_not_finite(name, self.spec(name).shape, start, {**slices, "aligned": stored})
        merged, scale = self._merge(name, start, deltas), self._numbers(name).scale
        if scale != 1:
            merged.mul_(scale)
        return merged.add_(aligned)

    def _merge(self, name: str, start: int, deltas: list[torch.Tensor]) -> torch.Tensor:
        settings, names = self._settings, list(self._finetunes)
        if settings.method == "average":
            return weighted_sum(deltas, [1 / len(deltas)] * len(deltas))
        weights = self._numbers(name).weights
        if settings.method in ("dare", "dare_ties"):
            deltas = [
                dropped(delta, keep=settings.kept_of(one, name), seed=settings.seed, name=f"{one}/{name}", start=start)
                for one, delta in zip(names, deltas, strict=True)
            ]
        if settings.method in ("ties", "dare_ties"):
            limits = [self._thresholds[one][name] if settings.method == "ties" else 0.0 for one in names]
            return ties(deltas, weights, limits, mean=settings.aggregate == "mean")
        return weighted_sum(deltas, weights)

    def _slerp(self, name: str, start: int, stop: int) -> torch.Tensor:
        models = list(self._finetunes.values())
        first, second = models if len(models) == 2 else (self._aligned, models[0])
        if name not in self._angles:
            self._angles[name] = angle_between(first, second, name)
        x, y = (source.read(name, start, stop).float() for source in (first, second))
        if not math.isfinite(float(x.sum()) + float(y.sum())):
            slices = {one: source.read(name, start, stop) for one, source in self._finetunes.items()}
            refuse_not_finite(name, self.spec(name).shape, start, {**slices, "aligned": x})
        return slerp(x, y, t=self._numbers(name).t, angle=self._angles[name])

    def _numbers(self, name: str) -> _Factors:
        if name not in self._factors:
            settings = self._settings
            layer = factor_for(settings.layers, name)
            found = [factor_for(settings.weights.get(one, 1.0), name) for one in self._finetunes]
            place = None if settings.t is None else factor_for(settings.t, name)
            self._factors[name] = _Factors(
                scale=settings.scale * (1.0 if layer is None else layer),
                weights=[1.0 if weight is None else weight for weight in found],
                t=0.0 if place is None else place,
            )
        return self._factors[name]


def same_bits(one: TensorSource, other: TensorSource, name: str, start: int, stop: int) -> bool:
    """Whether two sources hold the same there, in the same dtype. A few elements tell mostly that they do not."""
    if one.spec(name).dtype != other.spec(name).dtype:
        return False
    for low, high in (*blocks(min(stop - start, _PEEK), _PEEK), *blocks(stop - start, BLOCK)):
        a, b = (source.read(name, start + low, start + high) for source in (one, other))
        # Bytes, because a NaN is no number's equal and zeros have signs; numpy's, which stop being slow at eight at a time.
        if not np.array_equal(_words(a), _words(b)):
            return False
    return True


def _words(values: torch.Tensor) -> npt.NDArray[np.generic]:
    raw: npt.NDArray[np.generic] = values.view(torch.uint8).numpy()
    return raw.view(np.uint64) if raw.size % 8 == 0 and raw.ctypes.data % 8 == 0 else raw


def _difference(finetuned: torch.Tensor, aligned: torch.Tensor) -> torch.Tensor:
    """τ in memory of its own; `aligned` is fp32."""
    return finetuned - aligned if finetuned.dtype == torch.float32 else finetuned.float().sub_(aligned)


def find_thresholds(
    aligned: TensorSource, finetunes: Mapping[str, TensorSource], settings: MergeSettings, *, processes: int = 1
) -> dict[str, dict[str, float]]:
    """For TIES, the smallest magnitude of each finetune's τ that is kept, per tensor (all the same where the whole model is
    looked at). Reads every model once, block by block; three times where a sample misled."""
    names = [name for name in aligned.names() if aligned.spec(name).dtype.is_floating_point]
    groups = [[name] for name in names] if settings.threshold == "tensor" else [names]
    wanted = [(one, group) for one in finetunes for group in groups if any(aligned.spec(n).numel for n in group)]

    def limit(item: tuple[str, list[str]]) -> float:
        one, group = item
        return_freed_memory(QUICK)
        # One density for a group: by pattern there are only tensors by themselves.
        return _kept_from(aligned, finetunes[one], group, settings.kept_of(one, group[0]))

    # The largest first: no process is left with one of them when all others are done.
    wanted.sort(key=lambda item: -sum(aligned.spec(name).numel for name in item[1]))
    found: dict[str, dict[str, float]] = {one: {} for one in finetunes}
    for (one, group), value in spread(limit, wanted, processes=processes):
        found[one] |= dict.fromkeys(group, value)
    return {one: dict(sorted(limits.items())) for one, limits in found.items()}


def _kept_from(aligned: TensorSource, finetune: TensorSource, names: Sequence[str], share: float) -> float:
    def delta(name: str, start: int, stop: int) -> torch.Tensor:
        return _difference(finetune.read(name, start, stop), aligned.read(name, start, stop).float())

    def deltas() -> Iterator[torch.Tensor]:
        for name in names:
            for start, stop in blocks(aligned.spec(name).numel, BLOCK):
                yield delta(name, start, stop)

    sizes = {name: aligned.spec(name).numel for name in names}
    numel = sum(sizes.values())
    step = max(_TASTE, _TASTE * numel // _SAMPLE)
    tastes = [
        delta(name, start, min(start + _TASTE, size)) for name, size in sizes.items() for start in range(0, size, step)
    ]
    k = max(1, round(share * numel))
    return kth_largest_magnitude(deltas, k, numel=numel, sample=torch.cat(tastes))
