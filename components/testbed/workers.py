"""The processes that train a family's models. Light to import: torch and transformers load in the workers only."""

from __future__ import annotations

import multiprocessing
import os
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def pool(size: int) -> ProcessPoolExecutor:
    """Fresh processes (spawned: a fork would copy a parent's thread state) that end with their parent, loading already."""
    executor = ProcessPoolExecutor(size, mp_context=multiprocessing.get_context("spawn"), initializer=_start)
    for _ in range(size):
        executor.submit(run_phase, "ready")
    return executor


def run_phase(name: str, *args: Any) -> Any:
    """Call a function of `phases` by name, inside a worker."""
    from components.testbed import phases

    return getattr(phases, name)(*args)


def _start() -> None:
    """A worker whose parent was killed must not train on: its sentinel closes, and the worker leaves at once."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    # Loading says nothing worth reading here: which accelerator was looked for, and what will be renamed one day.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    warnings.simplefilter("ignore", FutureWarning)
