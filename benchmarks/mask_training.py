"""`python -m benchmarks.mask_training`: one training step of a mask, against what a step costs elsewhere.

Same model, data and batch, each way in a process of its own, one step of each in turn:
  ours      the engine of one process, `paper` preset (sigmoid DPO, rescaled by the mean)
  official  the published step, written out: the whole state dict rebuilt from RelaxedBernoulli samples at each forward, and a
            second masked model, its mask redrawn, as reference (arXiv 2405.09055's code)
  plain     DPO finetuning of the model's own weights, reference log-probabilities cached
Prints medians with quartiles and the peak memory of each process above its imports, then one JSON line; ratios above 1 are
better for us. `--quick` takes a small model.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Any

WAYS = ("ours", "official", "plain")
PAIRS, BETA, TEMPERATURE = 4, 0.1, 0.5


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 32], help="of prompt and response together")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    if options.quick:
        options.tokens, options.rounds = [32], 3
    found = {tokens: _compare(tokens, options) for tokens in options.tokens}
    ratios: dict[str, float] = {}
    for tokens, ways in found.items():
        sys.stdout.write(
            f"{PAIRS} pairs of {tokens} tokens, {ways['ours']['parameters'] / 1e6:.0f} M parameters, fp32\n"
        )
        for way, one in ways.items():
            low, _, high = one["quartiles"]
            sys.stdout.write(
                f"  {way:9} {one['seconds']:6.2f} s a step ({low:.2f}–{high:.2f})   peak {one['peak'] / 2**30:5.2f} GiB\n"
            )
        suffix = "" if tokens == options.tokens[0] else f"_{tokens}"
        ratios[f"step_vs_official{suffix}"] = ways["official"]["seconds"] / ways["ours"]["seconds"]
        ratios[f"memory_vs_official{suffix}"] = ways["official"]["peak"] / ways["ours"]["peak"]
        ratios[f"step_vs_plain_dpo{suffix}"] = ways["plain"]["seconds"] / ways["ours"]["seconds"]
    sys.stdout.write(json.dumps({
        "benchmark": "mask_training", "date": datetime.now(UTC).date().isoformat(),
        "ratios": {key: round(value, 3) for key, value in ratios.items()}, "tokens": options.tokens,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} threads",
    }) + "\n")  # fmt: skip
    return 0


def _compare(tokens: int, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for way in WAYS:
        pipes[way], theirs = context.Pipe()
        process = context.Process(target=_serve, args=(way, tokens, options.quick, options.threads, theirs))
        process.start()
        processes.append(process)
        pipes[way].recv()  # loaded: nobody loads while another is timed
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.rounds + 1):
        for way in WAYS:
            pipes[way].send("step")
            seconds[way].append(pipes[way].recv())
    found = {}
    for way in WAYS:
        pipes[way].send("end")
        timed = seconds[way][1:]  # the first step fills caches and makes optimizer state
        found[way] = {"seconds": median(timed), "quartiles": quantiles(timed, n=4), **pipes[way].recv()}
    for process in processes:
        process.join()
    return found


def _serve(way: str, tokens: int, quick: bool, threads: int, pipe: Connection) -> None:
    import torch
    import transformers  # noqa: F401 - part of the baseline

    from components.masks import training  # noqa: F401 - so is this

    torch.set_num_threads(threads)
    before = rss()
    config = _config(quick)
    step, parameters = {"ours": _ours, "official": _official, "plain": _plain}[way](config, _rows(tokens, config))
    pipe.send("ready")
    while pipe.recv() == "step":
        start = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - start)
    pipe.send({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before, "parameters": parameters})


def rss() -> int:
    """Resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _config(quick: bool) -> Any:
    from transformers import LlamaConfig

    if quick:
        return LlamaConfig(
            vocab_size=500, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=2
        )
    return LlamaConfig(
        vocab_size=32_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12
    )


def _rows(tokens: int, config: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(chosen, rejected): `tokens` each, the first half of them the prompt that both share."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (PAIRS, 2, tokens), generator=generator)
    ids[:, 1, : tokens // 2] = ids[:, 0, : tokens // 2]
    return [(tuple(pair[0].tolist()), tuple(pair[1].tolist())) for pair in ids]


def _models(config: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """An empty model, and the weights of an aligned and of a finetuned one, by name."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    aligned = {name: p.detach().clone() for name, p in model.named_parameters()}
    return model, aligned, {name: a + 0.01 * torch.randn_like(a) for name, a in aligned.items()}


def _ours(config: Any, rows: Any) -> tuple[Callable[[], None], int]:
    from components.checkpoints.source import TensorSpec
    from components.mapped import QUICK, return_freed_memory
    from components.masks.engine import Batch, ScoredPair, TorchEngine
    from components.masks.loading import build_masked_model
    from components.masks.preferences import Pair, Row
    from components.masks.presets import resolve

    class Memory:
        def __init__(self, tensors: dict[str, Any]) -> None:
            self.tensors = tensors

        def names(self) -> list[str]:
            return sorted(self.tensors)

        def aliases(self) -> dict[str, str]:
            return {}

        def spec(self, name: str) -> TensorSpec:
            return TensorSpec.of(self.tensors[name])

        def read(self, name: str, start: int = 0, stop: int | None = None) -> Any:
            return self.tensors[name].view(-1)[start:stop]

    return_freed_memory(QUICK)  # as `one_process` does
    model, aligned, finetuned = _models(config)
    masked = build_masked_model(
        model=model, aligned=Memory(aligned), finetune=Memory(finetuned), settings=resolve("paper"), where=Path("model")
    )
    engine = TorchEngine(masked)
    half = len(rows[0][0]) // 2
    pairs = tuple(
        ScoredPair(Pair(i, Row(chosen, half), Row(rejected, half)), (-500.0, -500.0))
        for i, (chosen, rejected) in enumerate(rows)
    )
    steps = iter(range(1 << 20))
    return lambda: _discard(engine.step(Batch(next(steps), pairs))), masked.numel


def _discard(_: object) -> None: ...


def _log_probs(logits: Any, ids: Any, half: int) -> Any:
    picked = logits[:, half - 1 : -1].log_softmax(-1).gather(2, ids[:, half:, None])
    return picked[..., 0].sum(-1)


def _dpo(policy: Any, reference: Any) -> Any:
    import torch

    ratio = policy - reference
    chosen, rejected = ratio.chunk(2)
    return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()


def _ids(rows: Any) -> Any:
    import torch

    return torch.tensor([chosen for chosen, _ in rows] + [rejected for _, rejected in rows])


def _official(config: Any, rows: Any) -> tuple[Callable[[], None], int]:
    import torch
    from torch.distributions import RelaxedBernoulli
    from torch.func import functional_call

    model, aligned, finetuned = _models(config)
    deltas = {name: finetuned.pop(name) - a for name, a in aligned.items()}
    for p in model.parameters():
        p.requires_grad_(False)
    logits = {name: torch.zeros_like(a, requires_grad=True) for name, a in aligned.items()}
    frozen = {name: torch.zeros_like(a) for name, a in aligned.items()}
    optimizer = torch.optim.Adam(list(logits.values()), lr=5e-3)
    ids, half = _ids(rows), len(rows[0][0]) // 2
    temperature = torch.tensor(TEMPERATURE)

    def forward(mask_logits: dict[str, Any]) -> Any:
        state = {}
        for name, a in aligned.items():
            mask = RelaxedBernoulli(temperature, logits=mask_logits[name]).rsample()
            masked = deltas[name] * mask
            state[name] = a + masked / mask.mean()
        return _log_probs(functional_call(model, state, (), {"input_ids": ids, "use_cache": False}).logits, ids, half)

    def step() -> None:
        with torch.no_grad():
            reference = forward(frozen)
        loss = _dpo(forward(logits), reference)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step, sum(a.numel() for a in aligned.values())


def _plain(config: Any, rows: Any) -> tuple[Callable[[], None], int]:
    import torch

    model, aligned, finetuned = _models(config)
    parameters = sum(a.numel() for a in aligned.values())
    aligned.clear()
    finetuned.clear()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)
    ids, half = _ids(rows), len(rows[0][0]) // 2
    reference = torch.full((2 * PAIRS,), -500.0)

    def step() -> None:
        loss = _dpo(_log_probs(model(input_ids=ids, use_cache=False).logits, ids, half), reference)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step, parameters


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
