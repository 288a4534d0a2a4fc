"""Several finetunes as one: their task vectors merged slice by slice as they are read, nothing stored.

Notation: a = aligned, τ_t = f_t − a, w_t and λ the factors. A mask m shared by all task vectors goes through every merge here:
Merge({m ⊙ τ_t}) = m ⊙ Merge({τ_t}). Averages, sums and drops that a seed decides are linear by element; TIES elects the sign
of m Σ τ_t, which is that of Σ τ_t, and what it trims is decided by the task vectors as they are (the official code trims after
masking, by which a masked-out weight makes room for one that was too small to count). So masking the merged task vector trains
the shared mask on the merge itself, and the gradient of m is the sum of every task's part. Spherical interpolation is no such
merge: under a mask it is what the mask makes of (slerp − a), no more.

Where mergekit (0.1.5, and its repository since) computes otherwise:

* TIES keeps everything that is at least as large as the k-th magnitude, k = round(density · N) and at least 1; mergekit keeps
  exactly int(density · N), of equal magnitudes those that its sort puts first, and fails where that is none.
* Where the task vectors cancel to exactly zero no sign is elected and nothing is added; mergekit takes the positive ones.
* The mean over those that agree divides by the sum of |w_t|; mergekit (`normalize`) by the sum of w_t, which with negative
  weights is another number and may be near zero.
* `dare_ties` averages by default, as TIES does; mergekit's sums (`normalize: false`): `aggregate: sum`.
* DARE's drops are a function of seed, finetune, tensor and position; mergekit's are drawn from torch's generator.
* `weights` are used as given; mergekit's `linear` divides by their sum (`normalize: true`).
* Slerp takes its dot product and norms in fp64 and starts from the nearer end when it falls back to a straight line, so equal
  weights stay equal; a tensor of zeros goes straight too, where mergekit still follows a quarter circle.
* All arithmetic is fp32 whatever the inputs' dtype; mergekit computes in `dtype` or the base's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from components.checkpoints.compare import compare_tensors
from components.checkpoints.source import TensorSource, TensorSpec, blocks
from components.errors import CheckpointError, ConfigError, listed
from components.fusion.merge_settings import MergeSettings, factor_for, merge_problems
from components.fusion.sums import dot
from components.fusion.thresholds import kth_largest_magnitude
from components.mapped import drop
from components.masks.concrete import mask_uniforms

BLOCK = 131_072
"""Elements of each finetune worked on at once."""

_COLINEAR = 0.9995
"""The cosine from which on an arc is taken for a line (mergekit's)."""

Thresholds = Mapping[str, Mapping[str, float]]
"""finetune -> tensor -> the smallest magnitude that TIES keeps."""


def weighted_sum(deltas: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Σ w_t τ_t: task arithmetic, https://arxiv.org/abs/2212.04089; with w_t = 1/T weight averaging."""
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        # In two steps: add_(alpha=…) may or may not fuse them, by where in a vector an element stands.
        total.add_(delta * weight)
    return total


def ties(
    deltas: Sequence[torch.Tensor], weights: Sequence[float], thresholds: Sequence[float], *, mean: bool
) -> torch.Tensor:
    """Trim what is smaller than its threshold, elect each element's sign by the sum, join those that agree:
    TIES, https://arxiv.org/abs/2306.01708. The mean is over the weights of those that agree."""
    kept = [d * (d.abs() >= t) * w for d, w, t in zip(deltas, weights, thresholds, strict=True)]
    elected = weighted_sum(kept, [1.0] * len(kept)).sign()  # one after the other: a stack's sum may add in any order
    total, share = torch.zeros_like(kept[0]), torch.zeros_like(kept[0])
    for one, weight in zip(kept, weights, strict=True):
        agrees = (one.sign() == elected) & (one != 0)
        total.add_(one * agrees)
        share.add_(agrees * abs(weight))
    return total / share.clamp_min(1e-12) if mean else total


def dropped(delta: torch.Tensor, *, keep: float, seed: int, name: str, start: int) -> torch.Tensor:
    """Each element kept with probability `keep` and divided by it: DARE, https://arxiv.org/abs/2311.03099. Which ones is a
    function of (seed, name, position), to 2⁻¹⁶ of the probability."""
    uniforms = mask_uniforms(seed=seed, step=0, segments=[(f"dare/{name}", start, start + delta.numel())])
    return delta * (uniforms < keep) / keep


@dataclass(frozen=True)
class Angle:
    """What spherical interpolation needs of two whole tensors, taken in fp64."""

    dot: float
    first: float
    """Norm of the first."""
    second: float
    """Norm of the second."""

    @property
    def cosine(self) -> float | None:
        """None where one of them is zero (or not finite) and there is no angle."""
        size = self.first * self.second
        return min(1.0, max(-1.0, self.dot / size)) if 0 < size < math.inf else None


def angle_between(first: TensorSource, second: TensorSource, name: str) -> Angle:
    """Reads one tensor of both, block by block. The same number whatever the machine's threads."""
    product = first_square = second_square = 0.0
    for start, stop in blocks(first.spec(name).numel, BLOCK):
        a, b = (source.read(name, start, stop) for source in (first, second))
        product += dot(a, b)
        first_square += dot(a, a)
        second_square += dot(b, b)
    return Angle(product, math.sqrt(first_square), math.sqrt(second_square))


def slerp(first: torch.Tensor, second: torch.Tensor, *, t: float, angle: Angle) -> torch.Tensor:
    """sin((1−t)Ω)/sin Ω · x + sin(tΩ)/sin Ω · y with Ω the angle between the whole tensors, norms left as they are: Shoemake
    1985, https://dl.acm.org/doi/10.1145/325165.325242. Straight from x to y where they are nearly colinear (|cos Ω| > 0.9995,
    as finetunes of one model mostly are) or one is zero. Exactly x at t = 0 and y at t = 1; slices in fp32."""
    if t in (0, 1):
        return second if t else first
    cosine = angle.cosine
    if cosine is None or abs(cosine) > _COLINEAR:
        step = second - first
        return first + step * t if t < 0.5 else second - step * (1 - t)
    omega = math.acos(cosine)
    # In two steps, as in weighted_sum.
    return first * (math.sin((1 - t) * omega) / math.sin(omega)) + second * (math.sin(t * omega) / math.sin(omega))


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
                f"the merge does not fit its models: {listed(problems, 12)}; there are {', '.join(finetunes)}"
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

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the merged tensor, flattened."""
        name = self.aliases().get(name, name)
        spec = self.spec(name)
        stop = spec.numel if stop is None else stop
        out = torch.empty(stop - start, dtype=spec.dtype)
        for low, high in blocks(stop - start, BLOCK):
            out[low:high] = self._block(name, start + low, start + high)
        return out

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
            finetuned = source.read(name, start, stop)
            deltas.append(finetuned.float() - aligned)
            drop(finetuned)
        return aligned + self._numbers(name).scale * self._merge(name, start, deltas)

    def _merge(self, name: str, start: int, deltas: list[torch.Tensor]) -> torch.Tensor:
        settings, names = self._settings, list(self._finetunes)
        if settings.method == "average":
            return weighted_sum(deltas, [1 / len(deltas)] * len(deltas))
        weights = self._numbers(name).weights
        if settings.method in ("dare", "dare_ties"):
            keep, seed = settings.kept, settings.seed
            deltas = [
                dropped(delta, keep=keep, seed=seed, name=f"{one}/{name}", start=start)
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


def find_thresholds(
    aligned: TensorSource, finetunes: Mapping[str, TensorSource], settings: MergeSettings
) -> dict[str, dict[str, float]]:
    """For TIES, the smallest magnitude of each finetune's τ that is kept, per tensor (all the same where the whole model is
    looked at). Reads every model twice, block by block."""
    names = [name for name in aligned.names() if aligned.spec(name).dtype.is_floating_point]
    groups = [[name] for name in names] if settings.threshold == "tensor" else [names]
    found: dict[str, dict[str, float]] = {one: {} for one in finetunes}
    for one, source in finetunes.items():
        for group in groups:
            numel = sum(aligned.spec(name).numel for name in group)
            if numel:
                limit = _kept_from(aligned, source, group, max(1, round(settings.kept * numel)))
                found[one] |= dict.fromkeys(group, limit)
    return found


def _kept_from(aligned: TensorSource, finetune: TensorSource, names: Sequence[str], k: int) -> float:
    def deltas() -> Iterator[torch.Tensor]:
        for name in names:
            for start, stop in blocks(aligned.spec(name).numel, BLOCK):
                yield finetune.read(name, start, stop).float() - aligned.read(name, start, stop).float()

    return kth_largest_magnitude(deltas, k)
