"""Mask training on the ranks of a Ray Train group: as many processes as asked for, on whatever nodes have room."""

from __future__ import annotations

import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

from components import errors
from components.errors import RealignError, error_payload
from components.masks.zero import MaskExecution
from components.storage import write_atomic
from ray_jobs.cluster import wait_for_room
from ray_jobs.deepspeed_engine import sharded
from ray_jobs.stage import StageContext

_ENDED = "rank-{}-ended.json"
_TOGETHER_SECONDS = 10.0
"""How long a rank that failed waits for the others to fail alike."""


def train_on_ranks(context: StageContext, execution: MaskExecution) -> dict[str, Any]:
    """Train on `execution.ranks` processes, started again from the last state when some are lost. Returns what the last start
    cost (`MaskResult.cost`). Raises what the ranks raised: a RealignError as it was, else Ray's TrainingFailedError;
    ClusterError where a cluster has no room for them.

    Ray Train keeps no checkpoint here: the state is ours, in the attempt's directory, and outlives the group.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    for old in context.state.glob(_ENDED.format("*")):
        old.unlink()
    gpu = execution.device == "cuda"
    threads = int(context.spec.execution.get("threads", 1))
    resources: dict[str, float] = {"CPU": threads, **({"GPU": 1} if gpu else {})}
    if execution.resource is not None:
        resources |= {execution.resource: 1}
    wait_for_room(resources, execution.ranks, execution.patience_s, context.spec.reference)
    trainer = TorchTrainer(
        _rank,
        train_loop_config=context.to_plain(),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=execution.ranks,
            use_gpu=gpu,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            # A name of its own: Ray Train would take up a run of the same name where it ended.
            name=uuid.uuid4().hex,
            storage_path=str(context.state / "ray-train"),
            failure_config=FailureConfig(max_failures=execution.max_failures),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError:
        _raise_told(context.state)
        raise
    _raise_told(context.state)
    cost: dict[str, Any] = json.loads((context.state / _ENDED.format(0)).read_text())["cost"]
    return cost


def _told(state: Path) -> list[dict[str, Any]]:
    """The RealignErrors that ranks ended with."""
    found = [json.loads(path.read_text()) for path in sorted(state.glob(_ENDED.format("*")))]
    return [told["error"] for told in found if "error" in told]


def _raise_told(state: Path) -> None:
    for told in _told(state):
        raise getattr(errors, told["type"])(told["message"])


def _rank(given: dict[str, Any]) -> None:
    """One rank's whole life. What a user must mend is told to the stage, not raised: it would be tried again."""
    import torch
    from ray.train import get_context

    rank, world = get_context().get_world_rank(), get_context().get_world_size()
    context = StageContext.of_plain(given)
    attempt = context.attempt
    from ray_jobs.train_mask import execution_of, train

    execution = execution_of(context)
    if _told(attempt.state):
        raise RuntimeError("a rank has failed for good")
    os.environ["DS_ACCELERATOR"] = execution.device  # the driver's own says cpu
    torch.set_num_threads(int(context.spec.execution.get("threads", 1)))
    torch.use_deterministic_algorithms(True)
    device = torch.device("cuda", torch.cuda.current_device()) if execution.device == "cuda" else "cpu"
    try:
        told: dict[str, Any] = {"cost": train(context, sharded(execution, device=device)).cost}
    except RealignError as error:
        told = {"error": error_payload(error)}
    write_atomic(attempt.state / _ENDED.format(rank), json.dumps(told))
    if "error" in told:
        _leave_together(attempt.state, world)


def _leave_together(state: Path, world: int) -> None:
    """Most errors meet all ranks alike, and all end. Where one alone met it (its node's disk is full) the others wait for it in
    a collective: raising ends the group at once."""
    deadline = time.monotonic() + _TOGETHER_SECONDS
    while len(list(state.glob(_ENDED.format("*")))) < world:
        if time.monotonic() > deadline:
            raise RuntimeError("this rank has failed for good, the others have not")
        time.sleep(0.1)
