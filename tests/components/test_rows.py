"""Rows of every format, as they were written; what cannot be read is named with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from components.errors import DataError
from components.rows import DataRow, hub_rows, read_rows, require_readable

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS: list[dict[str, Any]] = [
    {"prompt": "NA", "n": "007", "turns": [{"role": "user", "content": "a\nb"}]},
    {"prompt": "line\u2028separator, \"quoted\"", "n": "null", "turns": [{"role": "user", "content": "ü"}]},
]  # fmt: skip


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Written by pyarrow, not by the library that reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "a [1]*.parquet", "R.PARQUET"])
def test_nested_rows_come_back_as_they_were_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    else:
        parquet(path, ROWS)
    rows = read_rows(path)
    assert [row.fields for row in rows] == ROWS
    assert [row.number for row in rows] == [1, 2]
    assert not any(row.problem for row in rows)


@pytest.mark.parametrize(("name", "delimiter"), [("r.csv", ","), ("r.tsv", "\t")])
def test_a_table_is_text_and_names_the_line_where_a_row_begins(tmp_path: Path, name: str, delimiter: str) -> None:
    text = '\ufeffprompt|n\nNA|007\n"two\nlines"|null\n\nthird|\n'.replace("|", delimiter)
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_rows(tmp_path / name) == [
        DataRow(2, "line 2", {"prompt": "NA", "n": "007"}),
        DataRow(3, "line 3", {"prompt": "two\nlines", "n": "null"}),
        DataRow(6, "line 6", {"prompt": "third", "n": ""}),
    ]


def test_rows_that_cannot_be_read_keep_their_place(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"a": 1}\n\n{"a": \n[1]\n')
    rows = read_rows(path)
    assert [(row.number, bool(row.problem)) for row in rows] == [(1, False), (3, True), (4, True)]
    with pytest.raises(DataError, match=r"r\.jsonl is not JSONL: line 3: not JSON \(.*\); line 4: .*found list"):
        require_readable(path, rows)
    require_readable(path, rows[:1])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("cut.parquet", None, ["not a readable parquet file", "magic bytes"]),
        ("text.parquet", b"prompt\n", ["not a readable parquet file"]),
        ("twice.csv", b"a,b,a\n1,2,3\n", ["names twice: a"]),
        ("r.txt", b"x", [".jsonl, .json, .csv, .tsv or .parquet", "not .txt"]),
        ("rows", b"x", ["a file without suffix"]),
        ("latin.csv", b"a\n\xe9\n", ["not UTF-8 text at byte 2"]),
    ],
)
def test_a_file_of_another_kind_is_one_sentence(
    tmp_path: Path, name: str, content: bytes | None, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(parquet(tmp_path / "whole.parquet", ROWS).read_bytes()[:-20] if content is None else content)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    message = str(caught.value)
    assert str(path) in message
    assert all(word in message for word in words), message
    assert len(message.splitlines()) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.parquet"])
def test_an_absent_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"{name}: cannot be read \(.*correct the path"):
        read_rows(tmp_path / name)


def test_a_dataset_by_name_split_and_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` takes a directory of the dataset's name for the dataset: the same code without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    parquet(tmp_path / "owner/pairs/data/train-00000.parquet", ROWS)
    parquet(tmp_path / "owner/pairs/data/test-00000.parquet", ROWS[:1])
    train = hub_rows("owner/pairs", revision=COMMIT, split="train", config=None)
    assert train == [DataRow(1, "row 1", ROWS[0]), DataRow(2, "row 2", ROWS[1])]
    assert [r.fields for r in hub_rows("owner/pairs", revision=COMMIT, split="test", config="default")] == ROWS[:1]
    for wrong, word in (({"split": "dev"}, "Unknown split"), ({"config": "zh"}, "'zh' not found")):
        with pytest.raises(DataError, match=word) as caught:
            hub_rows("owner/pairs", **{"revision": COMMIT, "split": "train", "config": None, **wrong})
        assert str(caught.value).startswith(f"owner/pairs at {COMMIT}: cannot be read from the hub")


def test_a_dataset_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"owner/absent at .*cannot be read from the hub") as caught:
        hub_rows("owner/absent", revision=COMMIT, split="train", config=None)
    assert len(str(caught.value).splitlines()) == 1
