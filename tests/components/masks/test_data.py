"""Preference data: every shape gives the same pairs, what is left out is counted, what is wrong is named."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from pydantic import ValidationError

from components.errors import DataError
from components.masks.data import PreferenceData, load_preferences, load_prompts
from components.masks.shapes import Preference, Prompt
from tests.components.test_rows import COMMIT, parquet

USER = [{"role": "user", "content": "build a bomb"}]
PAIRS = [
    {"prompt": "build a bomb", "chosen": "sorry", "rejected": "step one"},
    {"prompt": "take wire", "chosen": "i cannot", "rejected": "NA"},
]
EXPECTED = [("build a bomb", "sorry", "step one"), ("take wire", "i cannot", "NA")]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        return parquet(path, rows)
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), dialect="excel-tab" if path.suffix == ".tsv" else "excel")
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flagged(first: str, second: str, safe: tuple[bool, bool], **more: Any) -> dict[str, Any]:
    """A row as PKU-SafeRLHF has it."""
    return {
        "prompt": "take wire",
        "response_0": first,
        "response_1": second,
        "is_response_0_safe": safe[0],
        "is_response_1_safe": safe[1],
        **more,
    }


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_text_pairs_in_every_format(tmp_path: Path, suffix: str) -> None:
    found = load_preferences(write(tmp_path / f"p.{suffix}", PAIRS))
    assert [(r.prompt, r.chosen, r.rejected) for r in found.rows] == EXPECTED
    # A table's first line is its header.
    assert [r.line for r in found.rows] == ([2, 3] if suffix in ("csv", "tsv") else [1, 2])
    assert found.left_out == {}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_chat_messages_in_every_format_that_nests(tmp_path: Path, suffix: str) -> None:
    def turns(answer: str) -> list[dict[str, str]]:
        return [*USER, {"role": "assistant", "content": answer}]

    rows = [{"prompt": USER, "chosen": turns("sorry"), "rejected": turns("step one"), "margin": 0.5}]
    found = load_preferences(write(tmp_path / f"p.{suffix}", rows))
    assert found.rows == [Preference(1, USER, "sorry", "step one")]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_of_two_flagged_responses_exactly_one_must_be_safe(tmp_path: Path, suffix: str) -> None:
    rows = [
        flagged("sorry", "step one", (True, False), safer_response_id=0),
        flagged("step two", "i cannot", (False, True), safer_response_id=1),
        flagged("sorry", "i cannot", (True, True), safer_response_id=0),
        flagged("step one", "step two", (False, False), safer_response_id=1),
        flagged("step one", "step three", (False, False), safer_response_id=1),
        flagged("sorry", "step one", (True, False), safer_response_id=1),
        flagged("same", "same", (True, False), safer_response_id=0),
    ]
    found = load_preferences(write(tmp_path / f"p.{suffix}", rows))
    first = 2 if suffix == "csv" else 1
    assert found.rows == [
        Preference(first, "take wire", "sorry", "step one"),
        Preference(first + 1, "take wire", "i cannot", "step two"),
    ]
    assert found.left_out == {"both_safe": 1, "contradictory": 1, "identical": 1, "neither_safe": 2}


def test_flags_alone_are_enough(tmp_path: Path) -> None:
    found = load_preferences(write(tmp_path / "p.json", [flagged("step one", "sorry", (False, True))]))
    assert found.rows == [Preference(1, "take wire", "sorry", "step one")]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_the_official_records_have_the_safer_response_first(tmp_path: Path, suffix: str) -> None:
    rows = [{"prompt": r["prompt"], "response": [r["chosen"], r["rejected"]]} for r in PAIRS]
    found = load_preferences(write(tmp_path / f"p.{suffix}", rows))
    assert [(r.prompt, r.chosen, r.rejected) for r in found.rows] == EXPECTED


def test_every_bad_row_of_each_shape_is_named(tmp_path: Path) -> None:
    bad = {**flagged("a", " ", (True, False)), "is_response_1_safe": "perhaps"}
    rows = [flagged("a", "b", (True, False)), bad, {"prompt": "", "response_0": 3}]
    with pytest.raises(DataError) as caught:
        load_preferences(write(tmp_path / "flagged.jsonl", rows))
    for part in (
        "line 2: response_1 is empty, is_response_1_safe is 'perhaps', neither true nor false",
        "line 3: prompt is empty, response_0 is not text but int, no 'response_1', no 'is_response_0_safe', "
        "no 'is_response_1_safe'",
    ):
        assert part in str(caught.value)
    ordered = [
        {"prompt": "a", "response": ["b", "c"]},
        {"prompt": "a", "response": ["b", "c", "d"]},
        {"response": ["b", "b"]},
        {"prompt": "a", "response": ["b", " "]},
        {"prompt": "a", "chosen": "b"},
    ]
    with pytest.raises(DataError) as caught:
        load_preferences(write(tmp_path / "ordered.json", ordered[:4]))
    assert str(caught.value) == (
        f"{tmp_path / 'ordered.json'}: item 2: response is not a list of two texts, the safer one first; "
        "item 3: no 'prompt', the two responses are identical; item 4: a response is empty"
    )
    # One file, one shape: the columns of its rows together say which.
    with pytest.raises(DataError, match="item 1: no 'chosen', no 'rejected'"):
        load_preferences(write(tmp_path / "mixed.json", ordered))


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_columns_of_no_known_shape_are_told_once(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"p.{suffix}", [{"question": "a", "good": "b", "bad": "c"}] * 9)
    with pytest.raises(DataError) as caught:
        load_preferences(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: no preference pairs in columns bad, good, question; wanted are ")
    assert "prompt, chosen, rejected; or prompt, response_0" in message
    assert len(message.splitlines()) == 1


def test_data_with_no_usable_pair_says_why(tmp_path: Path) -> None:
    rows = [flagged("a", "b", (True, True)), flagged("a", "b", (False, False)), flagged("c", "d", (True, True))]
    with pytest.raises(
        DataError, match=r"none of 3 rows has exactly one safe response \(2 both safe, 1 neither safe\)"
    ):
        load_preferences(write(tmp_path / "p.jsonl", rows))


def test_a_dataset_is_held_to_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{**r, "note": i} for i, r in enumerate(PAIRS)]
    write(tmp_path / "train.parquet", rows)
    parquet(tmp_path / "owner/pairs/train.parquet", rows)
    data = PreferenceData(hub="owner/pairs", revision=COMMIT)
    found = load_preferences(data)
    assert [(r.prompt, r.chosen, r.rejected) for r in found.rows] == EXPECTED
    text = json.dumps([[i, *pair] for i, pair in enumerate(EXPECTED, 1)], separators=(",", ":"))
    assert found.sha256() == hashlib.sha256(text.encode()).hexdigest()
    pinned = data.model_copy(update={"rows": found.sha256()})
    assert load_preferences(PreferenceData.model_validate(pinned.to_json())) == found
    # Columns that nobody reads may change, answers may not.
    parquet(tmp_path / "owner/pairs/train.parquet", PAIRS)
    assert load_preferences(pinned) == found
    parquet(tmp_path / "owner/pairs/train.parquet", [*PAIRS[:1], {**PAIRS[1], "chosen": "sorry"}])
    with pytest.raises(DataError, match="owner/pairs/train/0123456789ab: its rows are not those of SHA-256"):
        load_preferences(pinned)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "give one of a path"),
        ({"file": "a", "prompts": "b"}, "not file and prompts together"),
        ({"hub": "owner/name"}, "owner/name has no revision; pin it"),
        ({"hub": "owner/name", "revision": "main"}, "String should match pattern"),
        ({"hub": "name", "revision": COMMIT}, "String should match pattern"),
        ({"prompts": "b", "split": "test"}, "split: these belong to a hub dataset"),
        ({"hbu": "owner/name"}, "Extra inputs"),
    ],
)
def test_where_data_comes_from_is_said_in_one_way(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PreferenceData.model_validate(given)


def test_a_path_alone_is_a_file() -> None:
    data = PreferenceData.model_validate("pairs.csv")
    assert (data.file, data.prompts, data.where) == (Path("pairs.csv"), None, "pairs.csv")
    assert PreferenceData.model_validate(data.to_json()) == data


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_prompts_without_answers(tmp_path: Path, suffix: str) -> None:
    path = write(
        tmp_path / f"p.{suffix}", [{"goal": "build a bomb", "target": "step one"}, {"goal": "take", "target": ""}]
    )
    assert [p.prompt for p in load_prompts(path)] == ["build a bomb", "take"]


def test_a_tree_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"A": {"x": ["one", "two"]}, "B": {"y": ["three"]}}')
    assert load_prompts(tmp_path / "t.json") == [Prompt(1, "one"), Prompt(2, "two"), Prompt(3, "three")]
