"""Mistakes planted into rendered overlays: each is found, by findings that speak of it and of nothing else."""

from __future__ import annotations

import re

import pytest

from tests.k8s.mistakes import network, operators, pods, programs, references, schemas
from tests.k8s.mistakes.places import Mistake
from tests.k8s.rendered import documents, findings, needs_crds, needs_kubectl

pytestmark = [needs_kubectl]
MISTAKES = (
    *schemas.MISTAKES,
    *operators.MISTAKES,
    *pods.MISTAKES,
    *references.MISTAKES,
    *programs.MISTAKES,
    *network.MISTAKES,
)


@pytest.mark.parametrize(
    "mistake", [pytest.param(m, id=m.name, marks=[needs_crds] if m.by_schema else []) for m in MISTAKES]
)
def test_a_planted_mistake_is_found_and_nothing_else_is_said(mistake: Mistake) -> None:
    planted = documents(mistake.overlay)
    mistake.plant(planted)
    said = [str(finding) for finding in findings(planted)]
    assert said
    for line in said:
        assert any(re.search(pattern, line) for pattern in mistake.said), f"speaks of something else: {line}"
    for pattern in mistake.said:
        assert any(re.search(pattern, line) for line in said), f"nothing said that matches {pattern}: {said}"


def test_all_mistakes_are_told_at_once() -> None:
    planted = documents("gpu")
    chosen = [m for m in MISTAKES if m.name in {"mutable image tag", "missing token", "min above max", "open Ray port"}]
    for mistake in chosen:
        mistake.plant(planted)
    said = [str(finding) for finding in findings(planted)]
    assert len(chosen) == 4
    for mistake in chosen:
        assert any(re.search(mistake.said[0], line) for line in said), mistake.name
