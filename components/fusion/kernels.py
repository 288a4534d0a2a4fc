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
from typing import Any

import numpy as np
import numpy.typing as npt

from components.checkpoints.dtypes import BF16, F32, Bits, DType, Stretch, as_floats
from components.fusion.merge_functions import drop_limit, trimmed_up_to

_VERSION, _LANES = 6, 1024
"""As kernels.c has them."""
KNOWN = {F32: 0, BF16: 1}
"""What they read and write."""
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
        aligned: Stretch,
        tuned: Sequence[Stretch],
        out: Stretch,
        *,
        start: int = 0,
        keys: Sequence[npt.NDArray[np.uint32]] | None = None,
    ) -> float:
        """Merge what is of `KNOWN` types into `out`, which is too; a sum that is finite only if everything was. With drops:
        where in the tensor they begin, and each finetune's `Draws.keys`."""
        for i, (bits, dtype) in enumerate((aligned, *tuned, out)):
            assert bits.dtype == dtype.bits, (bits.dtype, dtype)
            self._types[i] = KNOWN[dtype]
        for i, (bits, _) in enumerate(tuned):
            self._tuned[i] = bits.ctypes.data
        for i, row in enumerate(keys or ()):
            self._keys[i] = row.ctypes.data
        self._call(
            ctypes.c_int64(out[0].size), ctypes.c_int32(self._count), _at(aligned[0]), self._tuned, self._types,
            None if keys is None else self._keys, ctypes.c_int64(start), *self._last, _at(out[0]), self._sums_at,
        )  # fmt: skip
        return float(self._sums.sum())


def known(bits: Bits, dtype: DType) -> Stretch:
    """Elements of any type of float for a kernel, in fp32 where it does not know theirs."""
    if dtype in KNOWN:
        return bits, dtype
    with np.errstate(over="ignore"):  # infinite then
        return as_floats(bits, dtype).astype(np.float32, copy=False).view(np.uint32), F32


def narrow(bits: Bits, dtype: DType) -> Bits:
    """What a kernel gave in fp32 because it does not know `dtype`, rounded to that; else itself."""
    if dtype in KNOWN:
        return bits
    with np.errstate(over="ignore"):  # infinite then
        found: Bits = bits.view(np.float32).astype(f"f{dtype.itemsize}").view(dtype.bits)
    return found


def between(
    lib: ctypes.CDLL,
    aligned: Stretch,
    tuned: Stretch,
    low: np.float32,
    high: np.float32,
    room: npt.NDArray[np.float32],
) -> tuple[int, npt.NDArray[np.float32]]:
    """How many of |tuned − aligned| are above `high`, and those in [low, high], in `room`."""
    above = ctypes.c_int64()
    count = lib.realign_between(
        ctypes.c_int64(aligned[0].size), _at(aligned[0]), ctypes.c_int32(KNOWN[aligned[1]]),
        _at(tuned[0]), ctypes.c_int32(KNOWN[tuned[1]]),
        ctypes.c_float(float(low)), ctypes.c_float(float(high)), ctypes.byref(above), _at(room),
    )  # fmt: skip
    return above.value, room[:count]


def _at(values: npt.NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(values.ctypes.data)
