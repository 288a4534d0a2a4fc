"""`python -m benchmarks.mask_memory`: memory of each rank under ZeRO on 1, 2 and 4 gloo ranks.

A random Llama of at least 200 M parameters (bf16 on disk) and a finetune of it; two training steps on each number of ranks.
Prints each rank's peak resident memory above what its imports take, the largest rank against a perfect share of one rank's
and against the estimate of `realign plan`, then one JSON line. `--quick` takes a small model on 1 and 2 ranks, which shows
that it runs and nothing else.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import queue
import socket
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.mask_training import rss

STEPS, PAIRS, TOKENS = 2, 4, 64
SHAPES = {
    "quick": {
        "vocab_size": 500, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 2,
    },
    "213M": {
        "vocab_size": 16_000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 14,
        "num_attention_heads": 16,
    },
    "504M": {
        "vocab_size": 32_000, "hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 14,
        "num_attention_heads": 16,
    },
}  # fmt: skip


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--stage", type=int, nargs="+", default=[3], choices=[0, 1, 2, 3])
    parser.add_argument("--size", choices=list(SHAPES), default="213M")
    parser.add_argument("--quick", action="store_true", help="the smallest size on 1 and 2 ranks")
    options = parser.parse_args(arguments)
    if options.quick:
        options.ranks, options.size = [1, 2], "quick"
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        parameters = build_models(Path(scratch), SHAPES[options.size])
        for stage in options.stage:
            job = {"zero": {"stage": stage}, "steps": STEPS, "pairs": PAIRS, "tokens": TOKENS}
            sys.stdout.write(f"ZeRO-{stage}, {parameters / 1e6:.0f} M parameters, {PAIRS} pairs of {TOKENS} tokens\n")
            ratios |= _compare(Path(scratch), options.ranks, job)
    sys.stdout.write(json.dumps({
        "benchmark": "mask_memory", "date": datetime.now(UTC).date().isoformat(), "stage": options.stage,
        "parameters": parameters, "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }) + "\n")  # fmt: skip
    return 0


def _compare(root: Path, worlds: list[int], job: dict[str, Any]) -> dict[str, float]:
    """Measure one stage on each number of ranks. ZeRO-3 against a perfect share, every stage against the estimate."""
    ratios: dict[str, float] = {}
    whole, stage = 0.0, job["zero"]["stage"]
    for world in worlds:
        ranks, expected = measure(root, world, job), estimate(root, world, job)
        most = max(r["peak"] for r in ranks)
        whole = whole or most * world
        each = " ".join(f"{r['peak'] / 2**30:.2f}" for r in ranks)
        sys.stdout.write(
            f"  {world} ranks: {each} GiB; {most * world / whole:.2f} of a perfect share; estimate {expected / 2**30:.2f} GiB, "
            f"measured {most / expected:.2f} of it; {max(r['step'] for r in ranks):.1f} s a step\n"
        )
        sys.stdout.flush()
        if stage == 3:
            ratios[f"share_{world}"] = most * world / whole
        ratios[f"zero{stage}_{world}_of_estimate"] = most / expected
    return ratios


def estimate(root: Path, world: int, job: dict[str, Any]) -> int:
    """What `realign plan` would say of a rank of `measure`, in bytes above its imports."""
    from components.checkpoints.dimensions import Dimensions
    from components.checkpoints.reference import open_checkpoint
    from components.masks.memory import PROCESS_HOST, STEP, Lengths, rank_memory, weights_of
    from components.masks.presets import resolve
    from components.masks.zero import MaskExecution

    settings = resolve("paper", {**job.get("settings", {}), "batch_size": job["pairs"]})
    aligned, finetune = open_checkpoint(root / "aligned"), open_checkpoint(root / "finetune")
    tokens, half = job["tokens"], job["tokens"] // 2
    memory = rank_memory(
        weights_of(aligned.source, finetune.source, settings),
        Dimensions.of(aligned.config),
        Lengths(longest=tokens, mean=tokens, longest_response=tokens - half, mean_response=tokens - half, prompt=0),
        settings,
        MaskExecution(ranks=world, **job["zero"]),
    )
    return memory.peak("host", STEP) - PROCESS_HOST


def build_models(root: Path, shape: dict[str, int]) -> int:
    """Two model directories; how many parameters each has."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16)
    model.save_pretrained(root / "aligned")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(root / "finetune")
    return sum(p.numel() for p in model.parameters())


def measure(root: Path, world: int, job: dict[str, Any]) -> list[dict[str, float]]:
    """What `_rank` tells of each of `world` gloo ranks, on the models `root/aligned` and `root/finetune`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    ranks = [context.Process(target=_rank, args=(root, rank, world, port, job, told)) for rank in range(world)]
    for process in ranks:
        process.start()
    found: dict[int, dict[str, float]] = {}
    while len(found) < world:
        try:
            rank, figures = told.get(timeout=5)
            found[rank] = figures
        except queue.Empty:
            if any(process.exitcode for process in ranks):
                for process in ranks:
                    process.kill()
                raise RuntimeError("a rank failed; what it said is above") from None
    for process in ranks:
        process.join()
    return [found[rank] for rank in range(world)]


class _Peak:
    """The largest resident memory since the start: ru_maxrss would count what came before it."""

    def __init__(self) -> None:
        self.most = self.start = rss()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.most = max(self.most, rss())
            time.sleep(0.002)

    def above(self) -> int:
        return self.most - self.start


def _rank(root: Path, rank: int, world: int, port: int, job: dict[str, Any], told: Any) -> None:
    """Load, make steps and, where the job says so, save. Tells the peak memory above the imports, and seconds of each."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    import deepspeed  # noqa: F401 - part of the baseline
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401 - so is this

    from components.checkpoints.reference import open_checkpoint
    from components.masks.engine import Batch, ScoredPair
    from components.masks.preferences import Pair, Row
    from components.masks.presets import resolve
    from components.masks.zero import ZeroSettings
    from ray_jobs.deepspeed_engine import sharded

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    peak, clock = _Peak(), time.perf_counter()
    seconds: dict[str, float] = {}

    def lap(name: str) -> None:
        nonlocal clock
        seconds[name], clock = time.perf_counter() - clock, time.perf_counter()

    aligned, finetune = open_checkpoint(root / "aligned"), open_checkpoint(root / "finetune")
    make = sharded(ZeroSettings(**job["zero"]))
    engine = make(root / "aligned", aligned.source, finetune.source, resolve("paper", job.get("settings", {})))
    lap("load")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 500, (job["pairs"], 2, job["tokens"]), generator=generator).tolist()
    half = job["tokens"] // 2
    pairs = [Pair(i, Row(tuple(c), half), Row((*c[:half], *r[half:]), half)) for i, (c, r) in enumerate(ids)]
    for step in range(job["steps"]):
        engine.step(Batch(step, tuple(ScoredPair(pair, (-500.0, -500.0)) for pair in pairs)))
        lap("step")
    if "save" in job:
        engine.save(Path(job["save"]))
        torch.distributed.barrier()
        lap("state")
        if rank == 0:
            _artifact(engine.masked, Path(job["save"]))
            lap("artifact")
    torch.distributed.barrier()
    told.put((rank, {"peak": peak.above(), **seconds}))
    torch.distributed.destroy_process_group()


def _artifact(masked: Any, directory: Path) -> None:
    from components.masks.artifact import write_artifact
    from components.masks.state import SavedState

    shapes = {s.name: s.home.shape for s in masked.slices}
    with SavedState(directory) as saved:
        shards = ((n, at, at + v.numel(), v) for n in shapes for at, v in saved.pieces(f"logits/{n}"))
        write_artifact(directory / "mask", shapes=shapes, shards=shards, settings=masked.settings)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
