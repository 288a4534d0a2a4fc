"""Which form of a realigned model is served: soft, binary or tuned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FORMS = ("soft", "binary", "tuned")
"""The forms of a realigned model: the mask's two, and what was made with settings of its own."""


def choose_form(dev: Mapping[str, Mapping[str, Any]], *, select: str, max_asr: float) -> str | None:
    """The form to serve of those that were measured (form -> its dev rates); None where there is none.

    `select` names one, or is `auto`: the tuned one where there is one, which was chosen among many before; else what looks
    best on dev alone: safe enough first, then skill, then few refusals of benign prompts.
    """
    if select == "auto" and "tuned" in dev:
        return "tuned"
    if select != "auto":
        return select if select in dev else None

    def goodness(form: str) -> tuple[float, float, float]:
        rates = dev[form]
        too_unsafe = max(rates["asr"]["value"] - max_asr, 0.0)
        skill = rates["task"]["value"] if "task" in rates else 0.0
        refusals = rates["over_refusal"]["value"] if "over_refusal" in rates else 0.0
        return (-too_unsafe, skill, -refusals)

    return max(dev, key=goodness, default=None)
