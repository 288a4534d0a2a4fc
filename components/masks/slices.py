"""What a mask is made of in memory: slices of tensors, and packs of small ones that are worked on together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from components.checkpoints.adapters import LoraSource
from components.checkpoints.source import TensorSource, blocks
from components.mapped import drop, over_file
from components.masks.concrete import BLOCK, Segment
from components.masks.granularity import gathered, spread, units
from components.masks.rooms import Room

SMALL = 2 * BLOCK
"""Slices of fewer elements are packed: on them a call costs more than its elements."""
PIECE = 8 * BLOCK
"""Elements that the CPU works on at once: 2 MiB of fp32. Measured on two cores, a mask's part of a step of 106 M elements took
1.4 s; with a quarter of this 2.0 s, for calls then cost as much as elements, and with twice this 1.6 s."""


class Home(Protocol):
    """Where elements [start, stop) of one parameter lie in the model, and where their gradient arrives. How a parameter is
    spread over processes is known to its home alone. `shape` is the whole parameter's; `weights` is 1-D."""

    shape: tuple[int, ...]
    start: int
    stop: int
    weights: torch.Tensor

    def gradient(self) -> torch.Tensor | None:
        """∂L/∂w of these elements, 1-D; None for a parameter that the loss did not reach."""
        ...

    def forget_gradient(self) -> None:
        """Free it."""
        ...

    def move(self, weights: torch.Tensor) -> None:
        """Let the model read these elements from `weights`, which holds their values already."""
        ...


class WholeParameter:
    """A parameter that this process has to itself."""

    def __init__(self, parameter: torch.nn.Parameter) -> None:
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
        self.parameter, self.shape = parameter, tuple(parameter.shape)
        self.start, self.stop = 0, parameter.numel()
        self.weights = parameter.detach().view(-1)
        self._wide: torch.Tensor | None = None
        if narrow(parameter):
            parameter.register_post_accumulate_grad_hook(self._widen)  # type: ignore[no-untyped-call]

    def gradient(self) -> torch.Tensor | None:
        """See Home."""
        found = self.parameter.grad if self._wide is None else self._wide
        return None if found is None else found.view(-1)

    def forget_gradient(self) -> None:
        """See Home."""
        self.parameter.grad = self._wide = None

    def move(self, weights: torch.Tensor) -> None:
        """See Home."""
        self.weights = weights
        self.parameter.data = weights.view(self.shape)

    def _widen(self, parameter: torch.nn.Parameter) -> None:
        """Add one backward's gradient in fp32."""
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad, None
        self._wide = gradient.float() if self._wide is None else self._wide.add_(gradient)


def narrow(parameter: torch.nn.Parameter) -> bool:
    """Whether gradients of several backwards must not be added in the parameter's own type."""
    return parameter.dtype.itemsize < 4


@dataclass(frozen=True)
class FactoredSlice:
    """Elements [start, stop) of a LoRA finetune's tensor, merged anew from base and factors whenever a piece of them is asked
    for: the bits that the source reads, and 4 bytes an element less to hold."""

    source: LoraSource
    name: str
    start: int
    stop: int

    def __getitem__(self, piece: slice) -> torch.Tensor:
        low, high, _ = piece.indices(self.stop - self.start)
        return self.source.read(self.name, self.start + low, self.start + high)


Stored = torch.Tensor | FactoredSlice
"""1-D elements that pieces are taken of."""


def finetuned_elements(source: TensorSource, name: str, home: Home, room: Room) -> Stored:
    """The finetune's elements of a home: as stored, or as factors where those take less room and the CPU works on them (a GPU
    would wait for their products)."""
    size = home.stop - home.start
    if isinstance(source, LoraSource) and room.device.type == "cpu" and size >= SMALL:
        pair = source.pairs().get(name)
        if pair is not None and pair.rank * sum(source.spec(name).shape) < size:
            return FactoredSlice(source, name, home.start, home.stop)
    return room.keep(source.read(name, home.start, home.stop))


@dataclass
class MaskedSlice:
    """The elements of one tensor that are here: none, some or all. `aligned`, `finetuned`: as stored."""

    name: str
    home: Home
    aligned: torch.Tensor
    finetuned: Stored
    logits: torch.Tensor
    """The mask's, 1-D: one for each element here or, with a `unit`, for each unit of the whole tensor, on every rank alike."""
    unit: int | None = None
    """Elements that share a logit."""

    @property
    def weights(self) -> torch.Tensor:
        """Where the fused weights go, 1-D."""
        return self.home.weights

    @property
    def size(self) -> int:
        """Elements here."""
        return self.home.stop - self.home.start

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return torch.Size(self.home.shape).numel()


@dataclass
class UnmaskedSlice:
    """Elements of a tensor without a mask: the finetune's weights, except while the model is the aligned one."""

    name: str
    home: Home
    aligned: torch.Tensor
    finetuned: Stored

    @property
    def weights(self) -> torch.Tensor:
        """Where they go, 1-D."""
        return self.home.weights


@dataclass
class Pack:
    """Slices that lie one after the other in the same flat tensors; a large slice is a pack of its own, in place."""

    slices: list[MaskedSlice]
    first: int
    """Index of the first slice among all."""
    aligned: torch.Tensor
    finetuned: Stored
    logits: torch.Tensor
    weights: torch.Tensor

    @property
    def numel(self) -> int:
        """Elements here."""
        return self.weights.numel()

    @property
    def unit(self) -> int | None:
        """See MaskedSlice. Packs of several slices have none."""
        return self.slices[0].unit

    def units(self, low: int, high: int) -> tuple[int, int]:
        """Where the logits of elements [low, high) lie: [first, last)."""
        start = self.slices[0].home.start
        return (low, high) if self.unit is None else units(self.unit, start + low, start + high)

    def spread(self, values: torch.Tensor, low: int, high: int) -> torch.Tensor:
        """Values of elements [low, high) from those of their logits. Not to be written into."""
        start = self.slices[0].home.start
        return values if self.unit is None else spread(values, self.unit, start + low, start + high)

    def gathered(self, values: torch.Tensor, low: int) -> torch.Tensor:
        """The transpose: what values of elements `low` and on add up to for each of their logits."""
        return values if self.unit is None else gathered(values, self.unit, self.slices[0].home.start + low)

    def pieces(self, *beside: torch.Tensor) -> Iterator[tuple[int, int]]:
        """Ranges that are worked on at once: small enough for a CPU's cache, or large enough for a GPU's launches to pay. What
        lies over files is let go of piece by piece, here and in tensors as long that are worked on `beside`."""
        together = (self.aligned, self.finetuned, self.weights, *([self.logits] if self.unit is None else []), *beside)
        mapped = [one for one in together if isinstance(one, torch.Tensor) and over_file(one)]
        for low, high in blocks(self.numel, PIECE if self.logits.device.type == "cpu" else 32 * PIECE):
            yield low, high
            for tensor in mapped:
                drop(tensor[low:high])

    def logit_pieces(self, *beside: torch.Tensor) -> Iterator[tuple[int, int]]:
        """The same of logits and tensors as long as they are."""
        return self.pieces(*beside) if self.unit is None else blocks(self.logits.numel(), PIECE)

    def pair(self, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Both models' elements in the logits' dtype (fp32 as they are read: a narrow delta would lose weights)."""
        dtype = self.logits.dtype
        return self.aligned[low:high].to(dtype), self.finetuned[low:high].to(dtype)

    def split(self, low: int, high: int) -> Iterator[tuple[int, int, int]]:
        """(index among all slices, begin, end) of what [low, high) holds of each slice, counted from `low`."""
        for index, (_, first, last) in enumerate(self.places(), self.first):
            begin, end = max(first, low), min(last, high)
            if begin < end:
                yield index, begin - low, end - low

    def places(self) -> Iterator[tuple[MaskedSlice, int, int]]:
        """Every slice with where it begins and ends here, those without an element too."""
        at = 0
        for s in self.slices:
            yield s, at, at + s.size
            at += s.size

    def segments(self, low: int, high: int) -> list[Segment]:
        """The positions that [low, high) holds, as noise is counted: of elements, or of units."""
        if self.unit is not None:
            return [(self.slices[0].name, *self.units(low, high))]
        found: list[Segment] = []
        for s, first, last in self.places():
            begin, end = max(first, low) - first, min(last, high) - first
            if begin < end:
                found.append((s.name, s.home.start + begin, s.home.start + end))
        return found

    def gradient(self) -> torch.Tensor:
        """∂L/∂w, where the logits are; zero for a parameter that the loss does not reach."""
        given = [(s, s.home.gradient()) for s in self.slices]
        found = [torch.zeros_like(s.weights) if gradient is None else gradient for s, gradient in given]
        return (found[0] if len(found) == 1 else torch.cat(found)).to(self.logits.device)


def pack(slices: Sequence[MaskedSlice], room: Room) -> list[Pack]:
    """All slices in their order, runs of small ones moved into shared memory (their parameters' too). `room`: the logits'."""
    packs: list[Pack] = []
    run: list[MaskedSlice] = []
    for i, s in enumerate(slices):
        run.append(s)
        following = slices[i + 1] if i + 1 < len(slices) else None
        if following is None or not (_small(s) and _small(following)):
            packs.append(_pack(run, i + 1 - len(run), room))
            run = []
    return packs


def _small(s: MaskedSlice) -> bool:
    return s.size < SMALL and s.unit is None


def _pack(slices: list[MaskedSlice], first: int, room: Room) -> Pack:
    if len(slices) == 1:
        [s] = slices
        return Pack(slices, first, s.aligned, s.finetuned, s.logits, s.weights)
    dtype = slices[0].logits.dtype
    packed = Pack(
        slices,
        first,
        aligned=torch.cat([s.aligned.to(dtype) for s in slices]),
        finetuned=torch.cat([s.finetuned[:].to(dtype) for s in slices]),
        logits=torch.cat([s.logits for s in slices], out=room.zeros(sum(s.size for s in slices), dtype)),
        weights=torch.cat([s.weights for s in slices]),
    )
    at = 0
    for s in slices:
        s.logits = packed.logits[at : at + s.size]
        s.home.move(packed.weights[at : at + s.size])
        at += s.size
    return packed
