"""Safety restored by what alignment changed: Safe LoRA, SafeMERGE and LoX, on whole matrices.

Shapes: O rows and I columns of a stored weight; A = aligned, F = finetune, U = unaligned, all [O, I]; Δ = F − A is what
finetuning changed, V = A − U what alignment did, C = V Vᵀ / ‖V‖_F the published projector on the latter's columns, [O, O].

As published, C is no projection in the strict sense: it is divided by ‖V‖_F and not by its square, so that C Δ grows with V.
Its cosine with Δ does not. A weight is taken to be stored as [out, in]; where a LoRA finetune says that it is stored the other
way round (embeddings, GPT-2's Conv1D), V Vᵀ is taken over the outputs there too.

C is [O, O]; it is built only where that is the smaller side. Else V (Vᵀ Δ) goes by an [I, I] matrix, and where the finetune is
a LoRA of rank r over the aligned model, Δ = s B A and (V (Vᵀ B)) A goes by r columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from components.checkpoints.adapter_parsing import LoraPair
from components.checkpoints.adapters import LoraSource
from components.checkpoints.dtypes import stretch_of
from components.checkpoints.source import TensorSource, blocks, stretch_from
from components.errors import CheckpointError
from components.fusion.finite import refuse_not_finite
from components.fusion.low_rank import best_of_rank
from components.fusion.sums import dot
from components.workers import spread

_TILE = 1 << 20
"""Elements of the rows that are worked on at once. Tiles begin at fixed rows, so no value depends on the slice asked for."""


@dataclass(frozen=True)
class Lineage:
    """The models that a finetune comes from, and the finetune."""

    aligned: TensorSource
    finetune: TensorSource
    unaligned: TensorSource

    def delta(self, name: str, low: int, high: int) -> torch.Tensor:
        """Rows [low, high) of Δ, fp32."""
        return _difference(self.finetune, self.aligned, name, low, high)

    def direction(self, name: str, low: int, high: int) -> torch.Tensor:
        """Rows [low, high) of V, fp32."""
        return _difference(self.aligned, self.unaligned, name, low, high)


class RowProduct:
    """L M [O, I] that is multiplied out as it is read, a tile of rows at a time; the last tile is kept, since blocks are read
    in order.

    Args:
        left: gives rows [low, high) of L, [high − low, K] fp32.
        right: M, [K, I] fp32.
        rows: O.
    """

    def __init__(self, left: Callable[[int, int], torch.Tensor], right: torch.Tensor, rows: int) -> None:
        self._left, self._right, self._rows = left, right, rows
        self._tile: tuple[int, torch.Tensor] | None = None

    def tile(self, low: int, high: int) -> torch.Tensor:
        """Rows [low, high), a tile of `tiles`."""
        return self._left(low, high) @ self._right

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened product."""
        columns = self._right.shape[1]
        height = _height(columns)
        out = torch.empty(stop - start)
        at = start
        while at < stop:
            index = at // (height * columns)
            if self._tile is None or self._tile[0] != index:
                low = index * height
                self._tile = (index, self.tile(low, min(self._rows, low + height)).reshape(-1))
            first = index * height * columns
            end = min(stop, first + self._tile[1].numel())
            out[at - start : end - start] = self._tile[1][at - first : end - first]
            at = end
        return out


@dataclass(frozen=True)
class Projection:
    """C Δ of one matrix."""

    product: RowProduct
    cosine: float
    """Between C Δ and Δ; 0 where C Δ is zero."""


def safe_lora(aligned: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
    """A + C Δ, for the matrices that are restored: Safe LoRA, https://arxiv.org/abs/2405.16833. Slices, fp32."""
    return aligned.float() + projected


def safe_merge(finetune: torch.Tensor, safe: torch.Tensor, *, share: float) -> torch.Tensor:
    """(1 − share) F + share S, that is A + (1 − share) Δ + share Δ_safe, for the matrices that are restored: SafeMERGE,
    https://arxiv.org/abs/2503.17239. Slices, fp32; exactly F at 0 and S at 1."""
    return torch.lerp(finetune.float(), safe.float(), share)


def lox(start: torch.Tensor, low_rank: torch.Tensor, *, gamma: float) -> torch.Tensor:
    """F + γ SVD_k(V): LoX, https://arxiv.org/abs/2506.15606, which starts from the aligned model (F = A) before it is
    finetuned; here from whatever is given as the finetune. Slices, fp32."""
    return low_rank.mul(gamma).add_(start.float())


def is_matrix(source: TensorSource, name: str) -> bool:
    """These methods are about matrices; vectors and stacks of experts keep the finetune."""
    spec = source.spec(name)
    return spec.dtype.is_floating_point and len(spec.shape) == 2 and spec.numel > 0


def projection(lineage: Lineage, name: str) -> Projection | None:
    """C Δ of a matrix and how it lies to Δ; None where V or Δ is zero and there is nothing to compare.

    Works in fp32 with sums over tiles in fp64. Memory, in fp32: of [O, I] with O > I two matrices [I, I] in fp64; with O ≤ I
    two [O, O] in fp64 beside V, and later Δ, whole; for a LoRA its factors alone. Raises CheckpointError naming a weight that
    is not finite.
    """
    size = math.sqrt(_square(lineage, name, lineage.direction))
    change = _square(lineage, name, lineage.delta)
    if not size or not change:
        return None
    rows, columns = lineage.aligned.spec(name).shape
    factors = _factors(lineage, name)
    if factors is not None:
        product = _by_factors(lineage, name, *factors, size)
    elif rows > columns:
        product = _by_columns(lineage, name, size)
    else:
        product = _by_rows(lineage, name, size)
    along = square = 0.0
    for low, high in tiles(rows, columns):
        projected = product.tile(low, high)
        along += dot(projected, lineage.delta(name, low, high))
        square += dot(projected, projected)
    if not math.isfinite(along + square):
        raise CheckpointError(
            f"{name}: its projection on what alignment changed overflows; the weights are out of range"
        )
    cosine = along / math.sqrt(change * square) if square else 0.0
    return Projection(product, min(1.0, max(-1.0, cosine)))


def cosines(lineage: Lineage, *, processes: int = 1) -> dict[str, float]:
    """Matrix -> cosine between C Δ and Δ, for every matrix that has one. Costs as much as the restoration itself."""

    def cosine(name: str) -> float | None:
        projected = projection(lineage, name)
        return None if projected is None else projected.cosine

    matrices = [name for name in lineage.aligned.names() if is_matrix(lineage.aligned, name)]
    found = {name: value for name, value in spread(cosine, matrices, processes=processes) if value is not None}
    return dict(sorted(found.items()))


def lowest_cosine(lineage: Lineage, count: int, *, processes: int = 1) -> float:
    """A cosine up to which `count` matrices lie (more, where several have the very same; all, where there are no more). It is
    half way to the next, because a cosine may come out otherwise by its last bits where it is taken again."""
    found = sorted(cosines(lineage, processes=processes).values())
    return (found[count - 1] + found[count]) / 2 if count < len(found) else 1.0


def low_rank_direction(lineage: Lineage, name: str, rank: int) -> RowProduct | None:
    """SVD_k(V) of a matrix, the nearest of rank k (at most its shorter side); None where V is zero. Memory as `best_of_rank`:
    the matrix in fp32 and twice in fp64. Raises CheckpointError naming a weight that is not finite."""
    if not _square(lineage, name, lineage.direction):
        return None
    rows, columns = lineage.aligned.spec(name).shape
    b, a = best_of_rank(lineage.direction(name, 0, rows), min(rank, rows, columns))
    return RowProduct(lambda low, high: b[low:high], a, rows)


def tiles(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that are worked on at once."""
    return blocks(rows, _height(columns))


def _height(columns: int) -> int:
    return max(1, _TILE // columns)


def _difference(one: TensorSource, other: TensorSource, name: str, low: int, high: int) -> torch.Tensor:
    columns = one.spec(name).shape[1]
    a, b = (source.read(name, low * columns, high * columns).float() for source in (one, other))
    return (a - b).view(high - low, columns)


def _square(lineage: Lineage, name: str, rows_of: Callable[[str, int, int], torch.Tensor]) -> float:
    """‖V‖² or ‖Δ‖², of finite weights."""
    shape = lineage.aligned.spec(name).shape
    total = 0.0
    for low, high in tiles(*shape):
        difference = rows_of(name, low, high)
        part = dot(difference, difference)
        if not math.isfinite(part):
            models = {"finetune": lineage.finetune, "aligned": lineage.aligned, "unaligned": lineage.unaligned}
            start, stop = low * shape[1], high * shape[1]
            slices = {whose: stretch_from(m, name, start, stop) for whose, m in models.items()}
            refuse_not_finite(name, shape, start, slices)
            refuse_not_finite(name, shape, start, {"difference to the aligned": stretch_of(difference.reshape(-1))})
        total += part
    return total


def _by_columns(lineage: Lineage, name: str, size: float) -> RowProduct:
    """V (Vᵀ Δ) by way of [I, I]."""
    rows, columns = lineage.aligned.spec(name).shape
    inner = torch.zeros(columns, columns, dtype=torch.float64)
    for low, high in tiles(rows, columns):
        inner += lineage.direction(name, low, high).T @ lineage.delta(name, low, high)
    return RowProduct(lambda low, high: lineage.direction(name, low, high), (inner / size).float(), rows)


def _by_rows(lineage: Lineage, name: str, size: float) -> RowProduct:
    """(V Vᵀ) Δ by way of [O, O]."""
    rows, columns = lineage.aligned.spec(name).shape
    direction = lineage.direction(name, 0, rows)
    projector = torch.zeros(rows, rows, dtype=torch.float64)
    for low, high in blocks(columns, _height(rows)):
        part = direction[:, low:high]
        projector += part @ part.T
    left = (projector / size).float()
    return RowProduct(lambda low, high: left[low:high], lineage.delta(name, 0, rows), rows)


def _by_factors(
    lineage: Lineage, name: str, a: torch.Tensor, b: torch.Tensor, pair: LoraPair, size: float
) -> RowProduct:
    """(V (Vᵀ B)) A by way of the rank."""
    rows, columns = lineage.aligned.spec(name).shape
    first = torch.zeros(rows if pair.transposed else columns, pair.rank, dtype=torch.float64)
    second = torch.zeros(len(b), pair.rank, dtype=torch.float64)
    for low, high in tiles(rows, columns):
        stored = lineage.direction(name, low, high)
        if pair.transposed:  # the rows are inputs: Vᵀ B is a tile of its own
            first[low:high] = stored @ b
            second += stored.T @ first[low:high].float()
        else:
            first += stored.T @ b[low:high]
    if pair.transposed:
        right = (second * (pair.scaling / size)).float().T.contiguous()
        return RowProduct(lambda low, high: a[:, low:high].T, right, rows)
    narrow = first.float()
    for low, high in tiles(rows, columns):
        second[low:high] = lineage.direction(name, low, high) @ narrow
    left = (second * (pair.scaling / size)).float()
    return RowProduct(lambda low, high: left[low:high], a, rows)


def _factors(lineage: Lineage, name: str) -> tuple[torch.Tensor, torch.Tensor, LoraPair] | None:
    """A [r, in] and B [out, r] in fp32 of a finetune that is a LoRA over the aligned model and adapts this matrix."""
    source = lineage.finetune
    pair = source.pairs().get(name) if isinstance(source, LoraSource) else None
    if pair is None or not isinstance(source, LoraSource) or pair.magnitude is not None:
        return None  # DoRA rescales the base too
    if not _equal(source.base, lineage.aligned, name):
        return None
    a, b = (
        source.weights.read(key, 0, spec.numel).reshape(spec.shape).float()
        for key, spec in ((key, source.weights.header.tensors[key].spec) for key in (pair.a, pair.b))
    )
    return a, b, pair


def _equal(one: TensorSource, other: TensorSource, name: str) -> bool:
    """A LoRA over another base than the aligned model changed more than its factors say."""
    if one is other:
        return True
    return all(
        torch.equal(one.read(name, start, stop), other.read(name, start, stop))
        for start, stop in blocks(one.spec(name).numel, _TILE)
    )
