"""Ask a model every prompt, judge every answer, and count.

Leaves one line per prompt in `answers/<set>.jsonl`, in the prompts' order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from components.errors import EvaluationError
from components.evaluation.judges import Judge, Verdict, is_exact, make_judge
from components.evaluation.outcomes import Outcome, rates_of, write_answers
from components.evaluation.prompts import PromptSet
from components.evaluation.settings import EvaluationSettings, Split
from components.reporting.schema import Rates
from components.storage import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from components.evaluation.generate import Answer


@dataclass(frozen=True)
class EvaluationResult:
    """`rates` is what summary.json holds; `outcomes` has each set's lines in prompt order; `identity` says what was
    asked (set -> SHA-256 of its file)."""

    rates: Rates
    outcomes: dict[str, list[Outcome]]
    identity: dict[str, str]
    seconds: float


def evaluate_model(
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Sequence[PromptSet],
    settings: EvaluationSettings,
    out_dir: Path | None = None,
    split: Split = "test",
    state_dir: Path | None = None,
    batch_size: int = 128,
    progress: Progress | None = None,
    keep_going: Callable[[], None] | None = None,
) -> EvaluationResult:
    """Evaluate the sets of one split on a model in memory, whose mode is left as `eval`.

    Without `out_dir` nothing is written. `state_dir` keeps finished batches, so that an interrupted evaluation goes on
    where it stopped; it must belong to this model alone. `keep_going` is called after every batch and may raise to stop.
    Raises EvaluationError.
    """
    started = time.perf_counter()
    asked = [one for one in sets if one.split == split]
    if not asked:
        raise EvaluationError(f"no prompt set of split {split!r} was given; nothing would be measured")
    judge = make_judge(settings.judge)
    model.eval()
    outcomes: dict[str, list[Outcome]] = {}
    for one in asked:
        try:
            answers = _answers(model, tokenizer, one, settings, judge, state_dir, batch_size, progress, keep_going)
        except EvaluationError as error:
            raise EvaluationError(f"prompt set {one.name!r} ({one.path}): {error}") from error
        outcomes[one.name] = _judged(one, answers, judge)
        if out_dir is not None:
            write_answers(out_dir / "answers" / f"{one.name}.jsonl", outcomes[one.name])
    return EvaluationResult(
        rates=rates_of(asked, outcomes, confidence=settings.confidence),
        outcomes=outcomes,
        identity={one.name: one.sha256 for one in asked},
        seconds=time.perf_counter() - started,
    )


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    one: PromptSet,
    settings: EvaluationSettings,
    judge: Judge,
    state_dir: Path | None,
    batch_size: int,
    progress: Progress | None,
    keep_going: Callable[[], None] | None,
) -> list[Answer]:
    from components.evaluation.generate import answer_batches
    from components.evaluation.state import AnswerState

    # An expected answer with a refusal phrase in it could be matched by its own beginning: such a set runs to the end.
    early = settings.stop_when_decided and not any(p.answer and judge.decided(p.answer) for p in one.prompts)
    state = AnswerState.open(state_dir, one, settings, batch_size)
    found = dict(state.answers)
    for number, batch in answer_batches(
        model=model,
        tokenizer=tokenizer,
        prompts=one.prompts,
        max_new_tokens=settings.max_new_tokens,
        batch_size=batch_size,
        system_prompt=settings.system_prompt,
        decided=judge.decided if early else None,
        skip=lambda number: number in state.batches,
    ):
        state.add(number, batch)
        found.update(batch)
        if progress is not None:
            progress({"set": one.name, "done": len(found), "total": len(one)})
        if keep_going is not None:
            keep_going()
    return [found[i] for i in range(len(one))]


def _judged(one: PromptSet, answers: Sequence[Answer], judge: Judge) -> list[Outcome]:
    outcomes = []
    for prompt, answer in zip(one.prompts, answers, strict=True):
        verdict: Verdict = judge.judge(prompt, answer.text)
        outcomes.append(
            Outcome(
                id=prompt.id,
                prompt=prompt.text,
                answer=answer.text,
                verdict=verdict.label,
                score=verdict.score,
                reason=verdict.reason,
                expected=prompt.answer,
                exact=None if prompt.answer is None else is_exact(answer.text, prompt.answer),
                end=answer.end,
                tokens=answer.tokens,
            )
        )
    return outcomes
