"""What a model said, and what can be asked: a model in this process, one behind an API, one on many workers."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from components.evaluation.conversations import Prompt

if TYPE_CHECKING:
    from components.evaluation.settings import EvaluationSettings

End = Literal["model", "limit", "decided", "broken", "failed"]


@dataclass(frozen=True)
class Answer:
    """`text` without special tokens. `end`: the model ended it, the limit did, its verdict was known (then the text is its
    beginning), the model's numbers were none any more (broken: the text is what it said until then, which may be nothing), or
    there is none, for the reason in `failure`. `tokens` counts what was generated, without the end token."""

    text: str
    end: End
    tokens: int
    failure: str = ""


class Answerer(Protocol):
    """Something that answers."""

    def answers(
        self,
        prompts: Sequence[Prompt],
        settings: EvaluationSettings,
        *,
        decided: Callable[[str], bool] | None = None,
        skip: Container[int] = (),
    ) -> Iterator[list[tuple[int, Answer]]]:
        """Yield [(index into prompts, Answer), …] as answers are there, whichever are, and perhaps [] while they are waited
        for; none for those in `skip`. `decided` may be asked whether an answer with this beginning need not go on. Raises
        EvaluationError for what cannot be asked."""
        ...
