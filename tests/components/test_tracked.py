"""Plain values of a run, as a tracker shows them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from components.errors import TrackingError
from components.tracked import Point, flat, rate_metrics, read_series


def test_params_are_flat_text() -> None:
    found = flat({"a": {"b": 1, "c": {"d": 0.5}}, "e": [1, 2], "f": None, "g": True})
    assert found == {"a.b": "1", "a.c.d": "0.5", "e": "[1, 2]", "g": "True"}


def test_rates_become_metrics() -> None:
    interval = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 8}
    assert rate_metrics("before", {"asr": interval, "sets": {"harmful": {"incoherent": interval}}}) == {
        "before/asr": 0.5,
        "before/asr_low": 0.25,
        "before/asr_high": 0.75,
        "before/sets/harmful/incoherent": 0.5,
    }
    assert rate_metrics("before", None) == {}


def test_series_are_read_up_to_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 0, "loss": 0.7, "time": 1.5, "note": "x", "ok": True}, {"step": 5, "loss": 0.5, "lr": 1}]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 10, "lo')
    assert read_series(path, "train_mask") == [
        Point("train_mask/loss", 0, 0.7, 1500),
        Point("train_mask/loss", 5, 0.5),
        Point("train_mask/lr", 5, 1.0),
    ]
    path.write_text('{"loss": 1}\n')
    with pytest.raises(TrackingError, match="line 1"):
        read_series(path, "train_mask")
