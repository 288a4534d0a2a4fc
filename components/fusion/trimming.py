"""How small is too small for TIES: thresholds over whole tensors, or models, from sources that are read block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from components.checkpoints.dtypes import Stretch, as_tensor
from components.checkpoints.source import TensorSource, bits_of, blocks
from components.fusion.kernels import between, known, library
from components.fusion.merge_functions import BLOCK, CHUNK, widened
from components.fusion.merge_settings import MergeSettings
from components.fusion.thresholds import kth_largest_magnitude
from components.mapped import QUICK, return_freed_memory
from components.workers import spread

_KERNEL_BLOCK = 1 << 18
"""Elements for a compiled kernel at once: what it finds is copied while it is in the cache."""
_TASTE, _SAMPLE = 512, 1 << 16
"""Elements that are read in one place, and in all, to find where a threshold must lie."""

Thresholds = Mapping[str, Mapping[str, float]]
"""finetune -> tensor -> the smallest magnitude that TIES keeps."""


def find_thresholds(
    aligned: TensorSource, finetunes: Mapping[str, TensorSource], settings: MergeSettings, *, processes: int = 1
) -> dict[str, dict[str, float]]:
    """For TIES, the smallest magnitude of each finetune's τ that is kept, per tensor (all the same where the whole model is
    looked at). Reads every model once, block by block; three times where a sample misled."""
    names = [name for name in aligned.names() if aligned.spec(name).kind.is_float]
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
    rooms = torch.empty(BLOCK), torch.empty(BLOCK)

    def delta(finetuned: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        first, second = (room[: stored.numel()] for room in rooms)
        return torch.sub(widened(finetuned, second), widened(stored, first), out=second)

    def pairs(size: int) -> Iterator[tuple[Stretch, Stretch]]:
        for name in names:
            kinds = [source.spec(name).kind for source in (finetune, aligned)]
            for start, stop in blocks(aligned.spec(name).numel, CHUNK):
                chunk = [bits_of(source, name, start, stop) for source in (finetune, aligned)]
                for low, high in blocks(stop - start, size):
                    one, other = ((bits[low:high], kind) for bits, kind in zip(chunk, kinds, strict=True))
                    yield one, other

    def deltas() -> Iterator[torch.Tensor]:
        return (delta(as_tensor(*finetuned), as_tensor(*stored)) for finetuned, stored in pairs(BLOCK))

    def bands(low: np.float32, high: np.float32) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        assert lib is not None
        room = np.empty(_KERNEL_BLOCK, np.float32)
        for finetuned, stored in pairs(_KERNEL_BLOCK):
            above, inside = between(lib, known(*stored), known(*finetuned), low, high, room)
            yield above, inside.copy()

    sizes = {name: aligned.spec(name).numel for name in names}
    numel = sum(sizes.values())
    step = max(_TASTE, _TASTE * numel // _SAMPLE)
    tastes = [
        delta(*(source.read(name, start, min(start + _TASTE, size)) for source in (finetune, aligned))).clone()
        for name, size in sizes.items()
        for start in range(0, size, step)
    ]
    k = max(1, round(share * numel))
    lib = library()
    return kth_largest_magnitude(deltas, k, numel=numel, sample=torch.cat(tastes), bands=bands if lib else None)
