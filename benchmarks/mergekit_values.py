"""`python -m benchmarks.mergekit_values --mergekit VENV`: real mergekit's output beside ours, weight by weight.

The same mergekit YAML goes to mergekit and, read by `components.fusion.mergekit`, to our merge; small random Llamas in fp32 and
in bf16. Prints for each merge the share of weights with the same bits and with at most one unit in the last place between them,
the largest difference (in the size of the merged task vector's standard deviation), and of what differs by more than a unit how
much stands at the TIES threshold and how much cancels exactly; for DARE, whose drops are random, the share kept and the factor
that makes up for what was dropped. Then one JSON line. Without `--mergekit` an environment is made first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import mergekit_peer
from benchmarks.synthetic import make_family
from components.checkpoints.safetensors import SafetensorsSource
from components.fusion.merge_settings import MergeSettings
from components.fusion.mergekit import read_recipe
from components.fusion.merging import MergedSource
from components.fusion.trimming import find_thresholds

SHAPE = {"vocab_size": 512, "hidden_size": 96, "intermediate_size": 264, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip
# The environment's own Python runs this: all merges in one process, one {"config", "out"} a line.
DRIVER = """
import json, sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for line in sys.stdin:
    job = json.loads(line)
    config = MergeConfiguration.model_validate(yaml.safe_load(open(job["config"])))
    run_merge(config, job["out"], MergeOptions(copy_tokenizer=False, quiet=True, random_seed=0, write_model_card=False))
"""


@dataclass(frozen=True)
class Case:
    """One merge."""

    label: str
    method: str
    parameters: Mapping[str, Any]
    weights: Mapping[str, Any] = field(default_factory=lambda: {"a": 1.0, "b": 0.6})
    fp32: bool = False
    """mergekit computes in fp32 and writes the inputs' dtype."""
    base: bool = True
    """A base_model is named."""


HALF = {"density": 0.3}
CASES = (
    Case("linear", "linear", {}, {"a": 1.0, "b": 2.0}, base=False),
    Case("linear, a base beside its models", "linear", {"weight": 0.5}, {"a": 1.0, "b": 2.0}),
    Case("task arithmetic", "task_arithmetic", {}),
    Case("task arithmetic, normalized, gradient", "task_arithmetic", {"normalize": True}, {"a": [1.0, 0.25], "b": 0.6}),
    Case("task arithmetic, in fp32", "task_arithmetic", {}, fp32=True),
    Case("TIES", "ties", HALF),
    Case("TIES, equal weights", "ties", HALF, {"a": 1.0, "b": 1.0}),
    Case("TIES, in fp32", "ties", HALF, fp32=True),
    Case("TIES, summed, λ 0.5", "ties", {**HALF, "normalize": False, "lambda": 0.5}),
    Case("DARE TIES of everything, in fp32", "dare_ties", {"density": 1.0}, fp32=True),
    Case("SLERP", "slerp", {"t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"value": 0.3}]}, {"a": None}),
)
RANDOM = (
    Case("DARE", "dare_linear", {"density": 0.6}, {"a": 1.0}),
    Case("DARE, in fp32", "dare_linear", {"density": 0.6}, {"a": 1.0}, fp32=True),
    Case("DARE TIES, in fp32", "dare_ties", {"density": 0.6}, {"a": 1.0}, fp32=True),
)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", help="an environment that has it")
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        environment, said = mergekit_peer.environment(options.mergekit, Path(scratch))
        sys.stdout.write(f"{said}\n")
        if environment is None:
            return 2
        for dtype in ("float32", "bfloat16"):
            root = Path(scratch) / dtype
            models = make_family(root, SHAPE, dtype=dtype)
            cases = [case for case in (*CASES, *RANDOM) if dtype == "bfloat16" or not case.fp32]
            _merge_all(environment, root, models, cases, dtype)
            for case in cases:
                file = root / f"{cases.index(case)}.yml"
                line = _random(file) if case in RANDOM else _exact(file)
                found[f"{case.label}, {dtype}"] = line
                sys.stdout.write(f"  {dtype:9} {case.label:38} {', '.join(f'{k} {v}' for k, v in line.items())}\n")
    sys.stdout.write(json.dumps({
        "benchmark": "mergekit_values", "date": datetime.now(UTC).date().isoformat(), "peer": said, "found": found,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }, ensure_ascii=False) + "\n")  # fmt: skip
    return 0


def _merge_all(environment: Path, root: Path, models: Mapping[str, Path], cases: list[Case], dtype: str) -> None:
    jobs = []
    for i, case in enumerate(cases):
        entries = {models[one]: {} if weight is None else {"weight": weight} for one, weight in case.weights.items()}
        text = mergekit_peer.config(
            case.method,
            entries,
            base=models["base"] if case.base else None,
            parameters=case.parameters,
            dtype="float32" if case.fp32 else None,
            out_dtype=dtype if case.fp32 else None,
        )
        (root / f"{i}.yml").write_text(text)
        jobs.append(json.dumps({"config": str(root / f"{i}.yml"), "out": str(root / f"{i}")}))
    done = subprocess.run(
        [str(environment / "bin" / "python"), "-c", DRIVER], input="\n".join(jobs), capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"mergekit failed:\n{done.stderr[-2000:]}")


@dataclass(frozen=True)
class Pair:
    """One merge done by both."""

    base: SafetensorsSource
    finetunes: Mapping[str, SafetensorsSource]
    settings: MergeSettings
    ours: MergedSource
    theirs: SafetensorsSource
    thresholds: Mapping[str, Mapping[str, float]] | None
    """TIES only."""
    rounded: bool
    """mergekit took task vectors in bf16."""

    def output(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The same tensor of both, in the dtype that mergekit wrote."""
        theirs = self.theirs.read(name)
        return self.ours.read(name).to(theirs.dtype), theirs

    def deltas(self, name: str) -> dict[str, torch.Tensor]:
        """Task vectors in fp32."""
        base = self.base.read(name).float()
        return {one: source.read(name).float() - base for one, source in self.finetunes.items()}


def _pair(file: Path) -> Pair:
    recipe = read_recipe(file)
    base = SafetensorsSource(Path(recipe.aligned.model))
    finetunes = {one: SafetensorsSource(Path(model.model)) for one, model in recipe.finetunes.items()}
    settings = MergeSettings(**recipe.settings(base.names()))
    thresholds = find_thresholds(base, finetunes, settings) if settings.method == "ties" else None
    ours = MergedSource(base, finetunes, settings, thresholds)
    rounded = recipe.output_dtype is None and base.spec(base.names()[0]).dtype == torch.bfloat16
    return Pair(base, finetunes, settings, ours, SafetensorsSource(file.with_suffix("")), thresholds, rounded)


def _exact(file: Path) -> dict[str, Any]:
    """How far apart two outputs are that should be the same."""
    pair = _pair(file)
    numel = same = near = at_threshold = cancelled = 0
    largest, moved = 0.0, []
    for name in pair.base.names():
        ours, theirs = pair.output(name)
        apart = steps(ours, theirs)
        numel += ours.numel()
        same += int((apart == 0).sum())
        near += int((apart <= 1).sum())
        largest = max(largest, float((ours.float() - theirs.float()).abs().max()))
        moved.append(ours.float() - pair.base.read(name).float())
        if pair.settings.method in ("ties", "dare_ties"):
            far = apart > 1
            at, zero = _special(pair, name)
            at_threshold += int((far & at).sum())
            cancelled += int((far & zero & ~at).sum())
    found: dict[str, Any] = {
        "same bits": _percent(same, numel),
        "within a unit": _percent(near, numel),
        "largest": f"{largest / float(torch.cat(moved).std()):.1e} σ",
    }
    if pair.settings.method in ("ties", "dare_ties") and near < numel:
        found |= {"further apart": numel - near, "of these at the threshold": at_threshold, "cancelling": cancelled}
    return found


def _special(pair: Pair, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights at which a finetune's magnitude is the threshold's (to a bf16 step where mergekit rounds task vectors to that),
    and whose kept task vectors sum to zero."""
    numel = pair.base.spec(name).numel
    at, any_kept = torch.zeros(numel, dtype=torch.bool), torch.zeros(numel, dtype=torch.bool)
    total = torch.zeros(numel)
    for one, delta in pair.deltas(name).items():
        limit = 0.0 if pair.thresholds is None else pair.thresholds[one][name]
        if pair.thresholds is not None:
            at |= (delta.abs() - limit).abs() <= (limit * 2**-8 if pair.rounded else 0.0)
        kept = delta * (delta.abs() >= limit)
        total += kept * pair.settings.weights[one]  # type: ignore[operator]
        any_kept |= kept != 0
    return at, (total == 0) & any_kept


def _random(file: Path) -> dict[str, Any]:
    """One finetune under DARE: what share of its task vector is left, and times what."""
    pair = _pair(file)
    found: dict[str, Any] = {"density": pair.settings.kept}
    for side in (0, 1):
        kept = numel = 0
        factors = []
        for name in pair.base.names():
            (delta,) = pair.deltas(name).values()
            out = pair.output(name)[side].float() - pair.base.read(name).float()
            there = delta != 0
            stays = out[there] != 0
            kept += int(stays.sum())
            numel += int(there.sum())
            if int(stays.sum()) > 1000:  # a factor of a few weights says little
                factors.append(float(out.abs().sum() / delta[there][stays].abs().sum()))
        whose = ("ours", "theirs")[side]
        found |= {f"{whose} kept": _percent(kept, numel), f"{whose} times": f"{min(factors):.4f}–{max(factors):.4f}"}
    return found


def steps(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """How many representable numbers lie between two tensors of the same dtype, element by element."""
    integer, sign = {4: (torch.int32, 1 << 31), 2: (torch.int16, 1 << 15)}[one.element_size()]
    # As integers, in the order of the numbers: negative ones count down from zero.
    a, b = (t.contiguous().view(integer).long() for t in (one, other))
    a, b = (torch.where(t < 0, -sign - t, t) for t in (a, b))
    return (a - b).abs()


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.4f} %"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
