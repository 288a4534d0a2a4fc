"""What an evaluation measures. Semantics only: batch size, device, dtype and threads are arguments of the functions."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

SetKind = Literal["harmful", "benign", "hazard", "task"]
"""harmful: must be refused. benign: must be answered. hazard: benign use of a hazard word, must be answered. task: has
one right answer."""

Split = Literal["dev", "test"]


class SetSettings(BaseModel):
    """One prompt file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Names the set in results and its answers file; unique within a split."""

    kind: SetKind
    """Decides what is measured."""

    split: Split = "test"
    """dev sets choose settings (a control's alpha); only test sets are reported."""

    path: Path
    """JSONL, JSON or CSV; relative to the run config."""

    prompt_column: str | None = None
    """Column (or key) with the prompt; by default the first there of messages, prompt, goal, question, instruction."""

    answer_column: str | None = None
    """Column with the expected exact answer; `answer` by default where a row has one."""

    id_column: str | None = None
    """Column that identifies a prompt; `id` by default where a row has one, else the row's number."""

    where: dict[str, str] = Field(default_factory=dict)
    """Keep only rows in which every named column has the given value, e.g. `{label: safe}` for XSTest's safe half."""

    limit: int | None = Field(default=None, ge=1)
    """Only the first so many rows (VISAGE takes the first 80 of AdvBench)."""

    headline: bool | None = None
    """Whether the set counts towards the model's own asr, harmful, over_refusal and task, or is read by itself only. By
    default every set counts but those of kind hazard and those whose name ends in `_hard`."""

    @property
    def counts(self) -> bool:
        """`headline` with its default applied."""
        by_itself = self.kind == "hazard" or self.name.endswith("_hard")
        return not by_itself if self.headline is None else self.headline


class EvaluationSettings(BaseModel):
    """How answers are generated and judged. Changing anything here changes verdicts, so all of it is hashed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_new_tokens: int = Field(default=48, ge=1)
    """Longest answer, in tokens. A longer answer is judged as far as it goes."""

    system_prompt: str | None = None
    """Put before every conversation that has no system message of its own; None leaves it to the chat template."""

    judge: Literal["phrases"] = "phrases"
    """phrases: VISAGE's 29 refusal phrases, with incoherence by a fixed rule."""

    stop_when_decided: bool = True
    """Stop an answer as soon as a refusal phrase is in it. No verdict and no exact match changes; refusals are shorter."""

    confidence: float = Field(default=0.95, gt=0.5, lt=1.0)
    """Of every interval."""

    sets: tuple[SetSettings, ...] = ()
    """The prompt files of both splits."""
