"""What a run took: by model and step, as far as the records say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from components.reporting.schema import RunSummary, StepCost, shown_models

STAGES = ("load", "train_mask", "search", "fuse", "evaluate", "landscape", "other")
"""Steps by what their names begin with."""


@dataclass(frozen=True)
class CostLine:
    """What one model took, or what the run took once."""

    name: str
    seconds: Mapping[str, float]
    """Stage -> wall seconds."""
    prompts: int | None
    tokens: int | None
    peak: int | None
    """Bytes."""
    written: int | None

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class CostTable:
    lines: list[CostLine]
    together: CostLine
    stages: list[str]
    """Those that somebody spent time on."""


def cost_table(summary: RunSummary) -> CostTable | None:
    """None where nothing is known. Steps count under what their names begin with; an older summary has only seconds."""
    lines = [_line(one["name"], one) for one in shown_models(summary)]
    lines.append(_line("once for all", summary))
    lines = [line for line in lines if line.seconds]
    if not lines:
        return None
    stages = [stage for stage in STAGES if any(stage in line.seconds for line in lines)]
    seconds = {stage: sum(line.seconds.get(stage, 0.0) for line in lines) for stage in stages}
    peaks = [line.peak for line in lines if line.peak is not None]
    together = CostLine(
        "all",
        seconds,
        _sum(lines, "prompts"),
        _sum(lines, "tokens"),
        max(peaks, default=None),
        _sum(lines, "written"),
    )
    return CostTable(lines, together, stages)


def _line(name: str, told: Mapping[str, Any] | RunSummary) -> CostLine:
    given = cast("Mapping[str, Any]", told)
    costs: dict[str, StepCost] = given.get("cost") or {
        step: {"seconds": seconds} for step, seconds in (given.get("seconds") or {}).items()
    }
    seconds: dict[str, float] = {}
    for step, cost in costs.items():
        seconds[_stage(step)] = seconds.get(_stage(step), 0.0) + cost.get("seconds", 0.0)

    def known(key: str) -> list[int]:
        return [cost[key] for cost in costs.values() if key in cost]  # type: ignore[literal-required]

    return CostLine(
        name,
        seconds,
        sum(known("prompts")) if known("prompts") else None,
        sum(known("tokens")) if known("tokens") else None,
        max(known("peak_memory_bytes"), default=None),
        sum(known("bytes_written")) if known("bytes_written") else None,
    )


def _stage(step: str) -> str:
    return next((stage for stage in STAGES if step.startswith(stage)), "other")


def _sum(lines: list[CostLine], key: str) -> int | None:
    known = [value for line in lines if (value := getattr(line, key)) is not None]
    return sum(known) if known else None
