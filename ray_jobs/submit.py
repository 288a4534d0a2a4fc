"""Run stages on Ray, with retries of what a retry can mend: on the cluster that this process belongs to, else on this machine
without a dashboard or an open job port."""

from __future__ import annotations

import logging
import os
import secrets
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from components.errors import ClusterError, error_payload
from components.evaluation.execution import EvaluationExecution
from components.limits import available_cpus
from ray_jobs.cluster import ClusterExecution, Request, amounts, cluster_address, could_hold, join_cluster, no_room
from ray_jobs.failure import Decision, decide
from ray_jobs.signals import sigterm_kept
from ray_jobs.stage import StageAnswer, StageSpec, run_stage

_STARTS = 3
"""How often Ray is started before its not coming up is an error."""
_OBJECT_STORE_BYTES = 128 * 2**20  # only specs and records travel through Ray
_SPREAD = "spread_stage"
"""Resource of this machine's Ray that a stage takes which waits for processes of its own: one, or as many as CPUs that those
take. No more are begun than there are CPUs."""
_JUDGES = ("evaluate",)
"""Stages that judge what processes of their own answer. Where the judge is no model, and for all others that have such
processes, there is nothing to do but wait: on a cluster they take no CPU, for which those processes might wait in vain, and
stay on the head where it has room."""
_LOOK_SECONDS = 2.0
"""Between two looks at who waits for a node."""


@dataclass
class _Pending:
    spec: StageSpec
    tries: int
    since: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        return self.spec.reference

    @property
    def spread(self) -> bool:
        return bool(self.spec.execution.get("spread"))

    @property
    def threads(self) -> int:
        return int(self.spec.execution.get("threads", 1))


def _options(request: Request) -> dict[str, Any]:
    return {"num_cpus": request["CPU"], "num_gpus": request.get("GPU", 0)}


@dataclass
class RayRunner:
    """Submits stages and hands back their answers as they end. Use through `ray_runner`."""

    cpus: int
    cluster: ClusterExecution = field(default_factory=ClusterExecution)
    _pending: dict[Any, _Pending] = field(default_factory=dict)
    _queue: deque[_Pending] = field(default_factory=deque)
    """Of a cluster: those whose turn it is not yet."""
    _task: Any = None
    _looked: float = 0.0

    def submit(self, spec: StageSpec, tries: int = 1) -> None:
        if self._task is None:
            self._start()
        self._queue.append(_Pending(spec, tries))
        self._begin()

    def _begin(self) -> None:
        """Hand Ray those whose turn it is."""
        joined, later = cluster_address() is not None, deque[_Pending]()
        while self._queue:
            one = self._queue.popleft()
            at_once = sum(other.spread for other in self._pending.values())
            if joined and one.spread and at_once >= self.cluster.spread:
                later.append(one)
                continue
            asked = _options(self._request(one)) if joined else self._here(one)
            task = self._task.options(**asked, max_retries=0, name=one.name)
            one.since = time.monotonic()
            self._pending[task.remote(one.spec.model_dump_json())] = one
        self._queue = later

    def _request(self, one: _Pending) -> Request:
        """Of a cluster."""
        judges = bool(one.spec.execution.get("judge_models"))
        if one.spread and not (judges and one.spec.stage in _JUDGES):
            return {"CPU": 0}
        on_gpu = judges and str(one.spec.execution["judge"]["device"]).startswith("cuda")
        return {"CPU": one.threads, **({"GPU": 1} if on_gpu else {})}

    def _here(self, one: _Pending) -> dict[str, Any]:
        if not one.spread:
            return {"num_cpus": min(one.threads, self.cpus)}
        # The stage waits for processes that ask for CPUs themselves.
        return {"num_cpus": 0, "resources": {_SPREAD: float(min(int(one.spec.execution["spread"]), self.cpus))}}

    def wait(self, timeout: float) -> list[tuple[StageSpec, StageAnswer]]:
        """Answers that have come within `timeout` seconds. A stage that raised is tried again, or answered as failed; so is one
        that no node of a cluster took in time."""
        import ray

        ready, _ = ray.wait(list(self._pending), num_returns=1, timeout=timeout)
        answers = self._unplaced(ready)
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
        self._begin()
        return answers

    def _unplaced(self, ready: Sequence[Any]) -> list[tuple[StageSpec, StageAnswer]]:
        """Those of a cluster for which no node that could hold them was up for too long: they are given up."""
        now, patience = time.monotonic(), self.cluster.patience_s
        if cluster_address() is None or now - self._looked < _LOOK_SECONDS:
            return []
        self._looked = now
        import ray

        answers = []
        for reference, one in list(self._pending.items()):
            request = self._request(one)
            if could_hold(request):
                one.since = now  # it runs, or waits for its turn
            elif now - one.since > patience and reference not in ready:
                del self._pending[reference]
                ray.cancel(reference, force=True)
                said = no_room(one.name, amounts(request), patience, "execution.cluster.patience_s")
                answers.append((one.spec, StageAnswer(status="failed", error=error_payload(ClusterError(said)))))
        return answers

    def _start(self) -> None:
        start_ray(self.cpus)
        import ray

        self._task = ray.remote(_run_json)


def start_ray(cpus: int) -> None:
    """The cluster that this process belongs to, else a Ray of this machine alone, for this process and its children. Raises
    ClusterError."""
    if cluster_address() is not None:
        join_cluster()
        return
    # Without a dashboard Ray's node agent still listens for jobs (port 52365), and gRPC ports are open to the network.
    # Ray asks for a token there; ours is random and known to this process and its children alone, not kept in a file
    # of the user's. Ray reads it when imported, once: a second start in this process must find the first one's.
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = _token()
    # What workers import looks for accelerators and says so; stages run on the CPU here.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    with sigterm_kept():
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
    with started_ray(max(available_cpus(), how.actors)):
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
def ray_runner(cpus: int | None = None, cluster: ClusterExecution | None = None) -> Iterator[RayRunner]:
    """A runner that starts Ray at the first submission (a run whose results are all there needs none). `cpus`: of this machine;
    `cluster`: how the cluster is shared, where there is one."""
    runner = RayRunner(cpus=cpus or available_cpus(), cluster=cluster or ClusterExecution())
    try:
        yield runner
    finally:
        if runner._task is not None:
            import ray

            ray.shutdown()
