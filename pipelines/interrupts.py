"""How a command ends that was asked to end."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def interruptible(remedy: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM (Kubernetes, systemd, `timeout`) end a command with a sentence and the exit code that shells give
    such an end."""
    received = [signal.SIGINT]

    def terminate(_signal: int, _frame: object) -> None:
        received.append(signal.SIGTERM)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt:
        word = "interrupted" if received[-1] is signal.SIGINT else "terminated"
        sys.stderr.write(f"realign: {word}; {remedy}\n")
        raise typer.Exit(128 + received[-1]) from None
    finally:
        signal.signal(signal.SIGTERM, before)
