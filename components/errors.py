"""Errors a user can cause and mend; everything else is a bug and stays a traceback.

A message is one or two lines: what is wrong, where (file, tensor, key, line), what to do. When several things are wrong
they are all listed at once. The command line prints the message without a traceback and exits with `exit_code`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class RealignError(Exception):
    """Something the user gave cannot be used. Never retried: the same input fails the same way."""

    exit_code: ClassVar[int] = 2


class ConfigError(RealignError):
    """A run config (or a command's arguments) is wrong."""


class CheckpointError(RealignError):
    """A checkpoint or adapter is broken, of an unsupported kind, or does not fit the others."""


class DataError(RealignError):
    """A preference, anchor or prompt file is broken or empty."""


class EvaluationError(RealignError):
    """An evaluation cannot give a verdict (no prompts, judge unusable, …)."""


class GateError(RealignError):
    """A model does not meet what a gate asks."""

    exit_code = 3


class TrainingError(RealignError):
    """Mask training cannot go on (loss not finite, nothing to train, …)."""


class StorageError(RealignError):
    """The workspace cannot be written, is full, or its contents do not match their records."""


class TrackingError(RealignError):
    """The tracking server refuses what it is asked."""


class ClusterError(RealignError):
    """A Ray cluster does not answer, refuses, or has no room for what it is asked."""


class ClusterAwayError(ClusterError):
    """A Ray cluster does not answer; it may when it is asked again."""


class PipelineError(RealignError):
    """Kubeflow Pipelines does not answer, or refuses what it is asked."""


def listed(items: Sequence[str], limit: int = 8) -> str:
    """Join findings for a message: `a; b; c (+4 more)`."""
    shown = "; ".join(items[:limit])
    return f"{shown} (+{len(items) - limit} more)" if len(items) > limit else shown


def error_payload(error: RealignError) -> dict[str, str]:
    """The JSON form of an error that `failure.json` and a stage's `status: failed` answer carry."""
    return {"type": type(error).__name__, "message": str(error)}
