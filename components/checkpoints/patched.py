"""A model whose tensors are put together from several models' as they are read: a few rows, or a tensor, that it lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from components.checkpoints.source import TensorSource, TensorSpec
from components.errors import CheckpointError
from components.mapped import drop


@dataclass(frozen=True)
class Part:
    """Elements of a flattened tensor up to `stop` (from where the part before ends): those of `holders`, each a source and
    its name for the tensor, at the same places; the mean of them where they are several."""

    stop: int
    holders: tuple[tuple[TensorSource, str], ...]


@dataclass(frozen=True)
class Patched:
    """One tensor: its parts in order. A single part of one holder has that holder's dtype."""

    spec: TensorSpec
    parts: tuple[Part, ...]


class PatchedSource:
    """TensorSource of patched tensors.

    A mean is taken in fp32 (or wider, where a holder is) and rounded once, to the tensor's dtype. Integers are not averaged:
    holders must agree.
    """

    def __init__(self, tensors: Mapping[str, Patched], aliases: Mapping[str, str]) -> None:
        self._tensors, self._aliases = dict(tensors), dict(aliases)

    def names(self) -> list[str]:
        """Every tensor, sorted."""
        return sorted(self._tensors)

    def aliases(self) -> Mapping[str, str]:
        """Those of the model, but for what is no longer tied."""
        return dict(self._aliases)

    def spec(self, name: str) -> TensorSpec:
        """The whole tensor's."""
        return self._tensor(name).spec

    def parts(self, name: str) -> Sequence[Part]:
        """Where its elements come from."""
        return self._tensor(name).parts

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop), flattened; as the holder gives them where it is one. Raises CheckpointError for integers
        on which holders differ."""
        tensor = self._tensor(name)
        stop = tensor.spec.numel if stop is None else stop
        if len(tensor.parts) == 1 and len(tensor.parts[0].holders) == 1:
            [(source, theirs)] = tensor.parts[0].holders
            return source.read(theirs, start, stop)
        out = torch.empty(stop - start, dtype=tensor.spec.dtype)
        begin = 0
        for part in tensor.parts:
            low, high = max(start, begin), min(stop, part.stop)
            if low < high:
                _fill(out[low - start : high - start], part, low, high)
            begin = part.stop
        return out

    def _tensor(self, name: str) -> Patched:
        name = self._aliases.get(name, name)
        if name not in self._tensors:
            raise CheckpointError(f"no tensor {name}")
        return self._tensors[name]


def _fill(out: torch.Tensor, part: Part, start: int, stop: int) -> None:
    """Elements [start, stop) of one part."""
    first = _copied(out, part.holders[0], start, stop)
    if len(part.holders) == 1:
        return
    if not out.dtype.is_floating_point:
        for source, name in part.holders[1:]:
            if not torch.equal(first, source.read(name, start, stop).to(out.dtype)):
                raise CheckpointError(
                    f"{name} holds integers that differ from model to model; leave it out (one-sided: drop)"
                )
        return
    total = torch.zeros(stop - start, dtype=torch.promote_types(torch.float32, out.dtype))
    for source, name in part.holders:
        values = source.read(name, start, stop)
        total += values
        drop(values)
    out.copy_(total / len(part.holders))


def _copied(out: torch.Tensor, holder: tuple[TensorSource, str], start: int, stop: int) -> torch.Tensor:
    source, name = holder
    values = source.read(name, start, stop)
    out.copy_(values)
    drop(values)
    return out
