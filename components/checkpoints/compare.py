"""Whether two models can be subtracted: every difference at once, before any work starts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from components.checkpoints.dtypes import Bits, all_finite, as_floats
from components.checkpoints.factors import FactorSource
from components.checkpoints.reference import Checkpoint
from components.checkpoints.source import TensorSource, bits_of, blocks
from components.checkpoints.vocabularies import token_clashes
from components.errors import CheckpointError, listed

_BLOCK = 262_144
_SAMPLE = 65_536
_PEEK = 1024
_FAR = 1.0
"""The distance at which a task vector is as large as what it was taken from."""
# Config keys that change what the same weights compute. Their defaults differ between library versions, so that a key
# which only one side writes down is no difference.
_STRUCTURE = (
    "model_type",
    "architectures",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "hidden_act",
    "activation_function",
    "rms_norm_eps",
    "layer_norm_epsilon",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
    "layer_types",
    "num_experts_per_tok",
    "num_local_experts",
    "tie_word_embeddings",
    "n_head",
    "n_layer",
    "n_embd",
)


def compare(a: Checkpoint, b: Checkpoint) -> list[str]:
    """All differences that forbid mixing two models: architecture, config, tensors, shapes, tied weights, vocabulary.

    Dtypes may differ. Each item is what is so of `b` and not of `a`; an empty list means compatible.
    """
    return [
        *compare_configs(a.config, b.config),
        *compare_tensors(a.source, b.source),
        *compare_scalings(a.source, b.source),
        *token_clashes(a.tokenizer_dir, b.tokenizer_dir),
    ]


def compare_configs(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Values that change what the same weights compute, as `config KEY is …, not …`."""
    return [
        f"config {key} is {json.dumps(b[key])}, not {json.dumps(a[key])}"
        for key in _STRUCTURE
        if key in a and key in b and a[key] != b[key]
    ]


def compare_tensors(a: TensorSource, b: TensorSource) -> list[str]:
    """Differences in names, shapes and ties, from headers only."""
    return [what for _, what in tensor_differences(a, b)]


def tensor_differences(a: TensorSource, b: TensorSource) -> list[tuple[str, str]]:
    """The same as (tensor, what is so of it in `b`)."""
    names_a, names_b = set(a.names()), set(b.names())
    ties_a, ties_b = a.aliases(), b.aliases()
    found = [(n, f"tensor {n} is missing") for n in sorted(names_a - names_b - set(ties_b))]
    found += [(n, f"tensor {n} is extra") for n in sorted(names_b - names_a - set(ties_a))]
    for alias in sorted((set(ties_a) & names_b) | (set(ties_b) & names_a)):
        one, other = ("tied", "separate") if alias in ties_a else ("separate", "tied")
        found.append((alias, f"{alias} is {other}, not {one}"))
    for name in sorted(names_a & names_b):
        shape_a, shape_b = a.spec(name).shape, b.spec(name).shape
        if shape_a != shape_b:
            found.append((name, f"{name} is {list(shape_b)}, not {list(shape_a)}"))
        kind_a, kind_b = a.spec(name).kind, b.spec(name).kind
        if kind_a.is_float != kind_b.is_float:
            found.append((name, f"{name} is {kind_b}, not {kind_a}"))
    return found


def require_compatible(a: Checkpoint, b: Checkpoint) -> None:
    """Raise CheckpointError with every difference of two models that are to be subtracted."""
    _require_none(a, b, compare(a, b))


def require_same_tensors(a: Checkpoint, b: Checkpoint) -> None:
    """Raise CheckpointError with the differences that headers alone tell."""
    _require_none(a, b, compare_tensors(a.source, b.source))


def _require_none(a: Checkpoint, b: Checkpoint, problems: list[str]) -> None:
    if problems:
        count = f"{len(problems)} difference{'s' if len(problems) > 1 else ''}"
        raise CheckpointError(
            f"{b.where} does not fit {a.where} ({count}): {listed(problems, 12)}; give the model that it was finetuned from"
        )


def check_finite(source: TensorSource, *, block: int = _BLOCK) -> list[str]:
    """Every tensor with a NaN or infinity, each with its first bad element: `name[i, j] is nan (3 bad elements)`."""
    problems = []
    for name in source.names():
        spec = source.spec(name)
        if not spec.kind.is_float:
            continue
        bad, first = 0, -1
        value = 0.0
        for start, stop in blocks(spec.numel, block):
            bits = bits_of(source, name, start, stop)
            if all_finite(bits, spec.kind):
                continue
            values = as_floats(bits, spec.kind)
            wrong = np.flatnonzero(~np.isfinite(values))
            if first < 0:
                first = start + int(wrong[0])
                value = float(values[wrong[0]])
            bad += wrong.size
        if bad:
            index = ", ".join(str(i) for i in unravel(first, spec.shape))
            problems.append(f"{name}[{index}] is {value} ({bad} bad elements)")
    return problems


def require_finite(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError naming every tensor with NaN or infinite weights and the first such element."""
    problems = check_finite(checkpoint.source)
    if problems:
        raise CheckpointError(
            f"{checkpoint.where}: weights are not finite: {listed(problems)}; "
            "the run that made it diverged: take an earlier checkpoint"
        )


def relative_distance(aligned: TensorSource, other: TensorSource, *, sample: int = _SAMPLE) -> float:
    """‖f − a‖ / ‖a‖ over the first `sample` elements of every matrix. Finetunes of one model lie near it (0.001 to 0.3); two
    models that were trained apart lie at about √2, however alike their shapes are."""
    apart = size = 0.0
    for name in aligned.names():
        spec = aligned.spec(name)
        if len(spec.shape) < 2 or not spec.kind.is_float:
            continue
        a, f = (_doubles(source, name, min(spec.numel, sample)) for source in (aligned, other))
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is told elsewhere, where it stands
            apart += float(np.square(f - a).sum())
            size += float(np.square(a).sum())
    return math.sqrt(apart / size) if size else 0.0


def require_near(aligned: Checkpoint, other: Checkpoint, *, sample: int = _SAMPLE) -> None:
    """Raise CheckpointError when `other` was made from another base of the same shape: their difference is no task vector."""
    distance = relative_distance(aligned.source, other.source, sample=sample)
    if distance > _FAR:
        raise CheckpointError(
            f"{other.where} differs from {aligned.where} by {distance:.2f} times the weights' own size, as models do that were "
            "trained apart; give the model that it was finetuned from as the aligned one"
        )


def unravel(position: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Index of a flattened position."""
    index: list[int] = []
    for size in reversed(shape):
        position, i = divmod(position, size)
        index.append(i)
    return tuple(reversed(index))


def compare_scalings(a: TensorSource, b: TensorSource) -> list[str]:
    """Of adapters' factors: modules that both scale, differently."""
    if isinstance(a, FactorSource) and isinstance(b, FactorSource):
        return a.scaling_differences(b)
    return []


def same_bits(one: TensorSource, other: TensorSource, name: str, start: int, stop: int) -> bool:
    """Whether two sources hold the same there, in the same dtype. A few elements tell mostly that they do not."""
    if one.spec(name).kind != other.spec(name).kind:
        return False
    for low, high in (*blocks(min(stop - start, _PEEK), _PEEK), *blocks(stop - start, _BLOCK)):
        a, b = (bits_of(source, name, start + low, start + high) for source in (one, other))
        # Bytes, because a NaN is no number's equal and zeros have signs; numpy's, which stop being slow at eight at a time.
        if not np.array_equal(*_words(a, b)):
            return False
    return True


def _words(a: Bits, b: Bits) -> tuple[Bits, Bits]:
    aligned = a.nbytes % 8 == 0 and a.ctypes.data % 8 == 0 and b.ctypes.data % 8 == 0
    return (a.view(np.uint64), b.view(np.uint64)) if aligned else (a, b)


def _doubles(source: TensorSource, name: str, count: int) -> npt.NDArray[np.float64]:
    return as_floats(bits_of(source, name, 0, count), source.spec(name).kind).astype(np.float64)
