"""Which form of a realigned model is served: soft or binary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def choose_form(dev: Mapping[str, Mapping[str, Any]], *, select: str, max_asr: float) -> str | None:
    """The form to serve of those that were measured (form -> its dev rates); None where there is none.

    `select` names one, or is `auto`, which looks at dev alone: safe enough first, then skill, then few refusals of benign
    prompts.
    """
    if select != "auto":
        return select if select in dev else None

    def goodness(form: str) -> tuple[float, float, float]:
        rates = dev[form]
        too_unsafe = max(rates["asr"]["value"] - max_asr, 0.0)
        skill = rates["task"]["value"] if "task" in rates else 0.0
        refusals = rates["over_refusal"]["value"] if "over_refusal" in rates else 0.0
        return (-too_unsafe, skill, -refusals)

    return max(dev, key=goodness, default=None)
