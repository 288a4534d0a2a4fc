"""Retry or give up: a pure decision."""

from __future__ import annotations

import errno

import pytest
from ray.exceptions import RayTaskError, WorkerCrashedError

from components.leases import LeaseLost
from components.masks.loop import Preempted
from ray_jobs.failure import MAX_TRIES, Decision, decide


@pytest.mark.parametrize(
    "error", [WorkerCrashedError(), LeaseLost("x"), Preempted("x"), OSError(errno.EIO, "io"), ConnectionResetError()]
)
def test_faults_of_the_machine_are_tried_again_until_it_is_enough(error: BaseException) -> None:
    assert [decide(error, tries) for tries in range(1, MAX_TRIES + 1)] == [
        Decision.RETRY, Decision.RETRY, Decision.GIVE_UP,
    ]  # fmt: skip


@pytest.mark.parametrize("error", [TypeError("x"), AssertionError(), KeyError("a"), ValueError("x")])
def test_bugs_are_not_tried_again(error: BaseException) -> None:
    assert decide(error, 1) is Decision.GIVE_UP


def test_what_ray_wraps_is_seen_through() -> None:
    def wrapped(cause: Exception) -> BaseException:
        return RayTaskError("f", "traceback", cause).as_instanceof_cause()

    assert decide(wrapped(LeaseLost("x")), 1) is Decision.RETRY
    assert decide(wrapped(TypeError("x")), 1) is Decision.GIVE_UP
