"""Directions and points as plain numpy in fp64, slow and whole: what the landscape's weights are held to."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from components.landscape.vectors import Direction, RandomDirection
from components.masks.concrete import hash_words
from tests.components.checkpoints.tiny import MemorySource

Tensors = Mapping[str, npt.NDArray[np.float64]]


@functools.cache
def quantiles() -> npt.NDArray[np.int64]:
    """Of the Gaussian at the middles of 65,536 equal shares, in units of 2⁻²⁰."""
    normal = NormalDist()
    return np.array([round(normal.inv_cdf((i + 0.5) / 65_536) * 2**20) for i in range(65_536)])


def noise(seed: int, stream: int, name: str, numel: int) -> npt.NDArray[np.int64]:
    """A whole tensor's: the low half of a hash word is an even position's, the high half the next one's."""
    pieces = hash_words(seed=seed, name=f"landscape/{stream}/{name}", step=0, start=0, stop=(numel + 1) // 2)
    words = np.concatenate([piece.numpy().astype(np.int64) & 0xFFFFFFFF for piece in pieces])
    halves = np.stack([words & 0xFFFF, words >> 16], 1).reshape(-1)[:numel]
    return quantiles()[(halves + 32_768) % 65_536]


def weights(model: Any) -> dict[str, npt.NDArray[np.float64]]:
    """Of a model, exactly."""
    return {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}


def source(model: Any, dtype: torch.dtype | None = None) -> MemorySource:
    """A copy of the model's parameters; tied names are aliases."""
    own = dict(model.named_parameters())
    first = {id(p): name for name, p in own.items()}
    every = model.named_parameters(remove_duplicate=False)
    aliases = {name: first[id(p)] for name, p in every if first[id(p)] != name}
    return MemorySource({n: p.detach().clone().to(dtype or p.dtype) for n, p in own.items()}, aliases)


def dense(origin: Tensors, directions: Sequence[Direction]) -> list[dict[str, npt.NDArray[np.float64]]]:
    """The axes, whole, by tensor."""
    first = {name: _direction(name, w, directions[0]) for name, w in origin.items()}
    if len(directions) == 1:
        return [first]
    second = {name: _direction(name, w, directions[1]) for name, w in origin.items()}
    if isinstance(directions[1], RandomDirection):
        for name, w in origin.items():
            d1, d2 = (_parts(d[name], w, directions[1]) for d in (first, second))
            square = (d1 * d1).sum(1, keepdims=True)
            left = d2 - np.where(square > 0, (d1 * d2).sum(1, keepdims=True) / np.where(square > 0, square, 1), 0) * d1
            own = np.linalg.norm(_parts(w, w, directions[1]), axis=1, keepdims=True)
            size = np.linalg.norm(left, axis=1, keepdims=True)
            there = size > 1e-6 * own
            second[name] = np.where(there, left / np.where(there, size, 1) * own, 0).reshape(w.shape)
    else:
        along = sum(float((first[n] * second[n]).sum()) for n in origin)
        along /= sum(float((first[n] ** 2).sum()) for n in origin)
        second = {n: second[n] - along * first[n] for n in origin}
    return [first, second]


def _direction(name: str, w: npt.NDArray[np.float64], direction: Direction) -> npt.NDArray[np.float64]:
    if not isinstance(direction, RandomDirection):
        return direction.source.read(name).double().numpy().reshape(w.shape) - w
    if "norm" in name.lower():
        return np.zeros_like(w)
    g = noise(direction.seed, direction.stream, name, w.size).astype(np.float64).reshape(w.shape)
    rows, own = _parts(g, w, direction), _parts(w, w, direction)
    sizes = np.linalg.norm(own, axis=1, keepdims=True) / np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows * sizes).reshape(w.shape)


def _parts(values: npt.NDArray[np.float64], w: npt.NDArray[np.float64], direction: RandomDirection) -> Any:
    """[parts that have a length of their own, elements]."""
    return values.reshape(w.shape[0] if direction.norm == "filter" and w.ndim > 1 else 1, -1)


def rounded(values: npt.NDArray[np.float64], dtype: torch.dtype) -> torch.Tensor:
    """fp64 to the nearest fp32, and that to the nearest bf16, ties to even, on the bits."""
    if dtype == torch.float64:
        return torch.from_numpy(values.copy())
    single = values.astype(np.float32)
    if dtype == torch.float32:
        return torch.from_numpy(single)
    bits = single.view(np.uint32).astype(np.uint64)
    short = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return torch.from_numpy(short.view(np.int16)).view(torch.bfloat16)


def assert_weights(model: Any, expected: Mapping[str, torch.Tensor]) -> None:
    """Every element's bits."""
    for name, parameter in model.named_parameters():
        found, wanted = parameter.detach().contiguous(), expected[name].contiguous()
        assert found.dtype == wanted.dtype, name
        assert torch.equal(found.view(torch.uint8), wanted.reshape(found.shape).view(torch.uint8)), name
