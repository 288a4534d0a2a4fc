"""Data files: what is accepted, what every error says, tokenisation, and the order of the data."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from components.errors import DataError
from components.masks.data import load_preferences, load_prompts
from components.masks.preferences import Row, Schedule, encode_pairs, encode_prompt, encode_row
from components.masks.shapes import Preference, Prompt
from tests.components.masks.support import SPECIAL, WORDS, tokenizer

USER = [{"role": "user", "content": "build a bomb"}]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def test_text_and_messages_mean_the_same(tmp_path: Path) -> None:
    turn = {"role": "assistant", "content": "sorry"}
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "build a bomb", "chosen": "sorry", "rejected": "step one"},
        "",
        {"prompt": USER, "chosen": [turn], "rejected": [{**turn, "content": "step one"}]},
        {"chosen": [*USER, turn], "rejected": [*USER, {**turn, "content": "step one"}]},
        {"prompt": "line\u2028separator", "chosen": "sorry", "rejected": "step one", "source": "ignored"},
    )
    rows = load_preferences(path).rows
    assert rows == [
        Preference(1, "build a bomb", "sorry", "step one"),
        Preference(3, USER, "sorry", "step one"),
        Preference(4, USER, "sorry", "step one"),
        Preference(5, "line\u2028separator", "sorry", "step one"),
    ]
    words = tokenizer()
    assert len({encode_row(words, r.prompt, r.chosen) for r in rows[:3]}) == 1


def test_every_bad_line_is_listed_with_its_number(tmp_path: Path) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = write(
        tmp_path / "bad.jsonl",
        good,
        {"prompt": "a", "chosen": "b"},
        "{not json",
        [1, 2],
        {**good, "rejected": "b"},
        {"chosen": "b", "rejected": "  "},
        {**good, "chosen": [{"role": "user", "content": "x"}]},
        {**good, "prompt": [{"role": "user"}]},
        {**good, "chosen": [{"role": "user", "content": "other"}, {"role": "assistant", "content": "x"}]},
    )
    with pytest.raises(DataError) as raised:
        load_preferences(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    for part in (
        "line 2: no 'rejected'",
        "line 3: not JSON",
        "line 4: not a JSON object",
        "line 5: chosen and rejected are identical",
        "line 6: rejected is empty",
        "line 7: chosen does not end with an assistant message",
        "line 8: prompt holds a message without a text role and content",
        "line 9: the messages of chosen before its answer are not the prompt",
    ):
        assert part in message
    assert "line 1:" not in message


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "e.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"e\.jsonl: the file is empty"):
        load_preferences(tmp_path / "e.jsonl")
    with pytest.raises(DataError, match=r"e\.jsonl: the file is empty"):
        load_prompts(tmp_path / "e.jsonl")


def test_a_prompt_without_any_prompt_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1: no 'prompt'"):
        load_preferences(write(tmp_path / "n.jsonl", {"chosen": "a", "rejected": "b"}))
    with pytest.raises(DataError, match="cannot be read"):
        load_preferences(tmp_path / "absent.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(DataError, match="not UTF-8"):
        load_preferences(tmp_path / "latin.jsonl")


def test_anchor_prompts(tmp_path: Path) -> None:
    answered = [*USER, {"role": "assistant", "content": "x"}]
    path = write(tmp_path / "a.jsonl", {"messages": USER}, {"messages": answered}, {"prompt": "spell"})
    assert load_prompts(path) == [Prompt(1, USER), Prompt(2, USER), Prompt(3, "spell")]
    bad = write(
        tmp_path / "b.jsonl", {"messages": []}, {"text": "x"}, {"messages": [{"role": "system", "content": "s"}]}
    )
    with pytest.raises(DataError) as raised:
        load_prompts(bad)
    assert "line 1: messages is neither text nor a list of messages" in str(raised.value)
    assert "line 2: no 'messages'" in str(raised.value)
    assert "line 3: messages do not end with a user's turn" in str(raised.value)


def ids(text: str) -> tuple[int, ...]:
    names = [*SPECIAL, "<unk>", *WORDS]
    return tuple(names.index(word) for word in text.split())


def test_rows_are_tokenised_by_the_chat_template_and_end_with_the_end_token() -> None:
    words = tokenizer()
    prompt = ids("<user> build a bomb <end> <assistant>")
    assert encode_prompt(words, "build a bomb") == prompt
    # The template's line break after <end> is not part of the answer.
    assert encode_row(words, USER, "sorry i cannot") == Row(prompt + ids("sorry i cannot <end>"), len(prompt))


def test_a_tokenizer_without_template_takes_plain_text_only() -> None:
    words = tokenizer()
    words.chat_template = None
    assert encode_row(words, "build a", "bomb") == Row(ids("build a bomb <end>"), 2)
    with pytest.raises(DataError, match="has no chat template"):
        encode_row(words, USER, "bomb")


def test_a_conversation_that_the_template_refuses_is_named() -> None:
    words = tokenizer()
    words.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"refuses the conversation that ends in 'build a bomb': roles must alternate"):
        encode_row(words, "build a bomb", "sorry")


def test_pairs_that_are_too_long_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [Preference(1, "a", "b", "c"), Preference(2, "a", "b", "b " * 20), Preference(3, "a", "c", "b")]
    pairs, dropped = encode_pairs(tokenizer(), rows, 12, tmp_path)
    assert ([p.line for p in pairs], dropped) == ([1, 3], 1)
    with pytest.raises(DataError, match=r"every pair is longer than mask\.max_length = 3"):
        encode_pairs(tokenizer(), rows, 3, tmp_path)


def test_each_epoch_is_a_permutation_and_a_step_depends_on_nothing_else() -> None:
    schedule = Schedule(10, 4, seed=3, what="pairs")
    taken = [i for step in range(15) for i in schedule.batch(step)]
    for epoch in range(6):
        assert sorted(taken[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert taken[:10] != taken[10:20]
    for step in (14, 3, 7, 0):
        assert Schedule(10, 4, seed=3, what="pairs").batch(step) == taken[4 * step : 4 * step + 4]
    assert Schedule(10, 4, seed=4, what="pairs").batch(0) != taken[:4]
    assert Schedule(10, 4, seed=3, what="anchors").batch(0) != taken[:4]
    assert Schedule(10, 4, seed=3, what="pairs").used(2) == sorted(taken[:8])
    assert Schedule(10, 4, seed=3, what="pairs").used(3) == list(range(10))
    assert Counter(Schedule(3, 7, seed=0, what="pairs").batch(0)).total() == 7
