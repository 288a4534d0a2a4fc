"""Run stages on Ray: on this machine without a dashboard or an open job port, with retries of what a retry can mend."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from components.evaluation.execution import EvaluationExecution
from ray_jobs.failure import Decision, decide
from ray_jobs.stage import StageAnswer, StageSpec, run_stage

_STARTS = 3
"""How often Ray is started before its not coming up is an error."""
_OBJECT_STORE_BYTES = 128 * 2**20  # only specs and records travel through Ray


_SPREAD = "spread_stage"
"""Resource that a stage takes which waits for processes of its own: one, or as many as CPUs that those take. No more are
begun than there are CPUs."""


@dataclass
class _Pending:
    spec: StageSpec
    tries: int


@dataclass
class RayRunner:
    """Submits stages and hands back their answers as they end. Use through `ray_runner`."""

    cpus: int
    _pending: dict[Any, _Pending] = field(default_factory=dict)
    _task: Any = None

    def submit(self, spec: StageSpec, tries: int = 1) -> None:
        if self._task is None:
            self._start()
        threads = int(spec.execution.get("threads", 1))
        others = {}
        spread = int(spec.execution.get("spread", 0))
        if spread:
            threads = 0  # the stage waits for processes that ask for CPUs themselves
            others = {_SPREAD: float(min(spread, self.cpus))}
        name = f"{spec.stage}/{spec.fingerprint}"
        task = self._task.options(num_cpus=min(threads, self.cpus), resources=others, max_retries=0, name=name)
        self._pending[task.remote(spec.model_dump_json())] = _Pending(spec, tries)

    def wait(self, timeout: float) -> list[tuple[StageSpec, StageAnswer]]:
        """Answers that have come within `timeout` seconds. A stage that raised is tried again, or answered as failed."""
        import ray

        ready, _ = ray.wait(list(self._pending), num_returns=1, timeout=timeout)
        answers = []
        for reference in ready:
            pending = self._pending.pop(reference)
            try:
                answers.append((pending.spec, ray.get(reference)))
            except Exception as error:  # noqa: BLE001 - whatever a stage raised is decided on here, never dropped
                if decide(error, pending.tries) is Decision.RETRY:
                    time.sleep(min(2.0**pending.tries, 10.0))
                    self.submit(pending.spec, pending.tries + 1)
                else:
                    answers.append((pending.spec, _gave_up(error, pending.tries)))
        return answers

    def _start(self) -> None:
        start_ray(self.cpus)
        import ray

        self._task = ray.remote(_run_json)


def start_ray(cpus: int) -> None:
    """A Ray of this machine alone, for this process and its children."""
    # Without a dashboard Ray's node agent still listens for jobs (port 52365), and gRPC ports are open to the network.
    # Ray asks for a token there; ours is random and known to this process and its children alone, not kept in a file
    # of the user's. Ray reads it when imported, once: a second start in this process must find the first one's.
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = _token()
    # What workers import looks for accelerators and says so; stages run on the CPU here.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    on_terminate = signal.getsignal(signal.SIGTERM)
    for tries in range(1, _STARTS + 1):
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                resources={_SPREAD: float(cpus)},
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            break
        except Exception as error:
            # Ray gives its processes half a minute and raises a bare Exception after that; a busy machine needs more.
            if "timed out during startup" not in str(error) or tries == _STARTS:
                raise
            ray.shutdown()
    if threading.current_thread() is threading.main_thread():
        # Ray puts a handler of its own in place, which prints a C++ stack and aborts.
        signal.signal(signal.SIGTERM, on_terminate)


@contextmanager
def started_ray(cpus: int) -> Iterator[None]:
    """`start_ray`, and its end."""
    start_ray(cpus)
    import ray  # after its environment is set

    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def processes(how: EvaluationExecution) -> Iterator[None]:
    """What actors need; nothing where there are none."""
    if how.in_process:
        yield
        return
    with started_ray(max(os.cpu_count() or 1, how.actors)):
        yield


@cache
def _token() -> str:
    return secrets.token_hex(32)


def _run_json(spec_json: str) -> StageAnswer:
    return run_stage(StageSpec.model_validate_json(spec_json))


def _gave_up(error: BaseException, tries: int) -> StageAnswer:
    cause = getattr(error, "cause", None) or error
    trace = "".join(traceback.format_exception(error)).strip()
    message = f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else ''}"
    return {"status": "failed", "error": {"type": "Fault", "message": f"{message} (tries: {tries})", "trace": trace}}


@contextmanager
def ray_runner(cpus: int | None = None) -> Iterator[RayRunner]:
    """A runner that starts Ray at the first submission (a run whose results are all there needs none)."""
    runner = RayRunner(cpus=cpus or os.cpu_count() or 1)
    try:
        yield runner
    finally:
        if runner._task is not None:
            import ray

            ray.shutdown()
