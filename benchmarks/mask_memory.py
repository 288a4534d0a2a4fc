"""`python -m benchmarks.mask_memory`: memory of each rank under ZeRO-3 on 1, 2 and 4 gloo ranks.

A random Llama of at least 200 M parameters (bf16 on disk) and a finetune of it; two training steps on each number of ranks.
Prints each rank's peak resident memory above what its imports take, the largest rank against a perfect share of one rank's,
then one JSON line. `--quick` takes a small model on 1 and 2 ranks, which shows that it runs and nothing else.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
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


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--stage", type=int, default=3, choices=[0, 1, 2, 3])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    if options.quick:
        options.ranks = [1, 2]
    found: dict[int, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        parameters = _models(Path(scratch), quick=options.quick)
        for world in options.ranks:
            found[world] = _measure(Path(scratch), world, options.stage)
    sys.stdout.write(f"ZeRO-{options.stage}, {parameters / 1e6:.0f} M parameters, {PAIRS} pairs of {TOKENS} tokens\n")
    one = max(r["peak"] for r in found[options.ranks[0]]) * options.ranks[0]
    shares = {}
    for world, ranks in found.items():
        most = max(r["peak"] for r in ranks)
        shares[world] = most / (one / world)
        each = " ".join(f"{r['peak'] / 2**30:.2f}" for r in ranks)
        seconds = max(r["seconds"] for r in ranks)
        sys.stdout.write(
            f"  {world} ranks: {each} GiB; {shares[world]:.2f} of a perfect share; {seconds:.1f} s a step\n"
        )
    sys.stdout.write(json.dumps({
        "benchmark": "mask_memory", "date": datetime.now(UTC).date().isoformat(), "stage": options.stage,
        "parameters": parameters, "ratios": {f"share_{world}": round(share, 3) for world, share in shares.items()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }) + "\n")  # fmt: skip
    return 0


def _models(root: Path, *, quick: bool) -> int:
    """Two model directories; how many parameters each has."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16}
    if quick:
        shape = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=500 if quick else 16_000, **shape)).to(torch.bfloat16)
    model.save_pretrained(root / "aligned")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(root / "finetune")
    return sum(p.numel() for p in model.parameters())


def _measure(root: Path, world: int, stage: int) -> list[dict[str, float]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    ranks = [context.Process(target=_rank, args=(root, rank, world, port, stage, told)) for rank in range(world)]
    for process in ranks:
        process.start()
    found: dict[int, dict[str, float]] = dict(told.get() for _ in ranks)
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


def _rank(root: Path, rank: int, world: int, port: int, stage: Any, told: Any) -> None:
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
    peak = _Peak()
    aligned, finetune = open_checkpoint(root / "aligned"), open_checkpoint(root / "finetune")
    make = sharded(ZeroSettings(stage=stage))
    engine = make(root / "aligned", aligned.source, finetune.source, resolve("paper"))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 500, (PAIRS, 2, TOKENS), generator=generator).tolist()
    half = TOKENS // 2
    pairs = [Pair(i, Row(tuple(c), half), Row((*c[:half], *r[half:]), half)) for i, (c, r) in enumerate(ids)]
    seconds = 0.0
    for step in range(STEPS):
        start = time.perf_counter()
        engine.step(Batch(step, tuple(ScoredPair(pair, (-500.0, -500.0)) for pair in pairs)))
        seconds = time.perf_counter() - start
    torch.distributed.barrier()
    told.put((rank, {"peak": peak.above(), "seconds": seconds}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
