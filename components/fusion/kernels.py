"""kernels.c, where it was compiled: `merge_functions` in one pass, bit for bit the same and faster.

It is built when the package is installed and a C compiler is there (`pip install` goes on without); where it is not, or
REALIGN_KERNELS=0 says so, `library` is None and the functions of torch do the work.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from components.fusion.merge_functions import drop_limit, trimmed_up_to

_VERSION, _LANES = 4, 1024
"""As kernels.c has them."""
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_KEEP_ALL = 1 << 16


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None without any, or with those of another version."""
    if os.environ.get("REALIGN_KERNELS") == "0":
        return None
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.is_file():
            try:
                found = ctypes.CDLL(str(path))
                found.realign_between.restype = ctypes.c_int64
                return found if found.realign_version() == _VERSION else None
            except (OSError, AttributeError):
                return None
    return None


class MergeKernel:
    """One tensor's merge: aligned + scale · merge of task vectors that were dropped, trimmed and weighted.

    Args:
        weights: of each finetune.
        scale: λ.
        keeps: with drops, the probability to keep an element, by finetune.
        thresholds: for TIES, the smallest magnitude that is kept, by finetune.
        elect: None for a weighted sum, "sum" or "mean" for TIES.
    """

    def __init__(
        self,
        lib: ctypes.CDLL,
        *,
        weights: Sequence[float],
        scale: float,
        keeps: Sequence[float] | None,
        thresholds: Sequence[float] | None,
        elect: str | None,
    ) -> None:
        self._call, self._count = lib.realign_merge, len(weights)
        limits = [_KEEP_ALL if keep == 1 else drop_limit(keep) for keep in keeps or [1.0] * len(weights)]
        below = [trimmed_up_to(threshold) for threshold in thresholds or [0.0] * len(weights)]
        self._limits, self._keeps = np.array(limits, np.int32), np.array(keeps or [1.0] * len(weights), np.float32)
        self._weights, self._below = np.array(weights, np.float32), np.array(below, np.float32)
        self._sums = np.zeros(self._count + 1)
        rows = np.empty((self._count, _LANES), np.float32)
        self._tuned, self._keys = (ctypes.c_void_p * self._count)(), (ctypes.c_void_p * self._count)()
        self._types = (ctypes.c_int32 * (2 + self._count))()
        arrays = (self._limits, self._keeps, self._weights, self._below)
        signs = ctypes.c_int32({None: 0, "sum": 1, "mean": 2}[elect])
        self._kept_alive = rows
        self._last = *map(_at, arrays), signs, ctypes.c_float(scale), _at(rows)
        self._sums_at = _at(self._sums)

    def __call__(
        self,
        aligned: torch.Tensor,
        tuned: Sequence[torch.Tensor],
        out: torch.Tensor,
        *,
        start: int = 0,
        keys: Sequence[npt.NDArray[np.uint32]] | None = None,
    ) -> float:
        """Merge slices that `knows` into `out`, one too; a sum that is finite only if everything was. With drops: where in
        the tensor they begin, and each finetune's `Draws.keys`."""
        self._types[0], self._types[self._count + 1] = _TYPES[aligned.dtype], _TYPES[out.dtype]
        for i, one in enumerate(tuned):
            self._types[i + 1], self._tuned[i] = _TYPES[one.dtype], one.data_ptr()
        for i, row in enumerate(keys or ()):
            self._keys[i] = row.ctypes.data
        self._call(
            ctypes.c_int64(out.numel()), ctypes.c_int32(self._count), ctypes.c_void_p(aligned.data_ptr()), self._tuned,
            self._types, None if keys is None else self._keys, ctypes.c_int64(start), *self._last,
            ctypes.c_void_p(out.data_ptr()), self._sums_at,
        )  # fmt: skip
        return float(self._sums.sum())


def knows(values: torch.Tensor) -> bool:
    """Whether the kernels take it: bf16 or fp32 in one piece of memory."""
    return values.dtype in _TYPES and values.is_contiguous()


def between(
    lib: ctypes.CDLL,
    aligned: torch.Tensor,
    tuned: torch.Tensor,
    low: np.float32,
    high: np.float32,
    room: npt.NDArray[np.float32],
) -> tuple[int, npt.NDArray[np.float32]]:
    """How many of |tuned − aligned| are above `high`, and those in [low, high], in `room`."""
    above = ctypes.c_int64()
    count = lib.realign_between(
        ctypes.c_int64(aligned.numel()), ctypes.c_void_p(aligned.data_ptr()), ctypes.c_int32(_TYPES[aligned.dtype]),
        ctypes.c_void_p(tuned.data_ptr()), ctypes.c_int32(_TYPES[tuned.dtype]),
        ctypes.c_float(float(low)), ctypes.c_float(float(high)), ctypes.byref(above), _at(room),
    )  # fmt: skip
    return above.value, room[:count]


def _at(values: npt.NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(values.ctypes.data)
