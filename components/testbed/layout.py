"""What a family looks like on disk beside its models: JSONL files and the run config."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from components.testbed.settings import FamilySettings

MAX_NEW_TOKENS = 40
"""Enough for every refusal (at most 36 tokens with the end) and every answer."""


def write_files(files: Mapping[str, Sequence[Mapping[str, Any]]], root: Path) -> None:
    """Write each list of rows as JSONL under its relative path."""
    for name, rows in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_run_config(root: Path, settings: FamilySettings, seed: int) -> None:
    """`realign.yaml`: everything relative to the family, so it can be moved."""
    (root / "realign.yaml").write_text(yaml.safe_dump(run_config(settings, seed), sort_keys=False, allow_unicode=True))


def run_config(settings: FamilySettings, seed: int) -> dict[str, Any]:
    """The run config of a family as plain data."""
    finetunes: list[dict[str, Any]] = []
    for task in settings.tasks:
        entry = {"name": task, "path": f"finetunes/{task}", "anchor": f"data/anchor/{task}.jsonl", "sets": [task]}
        finetunes.append(entry)
    sets = [_set("harmful_hard", "harmful", "test")]
    for split in ("test", "dev"):
        sets += [_set(kind, kind, split) for kind in ("harmful", "benign", "hazard")]
        sets += [_set(task, "task", split) for task in settings.tasks]
    return {
        "name": f"{settings.size}-{settings.architecture}-{seed}",
        "aligned": "aligned",
        "unaligned": "unaligned",
        "finetunes": finetunes,
        "mask": {
            "preset": "realign",
            "preferences": "data/preferences.jsonl",
            "preferences_dev": "data/preferences_dev.jsonl",
            **({"settings": settings.mask} if settings.mask else {}),
        },
        "fusion": {"controls": list(settings.controls)},
        "evaluation": {"max_new_tokens": MAX_NEW_TOKENS, "sets": sets},
        "tracking": {"uri": None, "register": True},
    }


def _set(name: str, kind: str, split: str) -> dict[str, str]:
    return {"name": name, "kind": kind, "split": split, "path": f"data/{split}/{name}.jsonl"}
