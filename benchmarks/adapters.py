"""`python -m benchmarks.adapters`: LoRA finetunes in, adapters out, in both ways.

First the family's LoRA finetune under a mask on its weights, leaving as adapters of several ranks by truncated SVD: what each
loses of the delta's norm, and what it does. Then the LoRA track: task LoRAs that continued a safety LoRA, masked factor by
factor, which come out exactly. Test sets. Prints a table, then one JSON line. `--quick` takes a minute-sized family, one rank
and one task LoRA.
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

from components.reporting.schema import FinetuneSummary, read_summary
from components.testbed.family import build_family
from components.testbed.lora_track import build_lora_track, lora_track_config
from components.testbed.settings import Task
from pipelines.config import load_config
from pipelines.run import realign

RANKS: tuple[int | None, ...] = (None, 4, 32, 1000)
"""None: the adapter's own, 16; 1000: all there is."""
TASKS: tuple[Task, ...] = ("zh", "hi", "math")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=8, help="of the family")
    parser.add_argument("--size", choices=("minute", "demo"), default="demo", help="of the family")
    parser.add_argument("--root", type=Path, default=Path("runs/benchmark-adapters"), help="where the workspaces go")
    parser.add_argument("--quick", action="store_true", help="a minute-sized family, one rank, one task LoRA")
    options = parser.parse_args(arguments)
    size: Any = "minute" if options.quick else options.size
    root = (options.root / f"{size}-{options.seed}").absolute()
    family = build_family(root / "testbed", seed=options.seed, size=size, cache=None)
    rows = []
    for rank in RANKS[:1] if options.quick else RANKS:
        rows += _by_rank(family, root, rank, first=rank is None)
    rows += _lora_track(family, root, TASKS[:1] if options.quick else TASKS)
    _print(rows)
    told = {"benchmark": "adapters", "date": datetime.now(UTC).date().isoformat(), "seed": options.seed, "size": size}
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    sys.stdout.write(json.dumps({**told, "rows": rows, "machine": machine}) + "\n")
    return 0


def _by_rank(family: Path, root: Path, rank: int | None, *, first: bool) -> list[dict[str, Any]]:
    """The family's LoRA finetune at one rank; on the first call also what it is compared with."""
    config: dict[str, Any] = yaml.safe_load((family / "realign.yaml").read_text())
    config["finetunes"] = [f for f in config["finetunes"] if f["name"] == "hi"]
    config["fusion"] = {"controls": [], "adapter": {"rank": rank}}
    hi = _run(config, family / "adapters.yaml", root / "weights")[0]
    form = hi["adapter"]["form"]
    rows = [_row(f"hi, {form}, adapter of rank {rank or 'its own'}", hi, "after_adapter", hi["adapter"]["error"])]
    if first:
        rows = [_row("hi, before", hi, "before"), _row(f"hi, {form}, full model", hi, f"after_{form}"), *rows]
    return rows


def _lora_track(family: Path, root: Path, tasks: tuple[Task, ...]) -> list[dict[str, Any]]:
    build_lora_track(family, root / "adapters", tasks=tasks)
    config = lora_track_config(family, root / "adapters", tasks=tasks)
    rows = []
    for found in _run(config, family / "lora-track.yaml", root / "factors"):
        name = f"{found['name']} (factors)"
        rows += [
            _row(f"{name}, {key.removeprefix('after_')}", found, key)
            for key in ("before", "after_soft", "after_binary")
        ]
        rows.append(_row(f"{name}, random mask", found["controls"], "random_mask"))
    return rows


def _run(config: dict[str, Any], path: Path, workspace: Path) -> list[FinetuneSummary]:
    config["tracking"] = {"register": False}
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    if realign(load_config(path), workspace):
        raise SystemExit(1)
    return read_summary(workspace / "summary.json")["finetunes"]


def _print(rows: list[dict[str, Any]]) -> None:
    columns = ("asr", "over_refusal", "task", "error")
    sys.stdout.write(f"{'percent':40}" + "".join(f"{column:>14}" for column in columns) + "\n")
    for row in rows:
        cells = [f"{100 * row['rates'][c]:.1f}" if c in row["rates"] else "" for c in columns]
        sys.stdout.write(f"{row['what']:40}" + "".join(f"{cell:>14}" for cell in cells) + "\n")


def _row(what: str, found: Any, key: str, error: float | None = None) -> dict[str, Any]:
    rates = {m: round(found[key][m]["value"], 4) for m in ("asr", "harmful", "over_refusal", "task")}
    return {"what": what, "rates": rates if error is None else {**rates, "error": round(error, 4)}}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
