"""Waiting for a tracking server that is away, for a stated time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TypeVar

from components.tracking import TrackingUnavailableError

_RETRY_SECONDS = 1.0

T = TypeVar("T")


class Patience:
    """Asks a server again that does not answer, for `seconds` in all; says once on stderr that it waits."""

    def __init__(self, seconds: float) -> None:
        self._left = seconds
        self._said = False

    def __call__(self, action: Callable[[], T]) -> T:
        """What `action` returns. Raises what it raises, TrackingUnavailableError once patience is at its end."""
        while True:
            began = time.monotonic()
            try:
                return action()
            except TrackingUnavailableError as error:
                self._left -= time.monotonic() - began
                if self._left <= 0:
                    raise
                if not self._said:
                    self._said = True
                    sys.stderr.write(f"realign: {error}; waiting up to {self._left:.0f} s (tracking.patience_s)\n")
                time.sleep(_RETRY_SECONDS)
                self._left -= _RETRY_SECONDS
