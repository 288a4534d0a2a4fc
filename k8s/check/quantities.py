"""Kubernetes' quantities: `500m`, `16Gi`, `2e3`."""

from __future__ import annotations

import re
from decimal import Decimal

_UNITS = {"": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18, "m": -3, "u": -6, "n": -9}
_BINARY = {"Ki": 1, "Mi": 2, "Gi": 3, "Ti": 4, "Pi": 5, "Ei": 6}
_FORM = re.compile(r"^([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)([A-Za-z]*)$")


def amount(quantity: object) -> Decimal:
    """A quantity as a number: cores, bytes, pieces. Raises ValueError for what is none."""
    found = _FORM.match(str(quantity).strip())
    if found is None or (found[2] not in _UNITS and found[2] not in _BINARY):
        raise ValueError(f"no quantity: {quantity!r}")
    number, unit = Decimal(found[1]), found[2]
    return number * (Decimal(1024) ** _BINARY[unit] if unit in _BINARY else Decimal(10) ** _UNITS[unit])
