"""Write a model part by part: one after the other or by several processes, going on where a writer was cut off.

Every part is a range of one tensor; which process writes it decides nothing, so that the same bytes come out however many there
are and however often it began anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.checkpoints.dtypes import Bits
from components.checkpoints.journal import Journal, Part
from components.checkpoints.source import TensorSpec, blocks
from components.checkpoints.writer import CheckpointWriter
from components.mapped import QUICK, return_freed_memory
from components.storage import Progress
from components.workers import spread

PART = 1 << 23
"""Elements of a part: 16 MiB of bf16. Small enough to share out a tensor and to lose little, large enough to cost nothing."""
_REPORT_EVERY_S = 0.5

Put = Callable[[int, Bits], None]
"""(start, bits): where in the tensor, and a slice of it."""
Work = Callable[[str, int, int, Put], dict[str, Any]]
"""(tensor, start, stop, put): makes elements [start, stop) and puts all of them; what it returns is kept with the part."""

Elsewhere = Callable[[Sequence[Part]], Iterator[tuple[Part, dict[str, Any]]]]
"""Makes parts where the same files are seen, by `write_parts`, and gives each with what was said of it."""


@dataclass(frozen=True)
class Written:
    """What was written, and how fast."""

    files: list[str]
    notes: dict[Part, dict[str, Any]]
    """What `work` said of each part, those of an earlier writer too."""
    bytes_read: int
    bytes_written: int
    seconds: float
    gb_per_s: float
    """Bytes read and written by this writer, a second, / 1e9."""


def part_size() -> int:
    """Elements of a part: a journal is of use to a writer that cuts alike."""
    return PART


def stream(
    out_dir: Path,
    specs: Mapping[str, TensorSpec],
    work: Work,
    *,
    processes: int = 1,
    whole: bool = False,
    read: Callable[[str], int] = lambda _: 0,
    journal: Journal | None = None,
    durable: bool = True,
    progress: Progress | None = None,
    elsewhere: Elsewhere | None = None,
    **options: Any,
) -> Written:
    """Write safetensors files into `out_dir`.

    Args:
        specs: every tensor, with its output dtype.
        work: makes one part; called in any of the processes.
        processes: how many work side by side.
        whole: parts are whole tensors, for work that must look at all of one before it can give any of it.
        read: bytes per element that are read for a tensor, for the figures alone.
        journal: keeps what is done. What it holds already is not made again; the files must then be there.
        durable: wait until all of it would survive a power cut.
        progress: called about twice a second with {"tensor", "bytes", "total_bytes", "gb_per_s", "seconds_left"}.
        elsewhere: has the parts made by others, in place of `processes` here.
        options: the writer's.

    Raises what `work` raises, StorageError (disk full or not writable), WorkerLostError.
    """
    done = dict(journal.done) if journal else {}
    parts = [
        part
        for name in sorted(specs)
        for low, high in blocks(specs[name].numel, max(1, specs[name].numel) if whole else PART)
        if (part := (name, low, high)) not in done
    ]
    meter = _Meter(specs, read, parts, progress)
    with CheckpointWriter(out_dir, specs, resume=bool(done), **options) as writer:
        for part in done:
            writer.mark(*part)

        answers = spread(_maker(writer, work), parts, processes=processes) if elsewhere is None else elsewhere(parts)
        for part, note in answers:
            writer.mark(*part)
            done[part] = note
            if journal:
                journal.add(part, note)
            meter.add(part)
        files = [f.name for f in writer.finish(durable=durable)]
    return meter.written(files, done)


def write_parts(
    out_dir: Path, specs: Mapping[str, TensorSpec], work: Work, parts: Sequence[Part], **options: Any
) -> list[tuple[Part, dict[str, Any]]]:
    """Make some of the parts of files that `stream` has begun in another process, with the same specs and options."""
    with CheckpointWriter(out_dir, specs, join=True, **options) as writer:
        make = _maker(writer, work)
        made = [(part, make(part)) for part in parts]
        writer.sync()  # here: another machine cannot do it
        return made


def _maker(writer: CheckpointWriter, work: Work) -> Callable[[Part], dict[str, Any]]:
    def make(part: Part) -> dict[str, Any]:
        name, low, high = part
        return_freed_memory(QUICK)  # a block's temporaries come and go by the thousand
        return work(name, low, high, lambda start, bits: writer.put(name, start, bits))

    return make


class _Meter:
    """How far, how fast."""

    def __init__(
        self, specs: Mapping[str, TensorSpec], read: Callable[[str], int], parts: list[Part], progress: Progress | None
    ) -> None:
        self._written = {name: spec.kind.itemsize for name, spec in specs.items()}
        self._read = {name: read(name) for name in specs}
        self._progress = progress
        self._total = sum((high - low) * (self._written[name] + self._read[name]) for name, low, high in parts)
        self._out = self._in = 0
        self._began = self._last = time.monotonic()

    def add(self, part: Part) -> None:
        name, low, high = part
        self._out += (high - low) * self._written[name]
        self._in += (high - low) * self._read[name]
        now, moved = time.monotonic(), self._in + self._out
        if self._progress is None or (now - self._last < _REPORT_EVERY_S and moved < self._total):
            return
        self._last = now
        speed = moved / max(now - self._began, 1e-9)
        self._progress({
            "tensor": name,
            "bytes": moved,
            "total_bytes": self._total,
            "gb_per_s": speed / 1e9,
            "seconds_left": (self._total - moved) / max(speed, 1.0),
        })  # fmt: skip

    def written(self, files: list[str], notes: dict[Part, dict[str, Any]]) -> Written:
        seconds = time.monotonic() - self._began
        speed = (self._in + self._out) / max(seconds, 1e-9) / 1e9
        return Written(files, notes, self._in, self._out, seconds, speed)
