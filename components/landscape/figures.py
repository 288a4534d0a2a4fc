"""The figures of a landscape that people are told: each with the outer ends of its intervals."""

from __future__ import annotations

from components.landscape.schema import POOLED, Estimate, LandscapeResult
from components.reporting.schema import Figure

FIGURES = ("visage", "width", "depth", "area")


def figures_of(result: LandscapeResult, scan: str) -> dict[str, Figure]:
    """FIGURES of one scan over all harmful sets that count; those that it has."""
    numbers = result["scans"][scan]["numbers"][POOLED]["asr"]
    return {name: _outer(numbers[name]) for name in FIGURES if name in numbers}


def _outer(found: Estimate) -> Figure:
    lows = [x for x in (found["low"], found["prompts_low"]) if x is not None]
    highs = [x for x in (found["high"], found["prompts_high"]) if x is not None]
    return {"value": found["value"], "low": min(lows), "high": max(highs), "n": found["n"]}
