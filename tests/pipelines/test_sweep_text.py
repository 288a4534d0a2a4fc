"""What `realign sweep` prints."""

from __future__ import annotations

from typing import Any

from pipelines.sweep_text import front_lines, lines_against_own
from tests.components.sweeps.test_result import result


def test_the_table_shows_the_front_the_runs_own_and_what_was_picked() -> None:
    lines = front_lines(result())
    assert "6 candidates, 1 stopped early; 85% of all prompts asked" in lines[0]
    assert lines[1].split()[:6] == ["candidate", "asr", "≤", "25", "%", "task"]
    rows = [line for line in lines[2:] if line.rstrip().endswith(("yes", "no"))]
    assert len(rows) == 3
    assert rows[0].split("  ")[1].strip() == "form soft (the run's own)"
    assert rows[1].startswith("★")
    assert "scale 2" in rows[1]
    assert "25 (4.6–70)" in rows[1]
    assert "form binary (the run's own), not on the front" in rows[2]


def test_winners_are_held_to_the_runs_own_on_the_test_sets() -> None:
    difference = {"asr": {"diff": -0.02, "low": -0.05, "high": 0.01}, "task": {"diff": 0.1, "low": 0.05, "high": 0.15}}
    entry: dict[str, Any] = {
        "name": "zh", "status": "done", "error": None, "after_tuned": {},
        "fused": {"soft": "a/model", "binary": "b/model", "tuned": "c/model"},
        "comparisons": {"tuned_vs_soft": difference, "soft_vs_before": difference},
    }  # fmt: skip
    plain: dict[str, Any] = {"name": "hi", "status": "done", "error": None, "fused": {"soft": "d/model"}}
    summary: Any = {"schema": 1, "run": "r", "aligned": None, "finetunes": [entry, plain]}
    assert lines_against_own(summary) == [
        "zh on the test sets, tuned less soft in points: asr −2.0 (−5.0 to +1.0), task +10.0 (+5.0 to +15.0)"
    ]
    entry["fused"]["tuned"] = "a/model"
    assert lines_against_own(summary) == ["zh: what was picked is the form soft, bit for bit"]
