"""`python -m benchmarks.mask_reuse`: each finetune's mask on every finetune of its family, without training.

One run of the pipeline: the five finetunes with masks of their own, and each once more with every other one's
(`mask_of`). Prints a matrix of attack success rate and of task score kept (rows: whose mask; columns: on whom), soft and
binary, on the test sets, then one JSON line. `--quick` takes one minute-sized family and two finetunes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from benchmarks.testbed import kept, value
from components.reporting.schema import FinetuneSummary, read_summary
from components.testbed.family import build_family
from pipelines.config import load_config
from pipelines.run import realign


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=7, help="of the family")
    parser.add_argument("--root", type=Path, default=Path("runs/benchmark-reuse"), help="where the workspace goes")
    parser.add_argument("--quick", action="store_true", help="a minute-sized family, two finetunes")
    options = parser.parse_args(arguments)
    size: Any = "minute" if options.quick else "demo"
    root = options.root / f"{size}-{options.seed}"
    family = build_family(root / "testbed", seed=options.seed, size=size, cache=None)
    names = _write_config(family, quick=options.quick)
    failed = realign(load_config(family / "reuse.yaml"), root)
    finetunes = {f["name"]: f for f in read_summary(root / "summary.json")["finetunes"]}
    matrices = {form: _matrix(names, finetunes, form) for form in ("soft", "binary")}
    for form, matrix in matrices.items():
        _print(names, matrix, form)
    sys.stdout.write(json.dumps({
        "benchmark": "mask_reuse", "date": datetime.now(UTC).date().isoformat(), "seed": options.seed, "size": size,
        "matrices": matrices, "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }) + "\n")  # fmt: skip
    return 1 if failed else 0


def _pair(owner: str, target: str) -> str:
    return target if owner == target else f"{target}-with-mask-of-{owner}"


def _write_config(family: Path, *, quick: bool) -> list[str]:
    """The family's run config with every finetune under every mask, and no controls; the finetunes' names."""
    config: dict[str, Any] = yaml.safe_load((family / "realign.yaml").read_text())
    finetunes = config["finetunes"][:2] if quick else config["finetunes"]
    names = [f["name"] for f in finetunes]
    borrowed = [
        {**f, "name": _pair(owner, f["name"]), "mask_of": owner}
        for f in finetunes
        for owner in names
        if owner != f["name"]
    ]
    config |= {"name": "reuse", "finetunes": [*finetunes, *borrowed], "fusion": {"controls": []}}
    config["tracking"] = {"register": False}
    (family / "reuse.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return names


def _matrix(names: list[str], finetunes: dict[str, FinetuneSummary], form: str) -> dict[str, dict[str, list[float]]]:
    """owner -> target -> [ASR, task score kept]."""
    return {
        owner: {
            target: [
                round(value(finetunes[_pair(owner, target)], form, "asr"), 4),
                round(kept(finetunes[_pair(owner, target)], form), 4),
            ]
            for target in names
        }
        for owner in names
    }


def _print(names: list[str], matrix: dict[str, dict[str, list[float]]], form: str) -> None:
    sys.stdout.write(f"{form}: ASR / task kept, percent (rows: whose mask, columns: on whom)\n")
    sys.stdout.write(f"{'':8}" + "".join(f"{name:>14}" for name in names) + "\n")
    for owner in names:
        cells = [f"{100 * asr:.1f} / {100 * skill:.0f}" for asr, skill in matrix[owner].values()]
        sys.stdout.write(f"{owner:8}" + "".join(f"{cell:>14}" for cell in cells) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
