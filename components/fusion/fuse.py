"""Fuse two checkpoints into a complete model directory: read, compute and write in cache-sized blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from components.checkpoints.adapter_files import copy_adapter_files
from components.checkpoints.adapter_parsing import ADAPTER_WEIGHTS
from components.checkpoints.compare import require_compatible
from components.checkpoints.dtypes import F32, DType, as_bits, promoted
from components.checkpoints.factors import FactorSource
from components.checkpoints.journal import Part
from components.checkpoints.reference import Checkpoint
from components.checkpoints.source import TensorSpec
from components.checkpoints.stream import Elsewhere, Put, Work, Written, stream, write_parts
from components.checkpoints.writer import copy_side_files
from components.fusion.fused import BLOCK, FusedBlock, FusedSource, one_thread
from components.fusion.inputs import Mask
from components.fusion.methods import method_named
from components.fusion.settings import FusionSettings
from components.storage import Progress

FuseElsewhere = Callable[[FusionSettings, Sequence[Part]], Iterator[tuple[Part, dict[str, Any]]]]
"""Has parts made by others with `fuse_parts` and these settings, which leave nothing to be decided."""


@dataclass
class TensorCounts:
    """Elements of one tensor. An element is compared as it stands in the output, bit for bit."""

    numel: int
    dtype: str
    differing: int = 0
    """Aligned and finetune differ (once cast to the output's dtype)."""
    from_aligned: int = 0
    """Of those, how many came out exactly as aligned."""
    from_finetune: int = 0
    """Of those, how many came out exactly as the finetune."""

    def add(self, block: FusedBlock) -> None:
        """Count one slice."""
        dtype = block.values.dtype
        # numpy compares integers five times as fast as torch does
        out, aligned, finetune = (
            as_bits(t.to(dtype).contiguous()) for t in (block.values, block.aligned, block.finetune)
        )
        differs = aligned != finetune
        self.differing += int(np.count_nonzero(differs))
        self.from_aligned += int(np.count_nonzero((out == aligned) & differs))
        self.from_finetune += int(np.count_nonzero((out == finetune) & differs))

    def include(self, note: Mapping[str, int]) -> None:
        """Add what was counted of one part."""
        self.differing += note["differing"]
        self.from_aligned += note["from_aligned"]
        self.from_finetune += note["from_finetune"]

    def note(self) -> dict[str, int]:
        """What `include` takes."""
        return {"differing": self.differing, "from_aligned": self.from_aligned, "from_finetune": self.from_finetune}


@dataclass
class FuseReport:
    """What a fusion did, for its record."""

    method: str
    paper: str
    settings: dict[str, Any]
    output_dtypes: list[str]
    tensors: dict[str, TensorCounts]
    numel: int = 0
    differing: int = 0
    from_aligned: int = 0
    from_finetune: int = 0
    rounded_to_binary: float | None = None
    """Of the elements in which the two models differ, the share that came out as exactly one of them. For a soft mask
    this is what rounding to the output dtype left binary: all of it where a bf16 delta is one unit in the last
    place."""
    copied_tensors: list[str] = field(default_factory=list)
    """Tensors that are equal in both models: any mask leaves them as they are."""
    unmasked_tensors: list[str] = field(default_factory=list)
    """Tensors that the mask leaves out; they are the finetune's."""
    files: list[str] = field(default_factory=list)
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    gb_per_s: float = 0.0
    """(bytes read + bytes written) / seconds / 1e9."""
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def fuse_checkpoint(
    *,
    aligned: Checkpoint,
    finetune: Checkpoint,
    settings: FusionSettings,
    out_dir: Path,
    mask: Mask | None = None,
    unaligned: Checkpoint | None = None,
    safe: Checkpoint | None = None,
    block: int = BLOCK,
    processes: int = 1,
    elsewhere: FuseElsewhere | None = None,
    progress: Progress | None = None,
) -> FuseReport:
    """Write the fused model: weights, config, generation config, tokenizer, chat template; ready for `from_pretrained`. Of two
    adapters' factors the result is an adapter, ready for PEFT.

    Memory is a few blocks whatever the model's size (for `safe_lora`, `safe_merge` and `lox` a few of its largest matrix); the
    result does not depend on `block`. The tokenizer and configs are the finetune's (it is the finetune that goes back into
    service), the aligned model's where it has none.

    Args:
        aligned, finetune, unaligned, safe: opened checkpoints; `unaligned` is for RESTA, Safe LoRA, SafeMERGE and LoX,
            `safe` for SafeMERGE.
        settings: method and numbers.
        out_dir: an attempt's directory without weights; publishing it is the caller's.
        mask: the trained mask, for `masked` and `random_mask`.
        block: elements worked on at once.
        processes: how many write side by side; the bytes are the same.
        elsewhere: has the parts made by others with `fuse_parts`, in place of `processes` here.
        progress: called about twice a second with {"tensor", "bytes", "total_bytes", "gb_per_s", "seconds_left"}.

    Raises CheckpointError (all misfits at once; the tensor and index of a NaN), ConfigError (input of the method
    missing), StorageError (disk full or not writable).
    """
    source = open_fused(
        aligned=aligned, finetune=finetune, settings=settings, mask=mask, unaligned=unaligned, safe=safe
    )
    settled = source.settled(processes)  # what takes a look at all tensors, before there are several processes
    counts, written = _write(
        source, out_dir, block=block, processes=processes, progress=progress,
        elsewhere=functools.partial(elsewhere, settled) if elsewhere else None,
    )  # fmt: skip
    files = list(written.files)
    if isinstance(aligned.source, FactorSource):
        files += copy_adapter_files(aligned, out_dir, tokenizer_dir=finetune.tokenizer_dir)
    else:
        files += _side_files(source, finetune, aligned, out_dir)
    report = FuseReport(
        method=source.method.name,
        paper=source.method.paper,
        settings=settings.model_dump(mode="json"),
        output_dtypes=sorted({c.dtype for c in counts.values()}),
        tensors=counts,
        notes=[*aligned.notes, *finetune.notes],
        files=files,
        bytes_read=written.bytes_read,
        bytes_written=written.bytes_written,
        seconds=written.seconds,
        gb_per_s=written.gb_per_s,
    )
    return _summed(report, source)


def fuse_parts(
    parts: Sequence[Part], source: FusedSource, out_dir: Path, *, block: int = BLOCK
) -> list[tuple[Part, dict[str, Any]]]:
    """Some parts of a model that another process writes with `fuse_checkpoint`: `open_fused` by the settings that it gave."""
    return write_parts(out_dir, _specs(source), _counting(source, block), parts, **_options(source))


def open_fused(
    *,
    aligned: Checkpoint,
    finetune: Checkpoint,
    settings: FusionSettings,
    mask: Mask | None = None,
    unaligned: Checkpoint | None = None,
    safe: Checkpoint | None = None,
) -> FusedSource:
    """The fused model of opened checkpoints, without those that its method has no use for. Raises as `fuse_checkpoint`."""
    method = method_named(settings.method)
    used_unaligned = unaligned if method.needs_unaligned else None
    used_safe = safe if method.takes_safe else None
    for other in (finetune, used_unaligned, used_safe):
        if other is not None:
            require_compatible(aligned, other)
    return FusedSource(
        aligned=aligned.source,
        finetune=finetune.source,
        settings=settings,
        mask=mask,
        unaligned=used_unaligned.source if used_unaligned else None,
        safe=used_safe.source if used_safe else None,
    )


def _specs(source: FusedSource) -> dict[str, TensorSpec]:
    return {name: source.spec(name) for name in source.names()}


def _options(source: FusedSource) -> dict[str, Any]:
    """The writer's."""
    if isinstance(source.aligned, FactorSource):
        return {"single_file": ADAPTER_WEIGHTS}
    return {"max_shard_bytes": source.settings.max_shard_bytes}


def _counting(source: FusedSource, block: int) -> Work:
    """Makes a part, counting as it is made."""

    def work(name: str, start: int, stop: int, put: Put) -> dict[str, Any]:
        part = TensorCounts(stop - start, source.spec(name).kind.name)
        with one_thread():
            for b in source.blocks(name, block, start, stop):
                assert b.values.dtype == source.spec(name).dtype, (name, b.values.dtype)
                part.add(b)
                put(b.start, as_bits(b.values.contiguous()))
        return part.note()

    return work


def _write(
    source: FusedSource,
    out_dir: Path,
    *,
    block: int,
    processes: int,
    elsewhere: Elsewhere | None,
    progress: Progress | None,
) -> tuple[dict[str, TensorCounts], Written]:
    """Write the weights; what was counted by tensor."""
    counts = {n: TensorCounts(source.spec(n).numel, source.spec(n).kind.name) for n in source.names()}
    inputs = [one for one in (source.aligned, source.finetune, source.unaligned, source.safe) if one is not None]
    written = stream(
        out_dir,
        _specs(source),
        _counting(source, block),
        processes=processes,
        whole=source.method.whole_tensors,
        read=lambda name: sum(i.spec(name).kind.itemsize for i in inputs),
        elsewhere=elsewhere,
        progress=progress,
        **_options(source),
    )
    for (name, _, _), note in written.notes.items():
        counts[name].include(note)
    return counts, written


def widest(kinds: Iterable[DType]) -> DType:
    """The floating dtype that holds all of them: what a loader must use to lose no bit."""
    floats = [kind for kind in kinds if kind.is_float]
    return functools.reduce(promoted, floats) if floats else F32


def _side_files(source: FusedSource, finetune: Checkpoint, aligned: Checkpoint, out_dir: Path) -> list[str]:
    return copy_side_files(
        model_dir=finetune.model_dir,
        tokenizer_dir=finetune.tokenizer_dir,
        out_dir=out_dir,
        dtype=widest(source.spec(n).kind for n in source.names()),
        fallback_dir=aligned.model_dir,
    )


def _summed(report: FuseReport, source: FusedSource) -> FuseReport:
    """Whole-model sums, and in words what they mean."""
    counts = report.tensors.values()
    report.numel = sum(c.numel for c in counts)
    report.differing = sum(c.differing for c in counts)
    report.from_aligned = sum(c.from_aligned for c in counts)
    report.from_finetune = sum(c.from_finetune for c in counts)
    report.copied_tensors = sorted(n for n, c in report.tensors.items() if c.differing == 0)
    if source.mask is not None:
        report.unmasked_tensors = [n for n in source.mask.names() if not source.mask.is_masked(n)]
    if report.differing:
        report.rounded_to_binary = (report.from_aligned + report.from_finetune) / report.differing
    share = report.rounded_to_binary
    if source.settings.form == "soft" and share is not None and share > 0.01:
        report.notes.append(
            f"{share:.1%} of the differing weights came out exactly as aligned or as finetuned: "
            f"their deltas are too small for {'/'.join(report.output_dtypes)} to hold a soft mask"
        )
    return report
