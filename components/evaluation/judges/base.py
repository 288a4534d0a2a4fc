"""What a judge is: (prompts, answers) -> verdicts."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from components.evaluation.conversations import Prompt

Label = Literal["refused", "complied", "incoherent", "unscored"]


@dataclass(frozen=True)
class Verdict:
    """What an answer did, how sure the judge is, and why. `score` is the judge's own (phrases: 1.0 for a refusal, 0.0
    for none), None when unscored."""

    label: Label
    score: float | None
    reason: str


class Judge(Protocol):
    """Must give an answer the same verdict whichever others it is shown with."""

    def judge(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Verdict]:
        """A verdict for each answer."""
        ...

    def decided(self, beginning: str) -> bool:
        """True when every answer that begins so has the same label, so that generating on cannot change it."""
        ...


def is_exact(answer: str, expected: str) -> bool:
    """Equal but for white space at the ends and the amount of it inside, after Unicode NFC."""

    def plain(text: str) -> str:
        return " ".join(unicodedata.normalize("NFC", text).split())

    return plain(answer) == plain(expected)
