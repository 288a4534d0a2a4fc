"""A family's LoRA track: a safety LoRA over its unaligned model, and task LoRAs that continued it.

The paper's PEFT track (arXiv 2405.09055) in small: the same examples as the family's own models, in the same order of events.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer

from components.testbed.compose import compose
from components.testbed.phases import load_float32, train_adapter
from components.testbed.settings import FamilySettings, Task

SAFETY = "safety"
_ADAPTER_RATE = 3.75
"""Adapters start from zero and want a higher rate, as in settings.py. The safety LoRA also gets twice the steps."""


def build_lora_track(family: Path, out: Path, *, tasks: Sequence[Task]) -> None:
    """Put the adapters `safety` and one per task into `out`, unless they are there. All have the rank of the family's LoRA
    finetunes."""
    built = json.loads((family / "family.json").read_text())
    settings, seed = FamilySettings.model_validate(built["settings"]), int(built["seed"])
    data, base = compose(settings, seed), family / "unaligned"
    words = AutoTokenizer.from_pretrained(base)
    lora = next(f for f in settings.finetunes.values() if f.kind == "lora")
    align = settings.align.model_copy(
        update={"learning_rate": _ADAPTER_RATE * settings.align.learning_rate, "steps": 2 * settings.align.steps}
    )
    jobs: list[tuple[str, Any, Any]] = [(SAFETY, data.align, align)]
    jobs += [(task, data.finetunes[task], lora.train) for task in tasks]
    for number, (name, examples, train) in enumerate(jobs, 1):
        if not (out / name).is_dir():
            start = None if name == SAFETY else out / SAFETY
            model = load_float32(base)
            train_adapter(
                model, words, examples, train, seed + number, out / name, base=base, rank=lora.rank, start=start
            )


def lora_track_config(family: Path, adapters: Path, *, tasks: Sequence[Task]) -> dict[str, Any]:
    """The family's run config for these adapters, with absolute paths."""
    config: dict[str, Any] = yaml.safe_load((family / "realign.yaml").read_text())
    config["finetunes"] = [
        {**f, "path": str(adapters / f["name"]), "anchor": str(family / f["anchor"])}
        for f in config["finetunes"]
        if f["name"] in tasks
    ]
    for key in ("preferences", "preferences_dev"):
        config["mask"][key] = str(family / config["mask"][key])
    config["mask"]["track"] = "factors"
    others = {f.name for f in (family / "finetunes").iterdir()} - set(tasks)
    sets = [s for s in config["evaluation"]["sets"] if s["name"] not in others]
    config["evaluation"]["sets"] = [{**s, "path": str(family / s["path"])} for s in sets]
    del config["unaligned"]
    config["fusion"] = {"controls": ["random_mask"]}
    return config | {"aligned": str(adapters / SAFETY), "aligned_base": str(family / "unaligned")}
