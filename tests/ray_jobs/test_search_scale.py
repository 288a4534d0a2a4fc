"""Which scale a training-free control is given."""

from __future__ import annotations

from typing import Any

import pytest

from ray_jobs.search_scale import SCALE_NAME, best_candidate


def tried(method: str, *rates: tuple[float, float, float]) -> list[dict[str, Any]]:
    return [{SCALE_NAME[method]: scale, "asr": asr, "task": task} for scale, asr, task in rates]


def test_skill_decides_among_the_safe_and_safety_without_them() -> None:
    found = tried("interpolation", (0.1, 0.0, 0.0), (0.3, 0.04, 0.2), (0.5, 0.3, 0.9))
    assert best_candidate(found, 0.05, "interpolation")["alpha"] == 0.3
    assert best_candidate(found[2:] + tried("interpolation", (0.4, 0.2, 0.1)), 0.05, "interpolation")["alpha"] == 0.4


@pytest.mark.parametrize(("method", "scale"), [("interpolation", 0.3), ("resta", 0.1)])
def test_of_equals_the_one_nearest_to_the_finetune_is_taken(method: str, scale: float) -> None:
    found = tried(method, (0.1, 0.0, 0.0), (0.3, 0.0, 0.0), (0.2, 0.0, 0.0), (0.9, 0.5, 0.0))
    assert best_candidate(found, 0.05, method)[SCALE_NAME[method]] == scale
