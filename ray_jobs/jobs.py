"""A command as a job of a Ray cluster, over its Jobs API: submitted once, found again by whoever asks again, never left behind.

A job's own process takes no CPU and runs on the head; what it asks the cluster for is its own affair. The job's id is the
caller's and the same at every try, so a step that is tried again (its pod was lost, its node drained) finds the job of the try
before. Needs the network to the head's dashboard port alone; the token comes from RAY_AUTH_TOKEN.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TextIO, TypedDict, TypeVar

from components.errors import ClusterAwayError, ClusterError
from ray_jobs.signals import terminable

ANSWER = "REALIGN-ANSWER "
"""What the line of a job's log begins with that has its answer, as JSON."""
_POLL_SECONDS = 1.0
_STOP_SECONDS = 30.0
_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 60.0
"""How long one request may take."""
_LOG_SECONDS = 30.0
"""How long a head that answers may have no log of a job, before it is taken for lost."""
_BAD = "Request failed with status code 400"
"""What a head says, as its own error (500), where the part of it that runs jobs refuses a request."""
_THERE = "already exists"
"""What that says to a job whose id is taken."""
_SETTLED_SECONDS = 5.0
"""How long a job that has ended is left alone: Ray looks every second, and then ends its supervisor. Of one that is deleted
before, the supervisor stays for good, and no other job can have its id."""
T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """What is to be run where."""

    address: str
    """`http://realign-head-svc:8265`."""
    entrypoint: str
    """A shell line."""
    submission_id: str
    env: Mapping[str, str] = field(default_factory=dict)
    patience_s: float = 300.0
    """How long the head may be away."""


class JobEnd(TypedDict):
    """What became of a job."""

    status: Literal["done", "failed", "stopped"]
    """Stopped: by somebody else."""
    answer: dict[str, Any]
    """Empty where it printed none."""
    error: str


def run_job(job: Job, *, out: TextIO = sys.stdout) -> JobEnd:
    """Submit the job, or go on with the one of its id, and see it to its end; its log goes to `out`, but for the answer.

    One that failed or was stopped before is run again, one that succeeded is not. One whose log is lost, with the head that it
    ran on, has failed, and the next try begins it anew. SIGTERM and Ctrl-C stop it. Raises ClusterError where the token is
    refused, ClusterAwayError where the head stays away; then the job goes on, and the next try finds it.
    """
    head = _Head(job)
    with terminable():
        try:
            if head.begin():
                out.write(f"realign: job {job.submission_id} submitted to {job.address}\n")
            else:
                out.write(f"realign: job {job.submission_id} is there already; following it\n")
            return _followed(head, out)
        except (KeyboardInterrupt, SystemExit):
            head.stop()
            out.write(f"realign: job {job.submission_id} was stopped\n")
            raise


def stop_jobs(address: str, prefix: str) -> list[str]:
    """Stop the jobs whose ids begin with `prefix` and that have not ended; their ids. Raises ClusterError."""
    head = _Head(Job(address, "", "", patience_s=_STOP_SECONDS))
    return head.stop_all(prefix)


def _followed(head: _Head, out: TextIO) -> JobEnd:
    told = silent = 0
    while True:
        info = head.info()
        status, ended = str(info.status), info.status.is_terminal()
        log = "" if status == "PENDING" else head.log()
        if log is not None:
            told += _show(log[told:], out, whole=ended)
            if ended:
                return _end(info, log)
        silent = silent + 1 if log is None else 0
        if ended and silent > 1:  # and the head has answered in between
            return head.forgotten(info)
        if head.missed and head.submit():
            told = 0
        time.sleep(_POLL_SECONDS)


def _end(info: Any, log: str) -> JobEnd:
    answer, status = _answer(log), str(info.status)
    if status == "SUCCEEDED":
        return {"status": "done", "answer": answer, "error": ""}
    error = str(answer.get("error") or info.message or status)
    return {"status": "stopped" if status == "STOPPED" else "failed", "answer": answer, "error": error}


def _show(text: str, out: TextIO, *, whole: bool) -> int:
    """Pass on what came of a log, line by line; how much of it was passed on."""
    end = len(text) if whole else text.rfind("\n") + 1
    for line in text[:end].splitlines():
        if not line.startswith(ANSWER):
            out.write(f"{line}\n")
    out.flush()
    return end


def _answer(log: str) -> dict[str, Any]:
    """The last answer in a log."""
    for line in reversed(log.splitlines()):
        if line.startswith(ANSWER):
            try:
                found: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
            except ValueError:
                return {}
            return found
    return {}


class _Head:
    """The Jobs API of a cluster, for one job."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.missed = True
        """Whether the head was away since it was last asked to take the job, or may have been."""
        self._client: Any = self._patiently(self._connected)

    def _connected(self) -> Any:
        from ray.job_submission import JobSubmissionClient

        class Client(JobSubmissionClient):  # type: ignore[misc]  # Ray's is untyped
            """Whose requests end; of a head that is up, but not itself yet, it thinks as of one that is away."""

            answer_s = min(_ANSWER_SECONDS, self._job.patience_s)

            def _do_request(self, method: str, endpoint: str, **named: Any) -> Any:
                answer = super()._do_request(method, endpoint, timeout=(_CONNECT_SECONDS, self.answer_s), **named)
                if (answer.status_code >= 500 and _BAD not in answer.text) or answer.status_code == 404:
                    raise _NotNowError(f"{answer.status_code}: {(answer.text.strip().splitlines() or [''])[-1][:300]}")
                return answer

        return Client(self._job.address)

    def begin(self) -> bool:
        """Whether the job was submitted, and not found. Raises ClusterError."""
        found = self._patiently(self._found)
        if found is not None and str(found.status) in ("FAILED", "STOPPED"):
            self._forget(found)
        return self.submit()

    def _found(self) -> Any | None:
        return next((one for one in self._client.list_jobs() if one.submission_id == self._job.submission_id), None)

    def submit(self) -> bool:
        """Whether the job was not there, and is now.

        To one that is there it does nothing. But a head that has come back, and has its memory from Redis, looks after the jobs
        of the head before from the first request of this kind on: until then one that is lost is said to run.
        """
        job = self._job
        env = {"env_vars": dict(job.env)} if job.env else None
        try:
            self._patiently(
                lambda: self._client.submit_job(
                    entrypoint=job.entrypoint, submission_id=job.submission_id, runtime_env=env
                )
            )
        except ClusterError as error:
            if isinstance(error, ClusterAwayError) or _THERE not in str(error):
                raise
            return False
        finally:
            self.missed = False
        return True

    def _forget(self, info: Any) -> None:
        ended_s = (info.end_time or 0) / 1000
        time.sleep(min(max(ended_s + _SETTLED_SECONDS - time.time(), 0.0), _SETTLED_SECONDS))
        self._patiently(lambda: self._found() and self._client.delete_job(self._job.submission_id))

    def forgotten(self, info: Any) -> JobEnd:
        """The end of a job whose log is lost; the next try finds none of this id."""
        self._forget(info)
        error = f"job {self._job.submission_id}: {info.status}, but its log is lost with the node that it ran on"
        return {"status": "stopped" if str(info.status) == "STOPPED" else "failed", "answer": {}, "error": error}

    def info(self) -> Any:
        return self._patiently(lambda: self._client.get_job_info(self._job.submission_id))

    def log(self) -> str | None:
        """None where there is none to be had for a while: the head is away, or the node that has it."""
        try:
            found: str = self._patiently(lambda: self._client.get_job_logs(self._job.submission_id), _LOG_SECONDS)
        except ClusterAwayError:
            return None
        return found

    def stop(self) -> None:
        """Ask the job to end, and wait for it; whoever stops has no more patience than that."""
        ends = time.monotonic() + _STOP_SECONDS
        self._client.answer_s = _STOP_SECONDS / 3
        try:
            self._client.stop_job(self._job.submission_id)
            while not self._client.get_job_status(self._job.submission_id).is_terminal() and time.monotonic() < ends:
                time.sleep(0.5)
        except Exception as error:  # noqa: BLE001 - a head that is away takes its jobs along
            sys.stderr.write(f"realign: job {self._job.submission_id} could not be stopped: {error}\n")

    def stop_all(self, prefix: str) -> list[str]:
        """Ask jobs to end; see `stop_jobs`."""
        jobs = self._patiently(self._client.list_jobs)
        found = [
            j.submission_id for j in jobs if (j.submission_id or "").startswith(prefix) and not j.status.is_terminal()
        ]
        for one in found:
            self._patiently(partial(self._client.stop_job, one))
        return found

    def _patiently(self, ask: Callable[[], T], at_most_s: float = math.inf) -> T:
        """What the head answers; asked again while it is away. Raises ClusterError."""
        from ray.exceptions import AuthenticationError
        from requests.exceptions import ChunkedEncodingError, Timeout
        from requests.exceptions import ConnectionError as NoConnection

        patience_s = min(self._job.patience_s, at_most_s)
        ends, wait = time.monotonic() + patience_s, 1.0
        while True:
            try:
                return ask()
            except (AuthenticationError, RuntimeError) as error:
                raise ClusterError(f"the Ray head at {self._job.address} {_refusal(str(error))}") from error
            except (ConnectionError, NoConnection, ChunkedEncodingError, Timeout, _NotNowError) as error:
                self.missed = True
                if time.monotonic() + wait > ends:
                    why = str(error) if isinstance(error, _NotNowError) else type(error).__name__
                    raise ClusterAwayError(
                        f"no Ray head answers at {self._job.address} ({why}) within {patience_s:g} s; a job that runs goes "
                        "on, and the same step again finds it"
                    ) from error
            time.sleep(wait)
            wait = min(2 * wait, 15.0)


class _NotNowError(Exception):
    """What a head says that cannot do what it is asked, and may be able to later."""


def _refusal(said: str) -> str:
    """What a head has against a request."""
    if "Unauthorized" in said:
        return "wants a token (401): set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN here"
    if "Forbidden" in said:
        return "refuses the token (403): RAY_AUTH_TOKEN is not the cluster's"
    return f"refuses: {said.strip()}"
