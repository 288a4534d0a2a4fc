"""The shape of `landscape.json`: what one model's landscape says. Plain JSON types."""

from __future__ import annotations

from typing import Any, NotRequired

from typing_extensions import TypedDict

POOLED = "*"
"""Stands for all harmful sets that count, their prompts together."""


class Numbers(TypedDict):
    """One direction's figures of one attack curve S (0 to 100, `asr` or `harmful`). Lengths are in units of the axis."""

    visage: float
    """Mean of 100 − S over the places where S < 100; 0 where there is none."""
    visage_official: float | None
    """Over the window that the official code scans for; None in a plane."""
    area: float
    """Mean of 100 − S over all places."""
    depth: float
    """100 − S at the model itself (0 on every axis)."""
    width: float | None
    """Length of the stretch around the model in which S is nearer to its value there than to 100; None in a plane."""
    width_cut: bool
    """The stretch reaches an end of the axis: it is at least that wide."""
    sharpness: float | None
    """By how many points S rises per unit of the axis at the edges of that stretch, on average of those there are; None where
    there is no edge, and in a plane."""
    share: float
    """Of all places, those in which S is nearer to its value at the model than to 100."""


class Estimate(TypedDict):
    """Of a figure over the directions of a scan."""

    value: float
    """Their mean."""
    low: float | None
    high: float | None
    """Student's t interval of the mean over directions; None with one direction."""
    prompts_low: float
    prompts_high: float
    """Percentile bootstrap over the prompts, the directions as they are."""
    n: int
    """Directions."""


class PlacePoint(TypedDict):
    """A point as it is drawn."""

    at: list[float]
    rates: dict[str, dict[str, float]]
    """set (or POOLED) -> metric -> share in [0, 1]."""
    finite: bool


class Mark(TypedDict):
    """Where another model lies."""

    name: str
    at: list[float]
    """Coordinates of its projection onto the line or plane."""
    off: float
    """How far it lies from that, as a share of its distance from the model: 0 in it, 1 at a right angle."""


class DirectionResult(TypedDict):
    direction: int
    points: list[PlacePoint]
    """Those that were measured."""
    marks: list[Mark]
    numbers: dict[str, dict[str, Numbers]]
    """set (or POOLED) -> asr, harmful -> figures."""
    means: dict[str, dict[str, float]]
    """set -> any other metric (task, over_refusal, incoherent, …) -> mean over the axis or plane, in [0, 1]."""
    error: NotRequired[float]
    """Of a refined scan: how far VISAGE may be off, as the refinement estimates it."""


class ScanResult(TypedDict):
    name: str
    axes: list[dict[str, Any]]
    """As in the settings; of a random axis the first direction's seed."""
    grid: list[list[float]]
    """Coordinates of the full grid, by axis."""
    directions: list[DirectionResult]
    numbers: dict[str, dict[str, dict[str, Estimate]]]
    """set (or POOLED) -> asr, harmful -> visage, visage_official, area, depth, width, sharpness, share -> over the directions;
    a figure that a direction lacks is left out."""


class LandscapeResult(TypedDict):
    schema: int
    model: str
    sets: dict[str, str]
    """set -> kind."""
    prompts: dict[str, int]
    confidence: float
    scans: dict[str, ScanResult]
