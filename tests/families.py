"""Testbed families for tests: built once, then shared by every worker and every later session."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from components.testbed.settings import Architecture, family_settings


def cache_dir() -> Path:
    """Where families are kept: REALIGN_CACHE, or ~/.cache/safety-realign."""
    return Path(os.environ.get("REALIGN_CACHE") or Path.home() / ".cache" / "safety-realign")


@cache
def minute_family(architecture: Architecture = "llama", seed: int = 0) -> Path:
    """A minute-sized family, built on first use (workers that ask at the same time wait). Read-only: copy what you change."""
    from components.testbed.family import cached_family

    return cached_family(family_settings("minute", architecture), seed=seed, cache=cache_dir() / "testbed")
