"""What a killed evaluation leaves and the next one makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from components.evaluation.answers import Answer
from components.evaluation.conversations import Prompt
from components.evaluation.prompts import PromptSet
from components.evaluation.settings import EvaluationSettings
from components.evaluation.state import AnswerState

ANSWER = Answer("I cannot help.", "model", 4)
SET = PromptSet(
    "harmful", "harmful", "test", True, Path("harmful.jsonl"), "0" * 64,
    tuple(Prompt(str(i), ({"role": "user", "content": f"prompt {i}"},)) for i in range(3)),
)  # fmt: skip


def opened(directory: Path) -> AnswerState:
    return AnswerState.open(directory, SET, EvaluationSettings())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The state of a set whose answers came in two lines."""
    state = opened(tmp_path)
    state.add([(0, ANSWER), (1, replace(ANSWER, text="我不能帮助你\u2028。"))])
    state.add([(2, ANSWER)])
    return next(tmp_path.iterdir())


def test_a_line_cut_anywhere_is_made_again(file: Path) -> None:
    whole = file.read_bytes()
    second = whole.rfind(b"\n", 0, -1) + 1
    first = whole.find(b"\n") + 1
    answers = opened(file.parent).answers
    assert answers[1].text == "我不能帮助你\u2028。"
    for end in range(first, len(whole)):  # also within a character of three bytes
        file.write_bytes(whole[:end])
        state = opened(file.parent)
        assert state.answers == {i: a for i, a in answers.items() if end >= second and i < 2}
        assert file.read_bytes() == whole[: second if end >= second else first]


@pytest.mark.parametrize(
    "damage",
    [b"\x00\x00", b"{", b"[1]", b"7", b'{"answers": 1}', b'[[0, {"words": 1}]]', b"\xe6\x88"],
)
def test_a_damaged_whole_line_starts_the_set_afresh(file: Path, damage: bytes) -> None:
    header, first, second = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(header + first + damage + b"\n" + second)
    state = opened(file.parent)
    assert state.answers == {}
    assert file.read_bytes() == header
    state.add([(0, ANSWER)])
    assert opened(file.parent).answers == {0: ANSWER}


def test_answers_to_other_prompts_under_the_same_names_are_not_taken(tmp_path: Path) -> None:
    AnswerState.open(tmp_path, SET, EvaluationSettings()).add([(0, ANSWER)])
    assert opened(tmp_path).answers
    begun = replace(SET, prompts=tuple(replace(prompt, begun="Sure,") for prompt in SET.prompts))
    assert AnswerState.open(tmp_path, begun, EvaluationSettings()).answers == {}
