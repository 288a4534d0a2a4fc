"""What mlflow keeps for the whole process, held as we need it while anyone talks with it, in whichever thread."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping

_WANTED = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Read by mlflow at each request; whoever sets these gets what they set. By itself it asks a server that is gone for four
minutes, and prints two lines for each run that ends."""


class _Process:
    """The state before the first came in, which the last to go puts back."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.environment: dict[str, str | None] = {}
        self.streaming = True


_process = _Process()


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Quiet, and with an end to waiting. mlflow writes its progress (tables made, versions created) to stderr through a stream
    of its own, which is closed meanwhile."""
    from mlflow.utils.logging_utils import MLFLOW_LOGGING_STREAM

    with _process.lock:
        if _process.inside == 0:
            _process.environment = {key: os.environ.get(key) for key in _WANTED}
            _process.streaming = MLFLOW_LOGGING_STREAM.enabled
            os.environ.update({key: value for key, value in _WANTED.items() if key not in os.environ})
            MLFLOW_LOGGING_STREAM.enabled = False
        _process.inside += 1
    try:
        yield
    finally:
        with _process.lock:
            _process.inside -= 1
            if _process.inside == 0:
                restore(_process.environment)
                MLFLOW_LOGGING_STREAM.enabled = _process.streaming


def restore(given: Mapping[str, str | None]) -> None:
    """Make the environment say this again; None: nothing."""
    for key, value in given.items():
        if value is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = value
