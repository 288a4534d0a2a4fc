"""Mask training on the ranks of a Ray Train group: as many processes as asked for, on whatever nodes have room."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from components import errors
from components.errors import RealignError, error_payload
from components.leases import Claim
from components.masks.zero import MaskExecution
from components.storage import Attempt, Workspace, write_atomic
from ray_jobs.deepspeed_engine import sharded
from ray_jobs.stage import StageContext, StageSpec

_ENDED = "ranks-ended.json"


def train_on_ranks(context: StageContext, execution: MaskExecution) -> dict[str, float]:
    """Train on `execution.ranks` processes, started again from the last state when some are lost. Returns the seconds of each
    phase. Raises what the ranks raised: a RealignError as it was, else Ray's TrainingFailedError.

    Ray Train keeps no checkpoint here: the state is ours, in the attempt's directory, and outlives the group.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    ended = context.state / _ENDED
    ended.unlink(missing_ok=True)
    gpu = execution.device == "cuda"
    threads = int(context.spec.execution.get("threads", 1))
    trainer = TorchTrainer(
        _rank,
        train_loop_config=_given(context),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=execution.ranks,
            use_gpu=gpu,
            resources_per_worker={"CPU": threads, **({"GPU": 1} if gpu else {})},
        ),
        run_config=RunConfig(
            # A name of its own: Ray Train would take up a run of the same name where it ended.
            name=uuid.uuid4().hex,
            storage_path=str(context.state / "ray-train"),
            failure_config=FailureConfig(max_failures=execution.max_failures),
        ),
    )
    trainer.fit()
    told: dict[str, Any] = json.loads(ended.read_text())
    if "error" in told:
        raise getattr(errors, told["error"]["type"])(told["error"]["message"])
    seconds: dict[str, float] = told["seconds"]
    return seconds


def _given(context: StageContext) -> dict[str, Any]:
    """What a rank needs to stand where the stage stands, as plain values."""
    attempt = context.attempt
    return {
        "spec": context.spec.model_dump(mode="json"),
        "out": str(attempt.out),
        "state": str(attempt.state),
        "lease": [str(attempt.lease.path), attempt.lease.owner],
    }


def _rank(given: dict[str, Any]) -> None:
    """One rank's whole life. What a user must mend is told to the stage, not raised: it would be tried again."""
    import torch

    spec = StageSpec(**given["spec"])
    path, owner = given["lease"]
    attempt = Attempt(out=Path(given["out"]), state=Path(given["state"]), lease=Claim(Path(path), owner))
    context = StageContext(spec, Workspace(Path(spec.workspace)), attempt, parents={})
    from ray_jobs.train_mask import execution_of, train

    execution = execution_of(context)
    if execution.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(int(spec.execution.get("threads", 1)))
    torch.use_deterministic_algorithms(True)
    device = torch.device("cuda", torch.cuda.current_device()) if execution.device == "cuda" else "cpu"
    try:
        told: dict[str, Any] = {"seconds": train(context, sharded(execution, device=device)).seconds}
    except RealignError as error:
        told = {"error": error_payload(error)}
    write_atomic(attempt.state / _ENDED, json.dumps(told))
