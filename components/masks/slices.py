"""What a mask is made of in memory: slices of tensors, and packs of small ones that are worked on together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from components.checkpoints.source import blocks
from components.masks.concrete import BLOCK, Segment

SMALL = 2 * BLOCK
"""Slices of fewer elements are packed: on them a call costs more than its elements."""


@dataclass
class MaskedSlice:
    """Elements [start, stop) of one tensor. `aligned`, `finetuned`: as stored; `logits`, `weights`: 1-D, what the mask is
    and where the fused weights go (a view of the model's parameter)."""

    name: str
    start: int
    stop: int
    numel: int
    """Of the whole tensor."""
    aligned: torch.Tensor
    finetuned: torch.Tensor
    logits: torch.Tensor
    weights: torch.Tensor
    parameter: torch.nn.Parameter


@dataclass
class UnmaskedSlice:
    """Elements of a tensor without a mask: the finetune's weights, except while the model is the aligned one."""

    name: str
    aligned: torch.Tensor
    finetuned: torch.Tensor
    weights: torch.Tensor


@dataclass
class Pack:
    """Slices that lie one after the other in the same flat tensors; a large slice is a pack of its own, in place."""

    slices: list[MaskedSlice]
    first: int
    """Index of the first slice among all."""
    aligned: torch.Tensor
    finetuned: torch.Tensor
    logits: torch.Tensor
    weights: torch.Tensor

    @property
    def numel(self) -> int:
        """Elements here."""
        return self.logits.numel()

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Ranges that are worked on at once, small enough for a core's cache."""
        return blocks(self.numel, 2 * BLOCK)

    def pair(self, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Both models' elements in the logits' dtype (fp32 as they are read: a narrow delta would lose weights)."""
        dtype = self.logits.dtype
        return self.aligned[low:high].to(dtype), self.finetuned[low:high].to(dtype)

    def split(self, low: int, high: int) -> Iterator[tuple[int, int, int]]:
        """(index among all slices, begin, end) of what [low, high) holds of each slice, counted from `low`."""
        at = 0
        for index, s in enumerate(self.slices, self.first):
            size = s.stop - s.start
            begin, end = max(at, low), min(at + size, high)
            if begin < end:
                yield index, begin - low, end - low
            at += size

    def segments(self, low: int, high: int) -> list[Segment]:
        """The positions that [low, high) holds, as noise is counted."""
        found: list[Segment] = []
        at = 0
        for s in self.slices:
            size = s.stop - s.start
            begin, end = max(at, low), min(at + size, high)
            if begin < end:
                found.append((s.name, s.start + begin - at, s.start + end - at))
            at += size
        return found

    def gradient(self) -> torch.Tensor:
        """∂L/∂w from the parameters' `.grad`; zero for a parameter that the loss does not reach."""
        found = [
            torch.zeros_like(s.weights) if s.parameter.grad is None else s.parameter.grad.view(-1) for s in self.slices
        ]
        return found[0] if len(found) == 1 else torch.cat(found)


def pack(slices: Sequence[MaskedSlice]) -> list[Pack]:
    """All slices in their order, runs of small ones moved into shared memory (their parameters' too)."""
    packs: list[Pack] = []
    run: list[MaskedSlice] = []
    for i, s in enumerate(slices):
        run.append(s)
        following = slices[i + 1] if i + 1 < len(slices) else None
        if following is None or not (_small(s) and _small(following)):
            packs.append(_pack(run, i + 1 - len(run)))
            run = []
    return packs


def _small(s: MaskedSlice) -> bool:
    return s.stop - s.start < SMALL


def _pack(slices: list[MaskedSlice], first: int) -> Pack:
    if len(slices) == 1:
        [s] = slices
        return Pack(slices, first, s.aligned, s.finetuned, s.logits, s.weights)
    dtype = slices[0].logits.dtype
    packed = Pack(
        slices,
        first,
        aligned=torch.cat([s.aligned.to(dtype) for s in slices]),
        finetuned=torch.cat([s.finetuned.to(dtype) for s in slices]),
        logits=torch.cat([s.logits for s in slices]),
        weights=torch.cat([s.weights for s in slices]),
    )
    at = 0
    for s in slices:
        size = s.stop - s.start
        s.logits, s.weights = packed.logits[at : at + size], packed.weights[at : at + size]
        s.parameter.data = s.weights.view(s.parameter.shape)
        at += size
    return packed
