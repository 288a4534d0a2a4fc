from __future__ import annotations

from pathlib import Path

import pytest

from tests.components.evaluation import tiny


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory that answers `tiny.LESSONS` word for word."""
    return tiny.build_taught_model(tmp_path_factory.mktemp("sweeps") / "taught")


@pytest.fixture(scope="session")
def untaught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture and vocabulary, without its refusals."""
    lessons = dict.fromkeys(tiny.HARMFUL, "first you take it, then you build it") | tiny.ANSWERED
    return tiny.build_taught_model(tmp_path_factory.mktemp("sweeps") / "untaught", lessons=lessons)
