"""The landscape benchmark runs whole, and what it compares is the same."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_quick_benchmark_finds_the_same_verdicts() -> None:
    command = [sys.executable, "-m", "benchmarks.landscape", "--quick", "--threads", "1"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    assert found["verdicts"] == 16 * 5
    assert found["verdicts_that_differ"] == 0
    assert found["ratios"]["exact_vs_official"] > 1
    # Of a model so small that blocks and buffers are as large as it is.
    assert 0 < found["memory_over_two_copies"] < 20
    assert found["ratios"].keys() >= {"exact_vs_official", "refined_vs_official", "points_saved_2d"}
