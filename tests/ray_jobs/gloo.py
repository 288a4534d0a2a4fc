"""Plain gloo ranks on this machine, each a process of its own, that train masks one after the other."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_ranks(world: int, jobs: list[dict[str, Any]], directory: Path, *, timeout: float = 300) -> None:
    """Run `train` for every job on `world` ranks. Raises AssertionError with the ranks' output when one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spec = directory / f"jobs-{world}.json"
    spec.write_text(json.dumps(jobs))
    environment = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    logs = [directory / f"rank-{world}-{rank}.log" for rank in range(world)]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ray_jobs.gloo", str(spec)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    told = "\n".join(f"--- {log.name}\n{log.read_text()[-4000:]}" for log in logs)
    assert codes == [0] * world, told


def models(place: Path) -> dict[str, Any]:
    """The two models of a workplace: whole ones, or adapters over its `base`."""
    from components.checkpoints.reference import open_checkpoint

    base = place / "base" if (place / "base").exists() else None
    opened = [open_checkpoint(place / role, base=base, factors=base is not None) for role in ("aligned", "finetune")]
    return {"aligned_dir": opened[0].model_dir, "aligned": opened[0].source, "finetune": opened[1].source}


def train(
    place: Path,
    *,
    run: str,
    zero: dict[str, Any],
    settings: dict[str, Any],
    stop_at: int | None = None,
    preferences: dict[str, str] | None = None,
    cache: str = "cache",
    asked_at: int | None = None,
) -> None:
    """Train on the workplace's files, with state and artifact under `run` and reference log-probabilities under `cache`. The
    last rank is asked to end when it begins step `asked_at`."""
    from components.masks.data import PreferenceData
    from components.masks.loop import Preempted
    from components.masks.reference_cache import ReferenceCache
    from components.masks.settings import MaskSettings
    from components.masks.training import train_mask
    from components.masks.zero import ZeroSettings
    from ray_jobs.deepspeed_engine import sharded

    steps = [0]

    def keep_going() -> None:
        steps[0] += 1
        if stop_at is not None and steps[0] > stop_at:
            raise InterruptedError
        if steps[0] - 1 == asked_at and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with contextlib.suppress(InterruptedError, Preempted):
        train_mask(
            settings=MaskSettings(**settings),
            **models(place),
            preferences=PreferenceData.model_validate(preferences or {"file": place / "preferences.jsonl"}),
            anchors=[place / "anchors.jsonl"],
            state_dir=place / run / "state",
            out_dir=place / run / "mask",
            checkpoint_seconds=3600.0 if asked_at is not None else 0.0,
            make_engine=sharded(ZeroSettings(**zero)),
            keep_going=keep_going,
            cache=ReferenceCache(place / cache, {"aligned": "the workplace's"}),
        )


def main(spec: Path) -> None:
    import torch

    torch.distributed.init_process_group("gloo")
    for job in json.loads(spec.read_text()):
        train(Path(job.pop("place")), **job)
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
