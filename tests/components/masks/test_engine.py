"""The engine's state on a disk that refuses it."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from components.errors import StorageError
from components.masks.engine import TorchEngine
from tests.components.masks.test_masked_model import masked


@contextmanager
def small_files() -> Iterator[None]:
    """No file of this process may grow over a kilobyte: the system refuses it as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_state_that_cannot_be_written_is_said_with_path_and_remedy(tmp_path: Path) -> None:
    engine = TorchEngine(masked())
    with pytest.raises(StorageError) as caught, small_files():
        engine.save(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'engine-00000-of-00001.safetensors'}: training state cannot be written (")
    assert "File too large" in message
    assert message.endswith("; free some space or choose another workspace")
    assert not (tmp_path / "engine-00000-of-00001.safetensors").exists()
