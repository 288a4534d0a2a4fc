"""Judges: what an answer did, one file each."""

from __future__ import annotations

from components.evaluation.judges.base import Judge
from components.evaluation.judges.phrases import phrase_judge
from components.evaluation.settings import PhraseSettings


def make_judge(settings: PhraseSettings) -> Judge:
    """The judge that settings describe."""
    return phrase_judge(settings)
