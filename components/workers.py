"""Work spread over processes that share what their parent has opened.

Processes are forked: open files, maps and imported libraries are theirs at no cost, so that two of them write a model in half
the time of one from the first second on. They end with their parent, however it ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from components.errors import RealignError

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 4
"""Items that wait for each process: enough that none is idle, few enough that a stop is prompt."""
_ORPHANED_S = 0.5
_task: Callable[[Any], Any] | None = None


class WorkerLostError(RealignError):
    """A process was killed: in practice by the system, for memory."""


def spread(
    task: Callable[[Item], Result], items: Sequence[Item], *, processes: int = 1
) -> Iterator[tuple[Item, Result]]:
    """Each item with what `task` makes of it, as they are done; in order, and here, where `processes` is 1.

    `task` may be any callable and use anything that is open when iteration begins; items and results are pickled. An
    exception of `task` ends the iteration. Raises WorkerLostError when a process is killed.
    """
    processes = min(processes, len(items))
    if processes <= 1:
        for item in items:
            yield item, task(item)
        return
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("fork"), initializer=_start, initargs=(task, os.getpid())
    )
    try:
        yield from _drained(pool, items, processes)
    except BrokenProcessPool as error:
        raise WorkerLostError(
            "a worker process was killed: by the system for want of memory, or because a file that it read was cut short; "
            "run the same command again with fewer processes, it goes on where it stopped"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _drained(pool: ProcessPoolExecutor, items: Sequence[Item], processes: int) -> Iterator[tuple[Item, Any]]:
    waiting: deque[tuple[Item, Future[Any]]] = deque()
    following = iter(items)
    while True:
        while len(waiting) < processes * _AHEAD and (item := next(following, None)) is not None:
            waiting.append((item, pool.submit(_run, item)))
        if not waiting:
            return
        item, future = waiting.popleft()
        yield item, future.result()


def _start(task: Callable[[Any], Any], parent: int) -> None:
    global _task
    _task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told too, and ends its pool
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_ORPHANED_S)
    os._exit(1)


def _run(item: Any) -> Any:
    assert _task is not None
    return _task(item)
