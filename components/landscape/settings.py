"""What a landscape is drawn of. Pydantic only, for the command line and the run config."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Axis(_Frozen):
    low: float = Field(allow_inf_nan=False)
    """Where the axis begins, in lengths of its direction; the model itself is at 0."""

    high: float = Field(allow_inf_nan=False)
    """Where it ends."""

    @model_validator(mode="after")
    def _upwards(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"an axis goes from low to high, not from {self.low:g} to {self.high:g}")
        return self


class RandomAxis(_Axis):
    """A random direction: a Gaussian of every tensor, as long as it; those with "norm" in their name stay as they are."""

    kind: Literal["random"] = "random"

    seed: int = Field(default=0, ge=0)
    """Which direction; further ones of a scan have the seeds that follow."""

    norm: Literal["layer", "filter"] = "layer"
    """layer: a tensor's direction is as long as the tensor (as published). filter: each row's is as long as the row
    (https://arxiv.org/abs/1712.09913)."""

    low: float = Field(default=-0.5, allow_inf_nan=False)
    high: float = Field(default=0.5, allow_inf_nan=False)


class TowardsAxis(_Axis):
    """The way to another checkpoint, which is at 1. Every tensor moves."""

    kind: Literal["towards"] = "towards"

    model: str = Field(min_length=1)
    """Which: a name that whoever draws the landscape knows, or a directory."""

    low: float = Field(default=-0.5, allow_inf_nan=False)
    high: float = Field(default=1.5, allow_inf_nan=False)


Axis = Annotated[RandomAxis | TowardsAxis, Field(discriminator="kind")]


class Scan(_Frozen):
    """Points on a line or in a plane through the model."""

    name: str = Field(default="random", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")

    axes: tuple[Axis, ...] = Field(default=(RandomAxis(),), min_length=1, max_length=2)
    """One or two. The second is made orthogonal to the first (Gram–Schmidt); two random ones with one seed differ."""

    directions: int = Field(default=1, ge=1)
    """How many lines or planes, by the seeds of the random axes."""

    points: int = Field(default=21, ge=3)
    """Of each axis, both ends among them: 21 as published, 21 × 21 in a plane."""

    refine: float | None = Field(default=None, gt=0, le=50)
    """Begin with few points of that grid and add where the surface bends, until by its estimate (two standard deviations)
    VISAGE is within this (0 to 100) of what all of them, and on a line ten times as many, would say. None: all points."""

    @model_validator(mode="after")
    def _several_of_what(self) -> Self:
        if self.directions > 1 and not any(axis.kind == "random" for axis in self.axes):
            raise ValueError(f"scan {self.name}: several directions need a random axis")
        towards = [axis.model for axis in self.axes if isinstance(axis, TowardsAxis)]
        if len(set(towards)) < len(towards):
            raise ValueError(f"scan {self.name}: both axes lead to {towards[0]}")
        return self


class LandscapeSettings(_Frozen):
    """What is drawn, of which prompts."""

    scans: tuple[Scan, ...] = Field(default=(Scan(directions=3),), min_length=1)

    sets: tuple[str, ...] = ()
    """Names of the test sets that are asked at every point, lm_eval's tasks among them if need be; none named: all prompt sets
    that count towards the headline rates. One with an attack has a curve of its own, so that `attack: {kind: system, text: …}`
    shows what a system prompt protects."""

    limit: int | None = Field(default=80, ge=1)
    """Of each prompt set only the first so many prompts (80, as published), those of an attack's templates counted one by one;
    None: all. lm_eval's tasks have limits of their own."""

    @model_validator(mode="after")
    def _own_names(self) -> Self:
        names = [scan.name for scan in self.scans]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"scans with the same name: {', '.join(twice)}; rename one")
        return self

    @property
    def models(self) -> tuple[str, ...]:
        """What the axes lead to."""
        axes = [axis for scan in self.scans for axis in scan.axes]
        return tuple(dict.fromkeys(axis.model for axis in axes if isinstance(axis, TowardsAxis)))
