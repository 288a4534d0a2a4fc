"""A run small enough for tests: two finetunes of the minute family, few steps, few prompts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.families import minute_family

KINDS_OF_PROMPTS = 12


def small_config(directory: Path, *, finetunes: tuple[str, ...] = ("zh", "hi"), steps: int = 25) -> dict[str, Any]:
    """A run config as plain data, with absolute paths."""
    family = minute_family()
    config: dict[str, Any] = yaml.safe_load((family / "realign.yaml").read_text())
    config["name"] = "small"
    config["finetunes"] = [f for f in config["finetunes"] if f["name"] in finetunes]
    config["mask"]["settings"] = {**config["mask"].get("settings", {}), "steps": steps}
    config["fusion"] = {"controls": ["interpolation", "random_mask"], "candidates": [0.3, 0.6]}
    if "hi" in finetunes:  # the family's LoRA adapter
        config["fusion"]["adapter"] = {"rank": 3}
    tasks = {"zh", "en", "hi", "code", "math"}
    sets = [s for s in config["evaluation"]["sets"] if s["name"] not in tasks - set(finetunes)]
    config["evaluation"]["sets"] = [{**s, "limit": KINDS_OF_PROMPTS} for s in sets]
    for section in (config, config["mask"], *config["finetunes"], *config["evaluation"]["sets"]):
        for key in ("aligned", "unaligned", "preferences", "preferences_dev", "path", "anchor"):
            if key in section:
                section[key] = str(family / section[key])
    return config


def write_config(directory: Path, config: dict[str, Any]) -> Path:
    path = directory / "realign.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def command(config: Path, workspace: Path) -> list[str]:
    return [sys.executable, "-m", "pipelines.cli", "run", str(config), "--workspace", str(workspace)]


def run(config: Path, workspace: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(config, workspace), capture_output=True, text=True, check=False)


def records(workspace: Path) -> dict[str, dict[str, Any]]:
    """`<stage>/<fingerprint>` -> record, of everything published."""
    return {
        f"{path.parent.parent.name}/{path.parent.name}": json.loads(path.read_text())
        for path in workspace.glob("*/*/record.json")
        if not path.parent.name.startswith(".")
    }
