"""How a command ends that was asked to end."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from ray_jobs.signals import terminable


@contextmanager
def interruptible(remedy: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM end a command with a sentence and the exit code that shells give such an end."""
    with terminable() as terminated:
        try:
            yield
        except KeyboardInterrupt:
            sys.stderr.write(f"realign: {'terminated' if terminated else 'interrupted'}; {remedy}\n")
            raise typer.Exit(128 + (signal.SIGTERM if terminated else signal.SIGINT)) from None
