"""What the drivers of tests do to work on Ray Tune's actors while it goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import psutil


class Watching:
    """Is told of progress, and does something when it has been told so often."""

    def __init__(self, at: int, do: Callable[[], Any]) -> None:
        self.at, self.do, self.told = at, do, 0

    def __call__(self, now: dict[str, Any]) -> None:
        self.told += 1
        if self.told == self.at:
            self.do()


def holders() -> list[psutil.Process]:
    """The actors of this process that hold a model."""
    return [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::Holding")]


def murder() -> None:
    """Kill one of them."""
    os.kill(holders()[0].pid, signal.SIGKILL)
