"""Fusions of whole state dicts, slow and obvious: what harmonised models are measured against."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from components.checkpoints.common import ALIGNED
from components.checkpoints.harmonize import Harmonized
from components.checkpoints.reference import Checkpoint
from components.fusion.merge_functions import Draws, dropped
from components.fusion.merge_settings import MergeSettings
from tests.components.checkpoints.tiny import MemorySource
from tests.components.fusion.test_merging import literal_ties

EMBEDDING, HEAD, BIAS = "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"
State = dict[str, torch.Tensor]

MERGES = {
    "average": MergeSettings(method="average"),
    "task_arithmetic": MergeSettings(method="task_arithmetic", scale=0.5),
    "ties": MergeSettings(method="ties", scale=0.5, density=0.4),
    "dare": MergeSettings(method="dare", scale=0.5, density=0.7, seed=3),
}


def in_memory(name: str, tensors: State, aliases: Mapping[str, str] | None = None) -> Checkpoint:
    path = Path("/models") / name
    return Checkpoint(path, "full", path, path, MemorySource(tensors, aliases), {"model_type": "llama"}, [])


def everyone(found: Harmonized) -> dict[str, Checkpoint]:
    return {ALIGNED: found.aligned, **found.finetunes}


def filled(states: Mapping[str, State], vocabulary: str, one_sided: str) -> dict[str, State]:
    """The rule of `common.py` as a loop over models, tensors and rows; fp64. A mean is rounded to the widest dtype there is."""
    names = set(states[ALIGNED]) if one_sided == "drop" else set().union(*states.values())
    out: dict[str, State] = {label: {} for label in states}
    for name in names:
        having = {label: state[name] for label, state in states.items() if name in state}
        counts = [len(state[EMBEDDING]) for state in states.values()]
        rows = len(next(iter(having.values())))
        if name in {EMBEDDING, HEAD, BIAS}:
            rows = max(counts) if vocabulary == "pad" else counts[0]
        wide = torch.float32 if len({t.dtype for t in having.values()}) > 1 else next(iter(having.values())).dtype
        for label in states:
            values = []
            for row in range(rows):
                there = {one: tensor[row] for one, tensor in having.items() if row < len(tensor)}
                if ALIGNED in there:
                    values.append(there.get(label, there[ALIGNED]).double())
                else:
                    mean = sum(value.double() for value in there.values()) / len(there)
                    values.append(torch.as_tensor(mean).to(wide).double())
            out[label][name] = torch.stack(values)
    return out


def fused_by(method: str, whole: Mapping[str, State], name: str) -> torch.Tensor:
    """aligned + λ Merge(τ) of whole tensors in fp64, flattened."""
    base = whole[ALIGNED][name].reshape(-1)
    deltas = {one: state[name].reshape(-1) - base for one, state in whole.items() if one != ALIGNED}
    stacked = torch.stack(list(deltas.values()))
    if method == "average":
        return base + stacked.mean(dim=0)
    if method == "ties":
        return base + 0.5 * torch.from_numpy(literal_ties(stacked.numpy(), 0.4, mean=True))
    if method == "dare":
        kept = [
            dropped(d.float(), Draws(seed=3, name=f"{one}/{name}").at(0, d.numel()), keep=0.7).double()
            for one, d in deltas.items()
        ]
        return base + 0.5 * torch.stack(kept).sum(dim=0)
    return base + 0.5 * stacked.sum(dim=0)
