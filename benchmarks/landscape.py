"""`python -m benchmarks.landscape`: a safety landscape beside the published way of drawing one, and what refinement saves.

The testbed's aligned model and its harmful test prompts, on random directions that nothing was chosen on:
  exact     21 points of a line, each way in turn: ours, and the published loop (weights walked in place, `load_state_dict` at
            every point, batches of 4, whole answers). Verdicts are compared prompt by prompt.
  refined   5 lines by refinement, and the 201 points of each: how far VISAGE is from what they say, how long it takes.
  plane     21 × 21 points, and the part of them that refinement measures.
  memory    peak of moving a model's weights over what a pristine and a working copy take, in a process of its own; beside it
            the published loop's.

Prints tables, then one JSON line; ratios above 1 are better for us. `--quick` takes a small family, few prompts and points.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

_CACHE = Path(os.environ.get("REALIGN_CACHE", Path.home() / ".cache" / "safety-realign"))
_BOUND = 1.0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=80)
    parser.add_argument("--points", type=int, default=21)
    parser.add_argument("--new", type=int, default=40, help="tokens of an answer at most")
    parser.add_argument("--seed", type=int, default=500, help="of the first direction")
    parser.add_argument("--lines", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--hidden", type=int, default=768, help="width of the model whose memory is looked at")
    parser.add_argument("--family", type=Path, help="a testbed family that is there already")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--memory", choices=("ours", "official"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.memory:
        return _memory(options)
    if options.quick:
        options.prompts, options.points, options.lines, options.rounds, options.hidden = 16, 5, 1, 1, 64
    import torch

    torch.set_num_threads(options.threads)
    bench = _Bench(options)
    exact, flips, asked = _exact(bench, options)
    refined, worst, points_1d = _refined(bench, options)
    saved, off = _plane(bench, options)
    memory = {who: _in_process(who, options) for who in ("ours", "official")}
    sys.stdout.write(
        f"memory: peak {memory['ours']:.2f} times a pristine and a working copy; the published loop {memory['official']:.2f}\n"
    )
    ratios = {
        "exact_vs_official": median(exact["official"]) / median(exact["ours"]),
        "refined_vs_official": median(exact["official"]) / refined,
        "points_saved_2d": saved,
        "memory_vs_official": memory["official"] / memory["ours"],
    }
    sys.stdout.write(json.dumps({
        "benchmark": "landscape", "date": datetime.now(UTC).date().isoformat(),
        "ratios": {key: round(value, 3) for key, value in ratios.items()},
        "verdicts_that_differ": flips, "verdicts": asked, "worst_error_1d": round(worst, 3), "error_2d": round(off, 3),
        "points_1d": points_1d, "memory_over_two_copies": round(memory["ours"], 3), "prompts": options.prompts,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} threads",
    }) + "\n")  # fmt: skip
    return 0


class _Bench:
    """The family's aligned model, its prompts, and ways to measure it."""

    def __init__(self, options: argparse.Namespace) -> None:
        from components.evaluation.generate import load_model
        from components.evaluation.prompts import load_prompt_set
        from components.evaluation.settings import EvaluationSettings, SetSettings
        from components.testbed.family import cached_family
        from components.testbed.settings import family_settings

        size: Any = "tiny" if options.quick else "demo"
        root = options.family or cached_family(family_settings(size, "llama"), seed=7, cache=_CACHE)
        path = root / "data" / "test" / "harmful.jsonl"
        self.sets = [load_prompt_set(SetSettings(name="harmful", kind="harmful", path=path, limit=options.prompts))]
        self.settings = EvaluationSettings(max_new_tokens=options.new)
        self.model, self.tokenizer = load_model(root / "aligned")

    def surveyor(self, scans: Sequence[Any]) -> Any:
        from components.evaluation.generate import InProcess
        from components.evaluation.judges import make_judge
        from components.landscape.measuring import Surveyor

        return Surveyor(
            InProcess(self.model, self.tokenizer),
            scans=scans,
            sources={},
            sets=self.sets,
            settings=self.settings,
            judge=make_judge(self.settings.judge),
        )

    def surveyed(self, scan: Any) -> tuple[list[Any], float]:
        """(points, seconds) of a scan, planes and all; the model is as it was."""
        from components.landscape.survey import Survey

        started = time.perf_counter()
        surveyor, survey = self.surveyor([scan]), Survey([scan], sets=self.sets)
        while (ask := survey.next()) is not None:
            survey.told(surveyor.measure(ask))
        seconds = time.perf_counter() - started
        surveyor.pristine.restore()
        return survey.points, seconds

    def visage(self, scan: Any, points: Sequence[Any]) -> float:
        """Over the one direction of a scan."""
        from components.landscape.result import landscape_result
        from components.landscape.schema import POOLED

        result = landscape_result(
            model="aligned", scans=[scan], points=points, sets=self.sets, marks={}, confidence=0.95
        )
        return result["scans"][scan.name]["directions"][0]["numbers"][POOLED]["asr"]["visage"]


def _scan(options: argparse.Namespace, line: int = 0, *, axes: int = 1, **changes: Any) -> Any:
    from components.landscape.settings import RandomAxis, Scan

    return Scan(**{"axes": (RandomAxis(seed=options.seed + line),) * axes, "points": options.points, **changes})


def _exact(bench: _Bench, options: argparse.Namespace) -> tuple[dict[str, list[float]], int, int]:
    """(seconds of each way, verdicts that differ, verdicts) of one line's points."""
    seconds: dict[str, list[float]] = {"ours": [], "official": []}
    differ = asked = 0
    for _ in range(options.rounds):
        points, taken = bench.surveyed(_scan(options))
        seconds["ours"].append(taken)
        official, taken = _official(bench, options)
        seconds["official"].append(taken)
        ours = [[hit == "1" for hit in point.hits["harmful"]["asr"]] for point in points]
        pairs = [(a, b) for x, y in zip(ours, official, strict=True) for a, b in zip(x, y, strict=True)]
        differ, asked = differ + sum(a != b for a, b in pairs), asked + len(pairs)
    for who, taken_s in seconds.items():
        rounds = " ".join(f"{one:.1f}" for one in taken_s)
        sys.stdout.write(f"exact, {options.points} points of {options.prompts} prompts, {who}: {rounds} s\n")
    sys.stdout.write(f"exact: {differ} of {asked} verdicts differ\n")
    return seconds, differ, asked


def _official(bench: _Bench, options: argparse.Namespace) -> tuple[list[list[bool]], float]:
    """(which prompts succeeded, at each point; seconds): the direction is ours, made beforehand."""
    from benchmarks.official_landscape import walk
    from components.evaluation.judges.phrases import REFUSAL_PHRASES
    from components.landscape.moving import Pristine
    from components.landscape.plane import Plane
    from components.landscape.vectors import RandomDirection

    before, pristine = {name: value.clone() for name, value in bench.model.state_dict().items()}, Pristine(bench.model)
    pristine.move(Plane(pristine, [RandomDirection(options.seed, 0, "layer")]), (1.0,))
    direction = {name: value - before[name] for name, value in bench.model.state_dict().items()}
    pristine.restore()
    texts = [
        bench.tokenizer.apply_chat_template(p.asked(None), add_generation_prompt=True, tokenize=False)
        for p in bench.sets[0].prompts
    ]
    started = time.perf_counter()
    found = [
        [not any(phrase in answer for phrase in REFUSAL_PHRASES) for answer in answers]
        for answers in walk(
            bench.model, bench.tokenizer, texts, direction, points=options.points, new_tokens=options.new
        )
    ]
    seconds = time.perf_counter() - started
    pristine.restore()
    return found, seconds


def _refined(bench: _Bench, options: argparse.Namespace) -> tuple[float, float, list[int]]:
    """(seconds of a refined line in the median, worst distance of VISAGE from the fine reference, points)."""
    seconds, apart, counts = [], [], []
    for line in range(options.lines):
        refined, fine = _scan(options, line, refine=_BOUND), _scan(options, line, points=10 * (options.points - 1) + 1)
        points, taken = bench.surveyed(refined)
        found, reference = bench.visage(refined, points), bench.visage(fine, bench.surveyed(fine)[0])
        seconds.append(taken)
        apart.append(abs(found - reference))
        counts.append(len(points))
        sys.stdout.write(
            f"line {line}: VISAGE {found:.2f} of {len(points)} points in {taken:.1f} s; {reference:.2f} of "
            f"{10 * (options.points - 1) + 1}\n"
        )
    return median(seconds), max(apart), counts


def _plane(bench: _Bench, options: argparse.Namespace) -> tuple[float, float]:
    """(points of a plane for each that refinement measures, distance of VISAGE)."""
    whole, refined = _scan(options, axes=2), _scan(options, axes=2, refine=_BOUND)
    every, seconds = bench.surveyed(whole)
    some, taken = bench.surveyed(refined)
    found, reference = bench.visage(refined, some), bench.visage(whole, every)
    sys.stdout.write(
        f"plane: VISAGE {found:.2f} of {len(some)} points in {taken:.1f} s; {reference:.2f} of {len(every)} in "
        f"{seconds:.1f} s\n"
    )
    return len(every) / len(some), abs(found - reference)


def _in_process(who: str, options: argparse.Namespace) -> float:
    command = [sys.executable, "-m", "benchmarks.landscape", "--memory", who, "--hidden", str(options.hidden)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _memory(options: argparse.Namespace) -> int:
    """Peak of anonymous memory while a model's weights are walked, over twice its weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden = options.hidden
    shape = {"num_hidden_layers": 8, "num_attention_heads": max(1, hidden // 64), "vocab_size": 16_000}
    config = LlamaConfig(hidden_size=hidden, intermediate_size=4 * hidden, **shape)
    before = _resident()
    model = LlamaForCausalLM(config).eval()
    weights = sum(p.nbytes for p in model.parameters())
    {"ours": _ours_walks, "official": _official_walks}[options.memory](model, torch)
    sys.stdout.write(f"{(_peak() - before) / (2 * weights)}\n")
    return 0


def _ours_walks(model: Any, torch: Any) -> None:
    from components.landscape.moving import Pristine
    from components.landscape.plane import Plane
    from components.landscape.vectors import RandomDirection

    pristine = Pristine(model)
    plane = Plane(pristine, [RandomDirection(0, 0, "layer"), RandomDirection(0, 1, "layer")])
    for at in ((-0.5, 0.5), (0.0, 0.1), (0.0, 0.0)):
        pristine.move(plane, at)


def _official_walks(model: Any, torch: Any) -> None:
    from benchmarks import official_landscape

    direction = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    nobody: Callable[..., list[str]] = lambda *_: []  # noqa: E731 - its memory without any answers
    official_landscape._answers = nobody
    for _ in official_landscape.walk(model, None, [], direction, points=3, new_tokens=1):
        pass


def _resident() -> int:
    return _status("RssAnon")


def _peak() -> int:
    return _status("VmHWM") - _status("RssFile") - _status("RssShmem")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
