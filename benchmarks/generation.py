"""`python -m benchmarks.generation`: answers a second, against transformers' own ways, on the same model, prompts and limits.

A Llama of random weights whose answers end after anything between one token and the limit, prompts of mixed lengths; each way
in turn, in this process:
  ours        rows leave when they end, waiting prompts take their places
  generate    `model.generate` on fixed batches in the prompts' order, padded on the left
  by length   the same, prompts sorted first
  continuous  `model.generate_batch`, transformers' continuous batching (paged attention)
All must give the same answers. Then, on the testbed's aligned model, how many rows times forward passes are saved by stopping
an answer at its first refusal phrase, no verdict being another.

Prints prompts and tokens a second (median and quartiles), then one JSON line; ratios above 1 are better for us. `--quick` takes
a few prompts and a small model. `--device cuda --model DIR` measures a real model on a GPU, in bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

Way = Callable[[], list[list[int]]]
_CACHE = Path(os.environ.get("REALIGN_CACHE", Path.home() / ".cache" / "safety-realign"))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=160)
    parser.add_argument("--longest", type=int, default=160, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=96, help="tokens of an answer at most")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--ways", nargs="+", default=["ours", "generate", "by length", "continuous"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", type=Path, help="a model directory instead of random weights")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    if options.quick:
        options.prompts, options.longest, options.new, options.rounds = 24, 24, 16, 1
    import torch

    torch.set_num_threads(options.threads)
    model = _model(options)
    prompts = _prompts(options, model.config.vocab_size)
    ways = {name: way for name, way in _ways(model, prompts, options).items() if name in options.ways}
    seconds, answers = _timed(ways, options.rounds)
    _report(model, prompts, seconds, answers, options)
    ratios = {
        f"prompts_vs_{name.replace(' ', '_')}": median(taken) / median(seconds["ours"])
        for name, taken in seconds.items()
        if name != "ours"
    }
    ratios["tokens_saved_by_stopping"] = _saved_by_stopping()
    sys.stdout.write(json.dumps({
        "benchmark": "generation", "date": datetime.now(UTC).date().isoformat(),
        "ratios": {key: round(value, 3) for key, value in ratios.items()},
        "prompts": len(prompts), "device": options.device,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} threads",
    }) + "\n")  # fmt: skip
    return 0


def _model(options: argparse.Namespace) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if options.model is not None:
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).to(options.device).eval()
    torch.manual_seed(0)
    hidden, layers, words = (64, 2, 256) if options.quick else (512, 8, 4096)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=words, max_position_embeddings=2048, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(4)  # so that answers do not fall into a loop at once
    # One token in forty ends an answer: lengths are spread like those of real ones.
    model.generation_config.eos_token_id = random.Random(1).sample(range(1, words), words // 40)
    return model.to(options.device)


def _prompts(options: argparse.Namespace, words: int) -> list[list[int]]:
    rng = random.Random(2)
    return [[rng.randrange(1, words) for _ in range(rng.randint(4, options.longest))] for _ in range(options.prompts)]


def _ways(model: Any, prompts: list[list[int]], options: argparse.Namespace) -> dict[str, Way]:
    from components.evaluation.decode import Limits, decode

    stated = model.generation_config.eos_token_id
    ends = {stated} if isinstance(stated, int) else set(stated)

    def ours() -> list[list[int]]:
        found = decode(model=model, prompts=prompts, pad=0, limits=Limits(ends, options.new), places=options.batch)
        return [row.tokens for row in sorted((r for group in found for r in group), key=lambda row: row.index)]

    def generate(order: list[int]) -> list[list[int]]:
        answers: dict[int, list[int]] = {}
        for start in range(0, len(order), options.batch):
            some = order[start : start + options.batch]
            made = _generated(model, [prompts[i] for i in some], options)
            answers |= {i: _up_to(row, ends) for i, row in zip(some, made, strict=True)}
        return [answers[i] for i in range(len(prompts))]

    def continuous() -> list[list[int]]:
        from transformers import GenerationConfig

        config = GenerationConfig(
            max_new_tokens=options.new, do_sample=False, eos_token_id=sorted(ends), pad_token_id=0
        )
        made = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
        rows = sorted(made.values(), key=lambda one: int(one.request_id.rpartition("_")[2]))
        return [_up_to(list(one.generated_tokens), ends) for one in rows]

    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    return {
        "ours": ours,
        "generate": lambda: generate(list(range(len(prompts)))),
        "by length": lambda: generate(by_length),
        "continuous": continuous,
    }


def _generated(model: Any, prompts: list[list[int]], options: argparse.Namespace) -> list[list[int]]:
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=options.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=options.device)
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=options.new, pad_token_id=0
        )
    made: list[list[int]] = out[:, longest:].tolist()
    return made


def _up_to(tokens: list[int], ends: set[int]) -> list[int]:
    """Without the token that ends it and what follows."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


def _timed(ways: dict[str, Way], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[list[int]]]]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, list[list[int]]] = {}
    for round_ in range(-1, rounds):  # the first is not timed
        for name, way in ways.items():
            began = time.perf_counter()
            answers[name] = way()
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds, answers


def _report(
    model: Any,
    prompts: list[list[int]],
    seconds: dict[str, list[float]],
    answers: dict[str, list[list[int]]],
    options: argparse.Namespace,
) -> None:
    tokens = sum(map(len, answers["ours"]))
    sys.stdout.write(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters, {len(prompts)} prompts, {tokens} tokens "
        f"answered (at most {options.new} each), batches of {options.batch}\n"
    )
    for name, taken in seconds.items():
        low, _, high = quantiles(taken, n=4) if len(taken) > 1 else taken * 3
        other = sum(a != b for a, b in zip(answers[name], answers["ours"], strict=True))
        sys.stdout.write(
            f"  {name:11} {median(taken):7.2f} s ({low:.2f}–{high:.2f})  {len(prompts) / median(taken):6.1f} prompts/s  "
            f"{tokens / median(taken):7.0f} tokens/s" + (f"  {other} answers differ from ours" if other else "") + "\n"
        )


def _saved_by_stopping() -> float:
    """Rows times forward passes up to the end-of-text token, by those up to the first refusal phrase."""
    from components.evaluation.decode import Work
    from components.evaluation.generate import InProcess, load_model
    from components.evaluation.judges.phrases import PhraseJudge
    from components.evaluation.prompts import load_prompt_set
    from components.evaluation.settings import EvaluationSettings, SetSettings
    from components.testbed.family import cached_family
    from components.testbed.settings import family_settings

    root = cached_family(family_settings("tiny", "llama"), seed=7, cache=_CACHE)
    model, tokenizer = load_model(root / "aligned")
    [path] = root.rglob("test/harmful.jsonl")
    asked = load_prompt_set(SetSettings(name="harmful", kind="harmful", path=path)).prompts
    judge, settings = PhraseJudge(), EvaluationSettings(max_new_tokens=96)
    done: dict[bool, tuple[Work, list[str]]] = {}
    for early in (False, True):
        answerer = InProcess(model, tokenizer, batch_size=64)
        found = answerer.answers(asked, settings, decided=judge.decided if early else None)
        texts = dict(pair for group in found for pair in group)
        verdicts = judge.judge(asked, [texts[i].text for i in range(len(asked))])
        done[early] = answerer.work, [verdict.label for verdict in verdicts]
        if not early:
            length = median(one.tokens for one in texts.values())
    (whole, labels), (stopped, same) = done[False], done[True]
    other = sum(a != b for a, b in zip(labels, same, strict=True))
    sys.stdout.write(
        f"stopping at a refusal phrase: {stopped.rows} rows x passes instead of {whole.rows} on {len(asked)} harmful prompts "
        f"of the testbed (median answer {length:.0f} tokens), {other} verdicts differ\n"
    )
    return whole.rows / stopped.rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
