"""The fused model as a TensorSource: any slice is computed when it is read. Writing a checkpoint and trying a setting
in memory are then the same thing."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from components.checkpoints.compare import compare_tensors, same_bits
from components.checkpoints.dtypes import (
    BF16,
    F16,
    F32,
    Bits,
    DType,
    all_finite,
    as_bits,
    as_tensor,
    named,
    promoted,
    stretch_of,
)
from components.checkpoints.source import TensorSource, TensorSpec, blocks, stretch_from
from components.errors import CheckpointError, ConfigError, listed
from components.fusion.finite import refuse_not_finite
from components.fusion.inputs import Block, Kernel, Mask, TensorInputs
from components.fusion.merge_settings import idle_patterns
from components.fusion.merging import MergedSource
from components.fusion.methods import method_named
from components.fusion.restoration import Lineage
from components.fusion.rounding import to_bf16_stochastic
from components.fusion.settings import FusionSettings

BLOCK = 262_144
"""Elements worked on at once: small enough for the cache, large enough to hide the call overhead (measured)."""
_LANES = 64
"""Slices are widened to multiples of this before anything is computed. The last few elements of an odd slice would go
through torch's scalar loops, whose exp and fused multiply-add round differently from the vector ones: a weight's bits
would then depend on how it was read."""


@dataclass(frozen=True)
class FusedBlock:
    """Fused slice [start, stop) in the output dtype, with the slices that it was made from."""

    start: int
    stop: int
    values: torch.Tensor
    aligned: torch.Tensor
    finetune: torch.Tensor


class FusedSource:
    """TensorSource of `settings.method` applied to aligned and finetune.

    Args:
        aligned, finetune: equal names and shapes; dtypes may differ.
        settings: the method and its numbers.
        mask: for `masked` (and for the density of `random_mask`).
        unaligned: for `resta`, `safe_lora`, `safe_merge` and `lox`.
        safe: a finetune that was made safe, for `safe_merge`.
        stored: sources whose widest dtype is the output's (default: aligned and finetune), tensor by tensor.

    Methods that look at whole matrices hold one tensor's at a time: read their tensors one after the other. Their products are
    made by the BLAS at hand, whose last bits may depend on its number of threads (`one_thread`).

    Raises ConfigError when the method lacks an input, CheckpointError listing all tensors that do not fit.
    """

    def __init__(
        self,
        *,
        aligned: TensorSource,
        finetune: TensorSource,
        settings: FusionSettings,
        mask: Mask | None = None,
        unaligned: TensorSource | None = None,
        safe: TensorSource | None = None,
        stored: Sequence[TensorSource] = (),
    ) -> None:
        self.stored = stored
        self.aligned, self.finetune, self.unaligned, self.safe = aligned, finetune, unaligned, safe
        self.settings = settings
        self.mask = mask
        self.method = method_named(settings.method)
        _require_inputs(self)
        self._kernels: dict[str, Kernel] = {}
        self._settled: FusionSettings | None = None

    def names(self) -> list[str]:
        """The aligned model's tensors."""
        return self.aligned.names()

    def aliases(self) -> Mapping[str, str]:
        """The aligned model's aliases."""
        return self.aligned.aliases()

    def spec(self, name: str) -> TensorSpec:
        """The wider of the two dtypes, or the one that the settings ask for (tensors of integers keep theirs)."""
        a, f = self.aligned.spec(name), self.finetune.spec(name)
        kind = promoted(a.kind, f.kind)
        if self.stored and kind.is_float:
            kind = functools.reduce(promoted, (one.spec(name).kind for one in self.stored))
        if self.settings.output_dtype is not None and kind.is_float:
            kind = named(self.settings.output_dtype)
        return TensorSpec(kind, a.shape)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the fused tensor, flattened."""
        stop = self.spec(name).numel if stop is None else stop
        parts = [self.block(name, s + start, e + start).values for s, e in blocks(stop - start, BLOCK)]
        if not parts:
            return torch.empty(0, dtype=self.spec(name).dtype)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def blocks(self, name: str, size: int = BLOCK, start: int = 0, stop: int | None = None) -> Iterator[FusedBlock]:
        """Elements [start, stop) of a tensor (all of them) in slices of at most `size`."""
        stop = self.spec(name).numel if stop is None else stop
        for low, high in blocks(stop - start, size):
            yield self.block(name, start + low, start + high)

    @property
    def merge(self) -> MergedSource | None:
        """The merge that this is, when nothing else is done to it."""
        plain = (self.settings.method, self.settings.alpha) == ("interpolation", 1.0)
        return self.finetune if plain and isinstance(self.finetune, MergedSource) else None

    @property
    def compiled(self) -> bool:
        """Whether it can be made without torch."""
        return self.merge is not None and self.merge.compiled and self.settings.rounding == "nearest"

    def pieces(self, name: str, size: int, start: int, stop: int) -> Iterator[tuple[int, Bits]]:
        """Elements [start, stop) alone, in slices: where each begins, and its bits. Those of a merge that nothing is done to
        are made in the merge's own pieces."""
        name = self.aliases().get(name, name)
        spec, merge = self.spec(name), self.merge
        if merge is None:
            for block in self.blocks(name, size, start, stop):
                assert block.values.dtype == spec.dtype, (name, block.values.dtype)
                yield block.start, as_bits(block.values.contiguous())
            return
        nearest = self.settings.rounding == "nearest" or not spec.kind.is_float
        for at, merged in merge.pieces(name, start, stop, spec.kind if nearest else F32):
            bits = merged if nearest else as_bits(self._rounded(as_tensor(merged, F32), spec.kind, name, at))
            if spec.kind == F16 and not all_finite(bits, F16):
                refuse_not_finite(name, spec.shape, at, {"fused": (bits, F16)})
            yield at, bits

    def unchanged(self, name: str, start: int, stop: int) -> bool:
        """Whether the finetune is the aligned model there, bit for bit, so that fusing them gives just that."""
        if not self.method.keeps_equal or self.spec(name).kind != self.aligned.spec(name).kind:
            return False
        if isinstance(self.finetune, MergedSource):
            return self.finetune.unchanged(name, start, stop)
        return same_bits(self.aligned, self.finetune, name, start, stop)

    def block(self, name: str, start: int, stop: int) -> FusedBlock:
        """One slice. Raises CheckpointError naming the first weight that is not finite, and whose it is."""
        name = self.aliases().get(name, name)
        spec = self.spec(name)
        low, high = start - start % _LANES, min(spec.numel, stop + -stop % _LANES)
        wide = self._compute(name, spec, low, high)
        if (low, high) == (start, stop):
            return wide
        a, f, values = (t[start - low : stop - low] for t in (wide.aligned, wide.finetune, wide.values))
        return FusedBlock(start, stop, values, a, f)

    def _compute(self, name: str, spec: TensorSpec, start: int, stop: int) -> FusedBlock:
        a, f = self.aligned.read(name, start, stop), self.finetune.read(name, start, stop)
        if not spec.kind.is_float:
            if not torch.equal(a, f):
                raise CheckpointError(f"{name} holds integers that differ between the two models; they cannot be fused")
            return FusedBlock(start, stop, a.to(spec.dtype), a, f)
        fused = self._kernel(name, spec)(Block(start, stop, a, f))
        values = self._rounded(fused, spec.kind, name, start)
        # bf16 reaches as far as fp32, whose sum is twice as fast.
        looked_at = values if spec.kind == F16 else fused
        merged = isinstance(self.finetune, MergedSource)  # it has looked at what it was made of
        if not (_is_finite(looked_at) and (merged or (_is_finite(a) and _is_finite(f)))):
            members: Mapping[str, TensorSource] = {"finetune": self.finetune}
            if isinstance(self.finetune, MergedSource):
                members = self.finetune.members()
            others = {"unaligned": self.unaligned, "safe": self.safe}
            every = {**members, **{role: one for role, one in others.items() if one is not None}}
            slices = {one: stretch_from(source, name, start, stop) for one, source in every.items()}
            slices |= {"aligned": stretch_of(a), "fused": stretch_of(values)}
            refuse_not_finite(name, spec.shape, start, slices)
        return FusedBlock(start, stop, values, a, f)

    def _rounded(self, fused: torch.Tensor, kind: DType, name: str, start: int) -> torch.Tensor:
        if self.settings.rounding == "stochastic" and fused.dtype == torch.float32 and kind == BF16:
            return to_bf16_stochastic(fused, seed=0, name=name, start=start)
        return fused.to(kind.in_torch)

    def settled(self, processes: int = 1) -> FusionSettings:
        """Settings that decide by themselves for each tensor. Where the settings compare tensors (`lowest`), the first call
        looks at them all; a FusedSource that is given the result computes the same and need not look."""
        if self._settled is None:
            self._settled = self.settings
            if self.method.settle is not None and self.unaligned is not None:
                lineage = Lineage(self.aligned, self.finetune, self.unaligned)
                with one_thread():
                    self._settled = self.method.settle(lineage, self.settings, processes)
        return self._settled

    def _kernel(self, name: str, spec: TensorSpec) -> Kernel:
        if name not in self._kernels:
            settings = self.settled()
            if self.method.whole_tensors:
                self._kernels.clear()
            models = {"aligned": self.aligned, "finetune": self.finetune, "safe": self.safe}
            inputs = TensorInputs(name, spec.numel, spec.dtype, self.mask, self.unaligned, **models)
            self._kernels[name] = self.method.prepare(inputs, settings)
        return self._kernels[name]


def _is_finite(values: torch.Tensor) -> bool:
    """One sum tells: NaN and infinities survive it."""
    return math.isfinite(float(values.sum(dtype=torch.float32)))


def apply_to_model(model: torch.nn.Module, source: TensorSource, *, size: int = BLOCK) -> None:
    """Overwrite a loaded model's weights in place with a source's, cast to the model's dtype; nothing is written to
    disk.

    The result is what loading the written checkpoint into the same dtype gives. Raises CheckpointError listing every
    parameter that the source lacks, tensor that the model lacks, and shape that differs.
    """
    parameters = dict(model.named_parameters())
    aliases = source.aliases()
    targets = {aliases.get(name, name): parameter for name, parameter in parameters.items()}
    known = set(source.names())
    problems = [f"the model's {n} has no tensor" for n in sorted(set(targets) - known)]
    buffers = dict(model.named_buffers())
    problems += [f"tensor {n} has no parameter" for n in sorted(known - set(targets) - set(buffers))]
    for name in sorted(set(targets) & known):
        shape = source.spec(name).shape
        if tuple(targets[name].shape) != shape:
            problems.append(f"{name} is {list(targets[name].shape)} in the model and {list(shape)} in the weights")
    if problems:
        raise CheckpointError(f"the weights do not fit the loaded model: {listed(problems)}")
    with torch.no_grad(), one_thread():
        for name, parameter in targets.items():
            assert parameter.is_contiguous(), name
            flat = parameter.view(-1)
            for start, stop in blocks(flat.numel(), size):
                flat[start:stop].copy_(source.read(name, start, stop))


@contextmanager
def one_thread() -> Iterator[None]:
    """Blocks fit one core's cache: threads inside a block cost more than they give, and change where its slices end."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _mask_misfits(mask: Mask, aligned: TensorSource) -> list[str]:
    """The mask must speak of exactly the model's tensors (those left out in training are listed in it, too)."""
    masked, known = set(mask.names()), set(aligned.names())
    problems = [f"{n} is not in the model" for n in sorted(masked - known)]
    problems += [f"{n} is not in the mask" for n in sorted(known - masked) if _is_float(aligned, n)]
    for name in sorted(masked & known):
        if mask.numel(name) != aligned.spec(name).numel:
            problems.append(f"{name} has {mask.numel(name)} elements, {aligned.spec(name).numel} in the model")
    return problems


def _is_float(source: TensorSource, name: str) -> bool:
    return source.spec(name).kind.is_float


def _require_inputs(fused: FusedSource) -> None:
    """All inputs there, all tensors fitting: everything wrong in one error."""
    method, settings = fused.method, fused.settings
    lacking = []
    if method.needs_mask and fused.mask is None:
        lacking.append("a trained mask")
    if method.needs_unaligned and fused.unaligned is None:
        lacking.append("the unaligned model (unaligned)")
    if method.name == "random_mask" and fused.mask is None and settings.density is None:
        lacking.append("a trained mask or a density")
    if lacking:
        raise ConfigError(f"fusion method {method.name} needs {' and '.join(lacking)}")
    idle = idle_patterns(settings.layers, fused.aligned.names())
    if idle:
        names = " and ".join(fused.aligned.names()[1:3])
        raise ConfigError(
            f"fusion: layers: no tensor matches {', '.join(map(repr, idle))}; they are named like {names}"
        )
    problems = [f"finetune: {p}" for p in compare_tensors(fused.aligned, fused.finetune)]
    if method.needs_unaligned and fused.unaligned is not None:
        problems += [f"unaligned: {p}" for p in compare_tensors(fused.aligned, fused.unaligned)]
    if method.takes_safe and fused.safe is not None:
        problems += [f"safe: {p}" for p in compare_tensors(fused.aligned, fused.safe)]
    if fused.mask is not None:
        problems += [f"mask: {p}" for p in _mask_misfits(fused.mask, fused.aligned)]
    if problems:
        raise CheckpointError(f"the inputs of the fusion do not fit the aligned model: {listed(problems, 12)}")
