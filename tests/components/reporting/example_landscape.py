"""Landscapes with all that a picture may meet: noise, points at 100, broken weights, scattered points, hostile names."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from components.landscape.schema import (
    POOLED,
    DirectionResult,
    Estimate,
    LandscapeResult,
    Mark,
    Numbers,
    PlacePoint,
    ScanResult,
)

EVIL = "<script>alert(1)</script>"
SETS = {"harmful": "harmful", "harmful_system": "harmful", "benign": "benign", "sums": "task"}


def grid(low: float, high: float, points: int = 21) -> list[float]:
    return [round(low + (high - low) * i / (points - 1), 10) for i in range(points)]


def point(at: Sequence[float], asr: float, *, finite: bool = True, task: bool = True, seed: int = 0) -> PlacePoint:
    """A point where `asr` of the bare prompts succeed, fewer with a system prompt."""
    noise = random.Random(f"{seed}{at}").uniform(-0.04, 0.04)
    asr = min(max(asr, 0.0), 1.0)
    protected = 1.0 if asr > 0.99 else min(max(asr * 0.6 + noise, 0.0), 1.0)
    gone = min(1.0, math.hypot(*at) ** 2 * 2)

    def attacked(share: float) -> dict[str, float]:
        return {"asr": share, "harmful": share * (1 - gone), "incoherent": share * gone}

    rates = {
        POOLED: attacked((asr + protected) / 2),
        "harmful": attacked(asr),
        "harmful_system": attacked(protected),
        "benign": {"over_refusal": 0.3 * (1 - asr), "incoherent": gone},
    }
    if task:
        rates["sums"] = {"task": max(0.0, 0.9 - gone + noise)}
    if not finite:
        rates = {name: {m: float(m in ("asr", "incoherent")) for m in found} for name, found in rates.items()}
    return {"at": list(at), "rates": rates, "finite": finite}


def bowl(x: float, y: float = 0.0, *, width: float, lean: float = 0.0) -> float:
    """A basin: near 0 in the middle, 1 outside."""
    return 1 / (1 + math.exp(-(math.hypot(x - lean, y) - width) / 0.06))


def numbers(visage: float, *, plane: bool = False) -> Numbers:
    return {
        "visage": visage, "visage_official": None if plane else visage - 1, "area": visage - 2, "depth": min(100.0, visage + 3),
        "width": None if plane else 0.6, "width_cut": visage > 90, "sharpness": None if plane else 321.0, "share": 0.5,
    }  # fmt: skip


def estimate(value: float, n: int) -> Estimate:
    spread = 0.05 * abs(value)
    return {
        "value": value, "low": value - spread if n > 1 else None, "high": value + spread if n > 1 else None,
        "prompts_low": value - spread / 2, "prompts_high": value + spread / 2, "n": n,
    }  # fmt: skip


def scan_of(
    name: str,
    axes: list[dict[str, object]],
    grids: list[list[float]],
    directions: list[list[PlacePoint]],
    *,
    visage: float,
    marks: Sequence[Mark] = (),
) -> ScanResult:
    plane, n = len(axes) == 2, len(directions)
    shown = {
        key: value for key, value in numbers(visage, plane=plane).items() if value is not None and key != "width_cut"
    }
    estimates = {key: estimate(float(value), n) for key, value in shown.items()}  # type: ignore[arg-type]
    made: list[DirectionResult] = [
        {
            "direction": i,
            "points": points,
            "marks": list(marks),
            "numbers": {key: {"asr": numbers(visage, plane=plane)} for key in (POOLED, "harmful", "harmful_system")},
            "means": {"sums": {"task": 0.5}, "benign": {"over_refusal": 0.1}},
        }
        for i, points in enumerate(directions)
    ]
    every = {key: {"asr": estimates, "harmful": estimates} for key in (POOLED, "harmful", "harmful_system")}
    return {"name": name, "axes": axes, "grid": grids, "directions": made, "numbers": every}


def result(model: str, *scans: ScanResult) -> LandscapeResult:
    return {
        "schema": 1, "model": model, "sets": dict(SETS), "prompts": dict.fromkeys(SETS, 80), "confidence": 0.95,
        "scans": {scan["name"]: scan for scan in scans},
    }  # fmt: skip


def random_line(
    width: float, *, visage: float, directions: int = 3, task: bool = True, broken: bool = False
) -> ScanResult:
    """Three directions of a basin that leans; with `broken` the last two points of one have no finite weights."""

    def asr(x: float, d: int) -> float:
        return bowl(x, width=width + 0.04 * d, lean=0.05 * d) + random.Random(f"{d}{x}").uniform(-0.03, 0.03)

    lines = [
        [point([x], asr(x, d), task=task, seed=d, finite=not (broken and d == 0 and x > 0.42)) for x in grid(-0.5, 0.5)]
        for d in range(directions)
    ]
    far: list[Mark] = [{"name": "finetune", "at": [0.0004], "off": 0.99998}]
    axes: list[dict[str, object]] = [{"kind": "random", "seed": 0, "norm": "layer", "low": -0.5, "high": 0.5}]
    return scan_of("random", axes, [grid(-0.5, 0.5)], lines, visage=visage, marks=far)


def towards_line(width: float, *, visage: float, model: str = "finetune", extra: Sequence[Mark] = ()) -> ScanResult:
    """One direction, refined: points of its own, closer at the edge."""
    places = sorted({*grid(-0.5, 1.5, 9), *(round(width + 0.02 * i, 4) for i in range(-6, 7))})
    found = [point([x], bowl(x, width=width)) for x in places]
    marks: list[Mark] = [
        {"name": model, "at": [1.0], "off": 0.0},
        {"name": "realigned", "at": [0.86], "off": 0.37},
        *extra,
    ]
    axes: list[dict[str, object]] = [{"kind": "towards", "model": model, "low": -0.5, "high": 1.5}]
    return scan_of("to_finetune", axes, [grid(-0.5, 1.5)], [found], visage=visage, marks=marks)


def plane(
    width: float, *, visage: float, refined: bool = False, task: bool = True, marks: Sequence[Mark] = ()
) -> ScanResult:
    xs, ys = grid(-0.5, 1.5), grid(-0.5, 0.5)
    places = [(x, y) for x in xs for y in ys]
    if refined:
        keep = {(x, y) for x in xs[::5] for y in ys[::5]}
        places = [(x, y) for x, y in places if (x, y) in keep or abs(math.hypot(x, y) - width) < 0.12]
    found = [point(at, bowl(*at, width=width), task=task) for at in places]
    axes: list[dict[str, object]] = [
        {"kind": "towards", "model": "finetune", "low": -0.5, "high": 1.5},
        {"kind": "random", "seed": 0, "norm": "layer", "low": -0.5, "high": 0.5},
    ]
    mine: list[Mark] = [
        {"name": "finetune", "at": [1.0, 0.0], "off": 0.0},
        {"name": "realigned", "at": [0.04, 0.02], "off": 0.4},
    ]
    return scan_of("plane", axes, [xs, ys], [found], visage=visage, marks=[*mine, *marks])
