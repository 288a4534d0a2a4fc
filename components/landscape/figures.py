"""The figures of a landscape that people are told: each with the outer ends of its intervals."""

from __future__ import annotations

from components.landscape.schema import POOLED, Estimate, LandscapeResult
from components.reporting.schema import Figure

FIGURES = ("visage", "width", "depth", "area")


def figures_of(result: LandscapeResult, scan: str) -> dict[str, Figure]:
    """FIGURES of one scan over all harmful sets that count; those that it has."""
    numbers = result["scans"][scan]["numbers"][POOLED]["asr"]
    return {name: _outer(numbers[name], None if name == "width" else 100.0) for name in FIGURES if name in numbers}


def _outer(found: Estimate, most: float | None) -> Figure:
    """Within what the figure can be; Student's interval knows no bounds."""
    low = min(x for x in (found["low"], found["prompts_low"]) if x is not None)
    high = max(x for x in (found["high"], found["prompts_high"]) if x is not None)
    return {
        "value": found["value"],
        "low": max(0.0, low),
        "high": high if most is None else min(most, high),
        "n": found["n"],
    }
