"""`realign fuse`: what is typed, as a recipe; progress and outcome, in words."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pydantic import ValidationError

from components.errors import ConfigError
from components.fusion.recipe import Recipe, settings_of, told
from components.late import import_late

if TYPE_CHECKING:
    from components.fusion.making import Fused

_OF_A_MASK = ("form", "rescale")
_MOST_PROCESSES = 8
"""By default: more of them than this wait for the disk."""
_LINE_EVERY_S = 10.0
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def named_finetunes(given: Iterable[str]) -> dict[str, str]:
    """`name=reference`, or a reference whose last part is its name. Raises ConfigError for a name given twice."""
    found: dict[str, str] = {}
    for one in given:
        name, equals, reference = one.partition("=")
        if not equals or "/" in name:  # a path may have an equals sign
            name, reference = one.rstrip("/").rsplit("/", 1)[-1], one
            name = name.partition("@")[0] if not Path(one).exists() else name
        if not name or not reference:
            raise ConfigError(f"--finetune {one}: give it as name=model")
        if name in found:
            raise ConfigError(f"--finetune {name} is there twice; give each a name of its own: name=model")
        found[name] = reference
    return found


def named_numbers(option: str, given: Iterable[str], *, of: str = "name") -> dict[str, float]:
    """`name=number`. Raises ConfigError for anything else."""
    found: dict[str, float] = {}
    for one in given:
        name, equals, number = one.rpartition("=")
        if name in found:
            raise ConfigError(f"{option} {name} is there twice")
        try:
            found[name] = float(number)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise ConfigError(f"{option} {one}: give it as {of}=number")
    return found


def size_in_bytes(text: str) -> int:
    """`5GB`, `500MB` or a number of bytes."""
    unit = text[-2:].upper()
    factor = _UNITS.get(unit, 1)
    try:
        size = int(float(text[:-2] if factor > 1 else text) * factor)
    except ValueError:
        size = 0
    if size <= 0:
        raise ConfigError(f"--max-shard {text}: give a size like 5GB")
    return size


def recipe_of(
    *,
    aligned: str,
    finetunes: dict[str, str],
    method: str,
    numbers: Mapping[str, Any],
    output: Mapping[str, Any],
    **others: Any,
) -> Recipe:
    """Everything typed, checked together. Raises ConfigError."""
    if others.get("mask") and not numbers.get("form"):
        raise ConfigError("a mask needs --form: soft or binary")
    of_a_mask = [f"--{key}" for key in _OF_A_MASK if numbers.get(key)]
    if of_a_mask and not others.get("mask") and method != "masked":
        raise ConfigError(f"{' and '.join(of_a_mask)}: say how a mask is used; give the --mask, or leave it out")
    merge, fusion = settings_of(method, numbers, output)
    try:
        return Recipe(aligned=aligned, finetunes=finetunes, merge=merge, fusion=fusion, **others)
    except ValidationError as error:
        raise ConfigError(_of_method(method, told(error))) from error


def _of_method(method: str, text: str) -> str:
    known = (f"method {method}", f"{method} ", "vocabulary: ", "one_sided: ")
    return text if text.startswith(known) else f"method {method}: {text}"


@dataclass(frozen=True)
class Typed:
    """A command line, as it came. None: not given."""

    aligned: str | None
    finetunes: Sequence[str]
    method: str | None
    mergekit: Path | None
    numbers: Mapping[str, Any]
    weights: Sequence[str]
    layers: Sequence[str]
    max_shard: str
    output: Mapping[str, Any]
    others: Mapping[str, Any]

    def recipe(self) -> Recipe:
        """Raises ConfigError for all that does not go together."""
        numbers = {
            **self.numbers,
            "weights": named_numbers("--weight", self.weights),
            "layers": named_numbers("--layer", self.layers, of="pattern"),
        }
        output = {**self.output, "max_shard_bytes": size_in_bytes(self.max_shard)}
        if self.mergekit is None:
            if self.aligned is None or not self.finetunes:
                raise ConfigError("give --aligned and at least one --finetune, or a --mergekit config")
            return recipe_of(
                aligned=self.aligned, finetunes=named_finetunes(self.finetunes),
                method=self.method or self._usual_method(), numbers=numbers, output=output, **self.others,
            )  # fmt: skip
        given = [key for key, value in numbers.items() if value not in (None, {}) and key not in _OF_A_MASK]
        if self.aligned or self.finetunes or self.method or given:
            raise ConfigError("a --mergekit config says which models, which method and which numbers: leave those out")
        return self._carried_over(self.mergekit, {key: numbers[key] for key in _OF_A_MASK}, output)

    def _usual_method(self) -> str:
        """Under a binary mask of scale 1 one finetune's weights are selected, bit for bit; a sum of differences would not."""
        return "masked" if self.others.get("mask") and len(self.finetunes) == 1 else "task_arithmetic"

    def _carried_over(self, path: Path, form: Mapping[str, Any], output: Mapping[str, Any]) -> Recipe:
        from components.checkpoints.reference import open_checkpoint
        from components.fusion.mergekit import read_recipe

        read = read_recipe(path)
        every = (read.aligned, *read.finetunes.values())
        foreign = [
            str(one) for one in every if one.adapter and (one is read.aligned or one.model != read.aligned.model)
        ]
        if foreign:
            raise ConfigError(
                f"{path}: {', '.join(foreign)}: an adapter over another model than the base {read.aligned.model} is merged "
                "with PEFT first"
            )
        aligned, *finetunes = (_beside(path, one.adapter or one.model) for one in every)
        settings = read.settings(open_checkpoint(aligned).source.names())
        others = dict(self.others)
        if others["vocabulary"] == "error":
            others["vocabulary"] = read.vocabulary
        for note in read.notes:
            sys.stderr.write(f"{path}: {note}\n")
        return recipe_of(
            aligned=aligned,
            finetunes=dict(zip(read.finetunes, finetunes, strict=True)),
            method=settings.pop("method"),
            numbers={**settings, **form},
            output={**output, "output_dtype": output["output_dtype"] or read.output_dtype},
            **others,
        )


def fuse_typed(typed: Typed, out: str, *, processes: int | None, durable: bool, overwrite: bool) -> None:
    """Make it, and say so."""
    import_late("torch")  # compiled merges are made without it
    if not out:
        raise ConfigError("--out is empty; name the directory that the model gets")
    recipe = typed.recipe()
    from components.limits import available_cpus

    progress = FuseProgress()
    processes = processes or min(_MOST_PROCESSES, available_cpus())
    try:
        fused = _fused(recipe, out, processes, durable=durable, overwrite=overwrite, progress=progress)
    finally:
        progress.end()
    sys.stdout.write(outcome(fused.place, fused.record, made=fused.made))


def _fused(
    recipe: Recipe, out: str, processes: int, *, durable: bool, overwrite: bool, progress: FuseProgress
) -> Fused:
    if "://" in out and not out.startswith("file://"):
        from components.fusion.store_job import fuse_to_store

        return fuse_to_store(recipe, out, processes=processes, overwrite=overwrite, progress=progress)
    from components.fusion.job import fuse

    directory = Path(out.removeprefix("file://"))
    return fuse(recipe, directory, processes=processes, durable=durable, overwrite=overwrite, progress=progress)


def _beside(config: Path, reference: str) -> str:
    """A relative directory of a config is one beside it, unless it is one from here."""
    there = config.parent / reference
    if not Path(reference).exists() and there.exists():
        return str(there)
    bare = "://" not in reference and reference.count("/") == 1 and not reference.startswith((".", "/", "~"))
    return f"hf://{reference}" if bare and not Path(reference).exists() else reference


class FuseProgress:
    """In a terminal one line that changes; elsewhere one every ten seconds."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._last = time.monotonic()

    def __call__(self, values: dict[str, Any]) -> None:
        done, total = values["bytes"], values["total_bytes"]
        now = time.monotonic()
        if not self._live and now - self._last < _LINE_EVERY_S:
            return
        self._last = now
        text = (
            f"{done / total:4.0%}  {done / 1e9:.1f} of {total / 1e9:.1f} GB  {values['gb_per_s']:.2f} GB/s  "
            f"{_clock(values['seconds_left'])} left"
        )
        self._stream.write(f"\r\x1b[K{text}" if self._live else text + "\n")
        self._stream.flush()

    def end(self) -> None:
        """Take the line away."""
        if self._live:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def outcome(place: str, record: Mapping[str, Any], *, made: bool) -> str:
    """What was made, in a few lines."""
    if not made:
        return f"{place} is that very model already (fingerprint {record['fingerprint']})\n"
    moved = _size(record["bytes_read"] + record["bytes_written"])
    lines = [
        f"{place}: {record['method']} of {', '.join(record['recipe']['finetunes'])} on {record['recipe']['aligned']}",
        f"{record['parameters']:,} parameters in {', '.join(record['output_dtypes'])}, "
        f"{len(record['unchanged_tensors'])} of {record['tensors']} tensors unchanged; "
        f"{moved} read and written in {record['seconds']:.1f} s",
        *(f"note: {note}" for note in record["notes"]),
    ]
    return "\n".join(lines) + "\n"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"
