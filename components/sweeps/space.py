"""From a space to candidates, and from a candidate to settings. Keys that a candidate's method has no use for are no part of it.

Light on purpose: neither torch nor optuna.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from components.fusion.merge_settings import MergeSettings
from components.fusion.settings import FusionSettings
from components.sweeps.settings import Space
from components.sweeps.trials import Candidate


class Tuning(BaseModel):
    """What a candidate stands for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fusion: FusionSettings
    merge: MergeSettings | None = None
    """How the finetunes become one, of a target that is several."""


@dataclass(frozen=True)
class Given:
    """What there is to fuse."""

    mask: bool = True
    unaligned: bool = False
    finetunes: tuple[str, ...] = ()
    """Those of a merge; none where the target is one finetune."""


class Trial(Protocol):
    """What is needed of optuna's Trial."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...
    def suggest_categorical(
        self, name: str, choices: Sequence[float | int | str | bool]
    ) -> float | int | str | bool: ...


def space_problems(space: Space, given: Given, defaults: Tuning) -> list[str]:
    """Keys that no fusion has (with those there are), values that a key cannot take, keys that no candidate has a use for,
    methods that lack what they need."""
    raise NotImplementedError


def complete_space(space: Space, given: Given, defaults: Tuning) -> Space:
    """With ranges for the numbers that a method of the space cannot do without; what makes sense for the run where it is
    empty."""
    raise NotImplementedError


def suggest(space: Space, trial: Trial, defaults: Tuning) -> Candidate:
    """One candidate of a complete space, asked of an optuna-like trial key by key, those that its method has a use for."""
    raise NotImplementedError


def expressed(tuning: Tuning, space: Space) -> Candidate | None:
    """Settings as a candidate of the space; None where they lie outside of it."""
    raise NotImplementedError


def tuning_of(candidate: Candidate, defaults: Tuning) -> Tuning:
    """The settings that a candidate stands for: what it does not say is as in `defaults` where the method is the same. Raises
    ConfigError for settings that do not fit each other."""
    raise NotImplementedError
