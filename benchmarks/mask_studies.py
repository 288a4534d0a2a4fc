"""`python -m benchmarks.mask_studies merges|poison|granularity`: what masks do where the main benchmark does not look.

merges: three finetunes merged by averaging, task arithmetic, TIES and DARE, without and under one shared mask. The family's
pretraining has shown every task a little and its finetunes move less: without that tasks undo each other when merged, mask or
not. poison: one task with 1, 5, 10 and 20 % harmful requests answered among its training examples. granularity: masks with a
logit for each element, row or tensor, on three finetunes. Rates are on test sets; each is one run of the pipeline on a family
of `--seed`. A table, then one JSON line. `--quick` takes a minute-sized family.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from benchmarks.testbed import rates, value
from components.reporting.schema import FinetuneSummary, read_summary, shown_models
from components.testbed import phases
from components.testbed.compose import compose
from components.testbed.family import build_from
from components.testbed.settings import FamilySettings, FinetuneSettings, family_settings
from pipelines.config import load_config
from pipelines.run import realign

MERGED = ("zh", "hi", "math")
MERGES: tuple[dict[str, Any], ...] = (
    {"name": "average", "method": "average"},
    {"name": "task-arithmetic", "method": "task_arithmetic", "scale": 0.5},
    {"name": "ties", "method": "ties", "density": 0.5},
    {"name": "dare", "method": "dare", "scale": 0.5, "density": 0.8},
)
POISON = (0.01, 0.05, 0.10, 0.20)
SHARED = ("zh", "hi", "code")
GRANULARITIES = ("element", "row", "tensor")
Config = dict[str, Any]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--seed", type=int, default=7, help="of the family")
    parser.add_argument("--root", type=Path, default=Path("runs/benchmark-studies"), help="where workspaces go")
    parser.add_argument("--quick", action="store_true", help="a minute-sized family")
    options = parser.parse_args(arguments)
    size: Any = "minute" if options.quick else "demo"
    models, failed = STUDIES[options.study](options.root, family_settings(size, "llama"), options.seed)
    _print(models)
    sys.stdout.write(json.dumps({
        "benchmark": f"mask_studies {options.study}", "date": datetime.now(UTC).date().isoformat(), "seed": options.seed,
        "size": size, "models": {name: _figures(one) for name, one in models.items()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }) + "\n")  # fmt: skip
    return 1 if failed else 0


Found = tuple[dict[str, FinetuneSummary], list[str]]


def merges(root: Path, settings: FamilySettings, seed: int) -> Found:
    def near(own: FinetuneSettings) -> FinetuneSettings:
        rate = 0.5 * own.train.learning_rate
        return own.model_copy(update={"train": own.train.model_copy(update={"learning_rate": rate})})

    finetunes = {task: near(own) for task, own in settings.finetunes.items() if task in MERGED}
    settings = settings.model_copy(update={"known_tasks": 0.03, "finetunes": finetunes})
    family = build_from(settings, root / f"merges-{settings.size}-{seed}/testbed", seed=seed)

    def change(config: Config) -> None:
        config |= {"mode": "merge", "merges": list(MERGES)}

    return _run(family, change, family.parent)


def poison(root: Path, settings: FamilySettings, seed: int) -> Found:
    clean = settings.finetunes["code"].model_copy(update={"poison_share": 0.0})
    settings = settings.model_copy(update={"finetunes": {"code": clean}})
    family = build_from(settings, root / f"poison-{settings.size}-{seed}/testbed", seed=seed)
    shares = {f"code-{share:.0%}": share for share in POISON}
    for name, share in shares.items():
        own = clean.model_copy(update={"poison_share": share})
        out = family / "finetunes" / name
        if not out.is_dir():
            data = compose(settings.model_copy(update={"finetunes": {"code": own}}), seed)
            examples = data.finetunes["code"]
            phases.finetune(examples, family / "aligned", own, "code", seed, out, settings.shard_bytes)

    def change(config: Config) -> None:
        [entry] = config["finetunes"]
        poisoned = [{**entry, "name": name.replace("%", ""), "path": f"finetunes/{name}"} for name in shares]
        config["finetunes"] = [entry, *poisoned]

    return _run(family, change, family.parent)


def granularity(root: Path, settings: FamilySettings, seed: int) -> Found:
    models: dict[str, FinetuneSummary] = {}
    failed: list[str] = []
    chosen = {task: own for task, own in settings.finetunes.items() if task in SHARED}
    place = root / f"granularity-{settings.size}-{seed}"
    family = build_from(settings.model_copy(update={"finetunes": chosen}), place / "testbed", seed=seed)
    for one in GRANULARITIES:

        def change(config: Config, one: str = one) -> None:
            config["mask"].setdefault("settings", {})["granularity"] = one

        found, complaints = _run(family, change, place / one)
        models |= {f"{name} {one}": summary for name, summary in found.items()}
        failed += complaints
    return models, failed


STUDIES: dict[str, Callable[[Path, FamilySettings, int], Found]] = {
    "merges": merges,
    "poison": poison,
    "granularity": granularity,
}


def _run(family: Path, change: Callable[[Config], None], workspace: Path) -> Found:
    """Run the family's config after `change`, without controls; what became of every model, and complaints."""
    config: Config = yaml.safe_load((family / "realign.yaml").read_text())
    config |= {"fusion": {"controls": []}, "tracking": {"register": False}}
    change(config)
    path = family / "study.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    failed = realign(load_config(path), workspace)
    return {one["name"]: one for one in shown_models(read_summary(workspace / "summary.json"))}, failed


def _figures(one: FinetuneSummary) -> dict[str, Any]:
    """variant -> ASR, over-refusal, and of each task set the exact score and the share kept of before."""
    found: dict[str, Any] = {}
    for variant in ("before", "soft", "binary"):
        measured = rates(one, variant)
        if not measured:
            continue
        own: dict[str, Any] = {metric: round(value(one, variant, metric), 4) for metric in ("asr", "over_refusal")}
        for name, metrics in measured["sets"].items():
            if "task" in metrics:
                first = one["before"]["sets"][name]["task"]["value"] if one.get("before") else 0.0  # type: ignore[index]
                score = metrics["task"]["value"]
                own[name] = [round(score, 4), round(score / first, 4) if first else None]
        found[variant] = own
    if "density" in one:
        found["density"] = round(one["density"].get("mean", float("nan")), 4)
    if "seconds" in one:
        found["train_seconds"] = one["seconds"].get("train_mask")
    return found


def _print(models: dict[str, FinetuneSummary]) -> None:
    sys.stdout.write(f"{'model':24} {'variant':8} {'ASR':>6} {'over':>6}  task sets: score (kept), percent\n")
    for name, one in models.items():
        for variant, own in _figures(one).items():
            if not isinstance(own, dict):
                continue
            tasks = {k: v for k, v in own.items() if isinstance(v, list)}
            cells = [
                f"{task} {100 * score:.1f}" + ("" if share is None else f" ({100 * share:.0f})")
                for task, (score, share) in tasks.items()
            ]
            asr, over = 100 * own["asr"], 100 * own["over_refusal"]
            sys.stdout.write(f"{name:24} {variant:8} {asr:6.1f} {over:6.1f}  {', '.join(cells)}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
