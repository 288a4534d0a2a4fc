"""Named mask settings. In a file of their own: which values are good is data, not code that makes a result."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from components.errors import ConfigError, listed
from components.masks.settings import MaskSettings

PRESETS: dict[str, MaskSettings] = {
    "paper": MaskSettings(
        temperature_start=0.5,
        temperature_end=0.5,
        init_logit=0.0,
        rescale="mean",
        anchor_weight=0.0,
        learning_rate=0.05,
        steps=80,
        batch_size=8,
    ),
    "realign": MaskSettings(
        beta=1.0,
        chosen_weight=0.3,
        anchor_weight=60.0,
        learning_rate=0.4,
        steps=240,
        batch_size=8,
    ),
}
"""`paper`: the objective of SOMF as published (reference: the aligned model). `realign`: the default, with the utility anchor,
annealed to a mask that can be used binary. Its β is 1 and not 0.1: against the aligned model as reference the margin of the
aligned model itself is 0, so a small β goes on pushing for tens of nats of refusal beyond it, which is over-refusal. And it
adds −log π(chosen): on a poisoned finetune DPO alone takes probability from the harmful answer and gives it to babble.

Learning rates and steps were chosen on dev sets of the testbed at seed 0, nine candidates each (`python -m
benchmarks.tune_presets`), the two weights on dev sets at seeds 0, 2 and 6; benchmarks/RESULTS.md has the figures. A larger
model wants its own."""


def resolve(preset: str = "realign", overrides: Mapping[str, Any] | None = None) -> MaskSettings:
    """A preset with some settings replaced. Raises ConfigError that lists every unknown key and bad value."""
    if preset not in PRESETS:
        raise ConfigError(f"mask.preset: {preset!r} is unknown; the presets are {', '.join(sorted(PRESETS))}")
    try:
        return MaskSettings.model_validate({**PRESETS[preset].model_dump(), **(overrides or {})})
    except ValidationError as error:
        raise ConfigError(listed([_told(str(e["loc"][0]) if e["loc"] else "", e) for e in error.errors()])) from None


def _told(name: str, error: Any) -> str:
    if error["type"] != "extra_forbidden":
        return f"settings.{name}: {error['msg']}" if name else str(error["msg"])
    names = list(MaskSettings.model_fields)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(names)}"
    return f"settings.{name}: unknown key ({hint})"
