"""SIGTERM (Kubernetes, systemd and `timeout` end a process with it): as an interrupt, and kept from Ray."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def terminable() -> Iterator[list[signal.Signals]]:
    """SIGTERM raises KeyboardInterrupt, and is then in the list: where Ray waits, it raises an exception of its own in place of
    ours. In other threads than the main one, which alone hears signals, nothing changes."""
    heard: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield heard
        return

    def terminate(_signal: int, _frame: object) -> None:
        heard.append(signal.SIGTERM)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield heard
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """Whoever heard SIGTERM hears it afterwards: `ray.init` puts a handler in place that prints a C++ stack and aborts."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
