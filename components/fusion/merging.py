"""Several finetunes as one: their task vectors merged slice by slice as they are read, nothing stored.

Notation: a = aligned, τ_t = f_t − a, w_t and λ the factors. A mask m shared by all task vectors goes through every merge here:
Merge({m ⊙ τ_t}) = m ⊙ Merge({τ_t}). Averages, sums and drops that a seed decides are linear by element; TIES elects the sign
of m Σ τ_t, which is that of Σ τ_t, and what it trims is decided by the task vectors as they are (the official code trims after
masking, by which a masked-out weight makes room for one that was too small to count). So masking the merged task vector trains
the shared mask on the merge itself, and the gradient of m is the sum of every task's part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from components.checkpoints.compare import compare_tensors
from components.checkpoints.source import TensorSource, TensorSpec, blocks
from components.errors import CheckpointError, listed
from components.fusion.merge_settings import MergeSettings
from components.fusion.thresholds import kth_largest_magnitude
from components.mapped import drop
from components.masks.concrete import mask_uniforms

BLOCK = 131_072
"""Elements of each finetune worked on at once."""

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


class MergedSource:
    """TensorSource of aligned + λ Merge({τ_t}) in fp32. Tensors of integers must be equal everywhere.

    `thresholds` are those of `find_thresholds`, for TIES. Raises CheckpointError listing all tensors that do not fit.
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
        self._aligned, self._finetunes, self._settings = aligned, finetunes, settings
        self._thresholds = thresholds or {}
        assert settings.method != "ties" or set(self._thresholds) == set(finetunes)

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
        aligned = stored.float()
        deltas = []
        for source in self._finetunes.values():
            finetuned = source.read(name, start, stop)
            deltas.append(finetuned.float() - aligned)
            drop(finetuned)
        return aligned + self._settings.scale * self._merge(name, start, deltas)

    def _merge(self, name: str, start: int, deltas: list[torch.Tensor]) -> torch.Tensor:
        settings, names = self._settings, list(self._finetunes)
        if settings.method == "average":
            return weighted_sum(deltas, [1 / len(deltas)] * len(deltas))
        weights = [settings.weights.get(one, 1.0) for one in names]
        if settings.method == "ties":
            limits = [self._thresholds[one][name] for one in names]
            return ties(deltas, weights, limits, mean=settings.aggregate == "mean")
        if settings.method == "dare":
            keep, seed = settings.kept, settings.seed
            deltas = [
                dropped(delta, keep=keep, seed=seed, name=f"{one}/{name}", start=start)
                for one, delta in zip(names, deltas, strict=True)
            ]
        return weighted_sum(deltas, weights)


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
