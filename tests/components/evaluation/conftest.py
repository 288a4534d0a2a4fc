from __future__ import annotations

from pathlib import Path

import pytest

from tests.components.evaluation import tiny


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory that answers `tiny.LESSONS` word for word."""
    return tiny.build_taught_model(tmp_path_factory.mktemp("evaluation") / "taught")
