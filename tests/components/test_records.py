"""Fingerprints: what changes them, what does not, and what may not be hashed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from components.records import OutputFile, Record, canonical_json, fingerprint, hash_outputs

BASE: dict[str, Any] = {"stage": "fuse", "version": 1, "semantics": {"a": 1, "b": [1.5, None]}, "parents": {"p": "f0"}}


def test_fingerprint_is_the_hash_of_the_canonical_text() -> None:
    text = '{"parents":{"p":"f0"},"semantics":{"a":1,"b":[1.5,null]},"stage":"fuse","version":1}'
    assert canonical_json(BASE) == text
    assert fingerprint(**BASE) == hashlib.sha256(text.encode()).hexdigest()[:20]


def test_key_order_does_not_matter_and_every_part_does() -> None:
    same = {**BASE, "semantics": {"b": [1.5, None], "a": 1}}
    assert fingerprint(**same) == fingerprint(**BASE)
    others = [
        {**BASE, "stage": "evaluate"},
        {**BASE, "version": 2},
        {**BASE, "semantics": {"a": 1, "b": [1.5, 0]}},
        {**BASE, "parents": {"p": "f1"}},
        {**BASE, "parents": {"q": "f0"}},
    ]
    assert len({fingerprint(**o) for o in [BASE, *others]}) == 6


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": Path("x")}, r"\$\.a"),
        ({"a": [1, {2}]}, r"\$\.a\[1\]"),
        ({"a": float("nan")}, r"\$\.a"),
        ({1: "a"}, r"key 1 at \$"),
    ],
)
def test_what_is_not_plain_json_is_refused_with_its_place(value: Any, where: str) -> None:
    with pytest.raises(TypeError, match=where):
        canonical_json(value)


def test_every_output_is_listed_with_its_hash(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.bin").write_bytes(b"abc")
    (tmp_path / "record.json").write_text("{}")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # the standard's own example
    assert hash_outputs(tmp_path) == {"sub/a.bin": OutputFile(bytes=3, sha256=digest)}


def test_a_record_survives_its_file() -> None:
    record = Record(
        stage="load", stage_version=1, fingerprint="f", semantics={"a": 1}, execution={}, parents={}, outputs={},
        metrics={"x": 0.5}, code={}, environment={}, started="2026-01-01T00:00:00+00:00", seconds=1.0,
    )  # fmt: skip
    assert Record.model_validate_json(record.to_json()) == record
    assert record.reference == "load/f"
