from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from components.errors import DataError
from components.reporting.schema import check_summary, read_summary
from tests.components.reporting.example import summary


def test_a_summary_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(summary()))
    assert read_summary(path) == summary()


def changed(**fields: Any) -> dict[str, Any]:
    return {**summary(), **fields}


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (changed(schema=2), ["schema 2", "reads schema 1"]),
        ([], ["dictionary"]),
        (changed(finetunes=[{"name": "a"}]), ["finetunes.0.status", "finetunes.0.error"]),
        (
            changed(finetunes=[{"name": "a", "status": "fine", "error": None}]),
            ["finetunes.0.status", "'done' or 'failed'"],
        ),
        (changed(aligned={"asr": {"value": math.nan, "low": 0, "high": 1, "n": 9}}), ["aligned.asr.value", "finite"]),
        (
            changed(aligned={"asr": {"value": 0.0, "low": 0, "high": 1, "n": 0}}),
            ["aligned.asr.n", "greater than or equal to 1"],
        ),
        (changed(aligned={"asr": {"value": 1.2, "low": 0, "high": 1}}), ["aligned.asr.value", "aligned.asr.n"]),
        (
            changed(finetunes=[{"name": "a", "status": "done", "error": None, "delta": {"cosines": {"hi": None}}}]),
            ["finetunes.0.delta.cosines.hi", "valid number", "run again"],
        ),
    ],
)
def test_every_misfit_is_named(data: Any, parts: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        check_summary(data, where="summary.json")
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has the run finished"):
        read_summary(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"schema": 1')
    with pytest.raises(DataError, match=r"half\.json is not JSON"):
        read_summary(tmp_path / "half.json")
