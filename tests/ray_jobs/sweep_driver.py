"""What `test_sweep_trials.py` runs in a process of its own: Ray reads its token when it is imported."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from components.checkpoints.reference import open_checkpoint
from components.errors import RealignError
from components.evaluation.execution import EvaluationExecution
from components.evaluation.prompts import load_prompt_set
from components.evaluation.settings import EvaluationSettings, SetSettings
from components.fusion.settings import FusionSettings
from components.masks.artifact import write_artifact
from components.masks.settings import MaskSettings
from components.sweeps.settings import Range, SweepSettings
from components.sweeps.space import Tuning
from components.sweeps.trials import TRIALS_FILE, Scored, candidate_key
from ray_jobs.submit import started_ray
from ray_jobs.sweep_trials import Sweeping, sweep_target
from tests.families import minute_family
from tests.ray_jobs.watching import Watching, murder

SETTINGS = SweepSettings(
    trials=8,
    space={
        "method": ("masked", "interpolation"),
        "form": ("soft", "binary"),
        "scale": Range(low=0.3, high=1.5),
        "alpha": Range(low=0, high=1),
    },
    sample=8,
)


def write_mask(directory: Path) -> Path:
    """As a training leaves it, with logits by chance."""
    source = open_checkpoint(minute_family() / "aligned").source
    generator = torch.Generator().manual_seed(0)
    logits = {name: torch.randn(source.spec(name).numel, generator=generator) for name in source.names()}
    write_artifact(
        directory / "mask",
        shapes={name: source.spec(name).shape for name in logits},
        shards=((name, 0, one.numel(), one) for name, one in logits.items()),
        settings=MaskSettings(),
    )
    return directory / "mask"


def sweeping(directory: Path, **more: Any) -> Sweeping:
    """A finetune of the minute family, over a few prompts."""
    family = minute_family()
    sets = [
        SetSettings(name=name, kind=kind, split="dev", path=family / "data" / "dev" / f"{name}.jsonl", limit=24)  # type: ignore[arg-type]
        for name, kind in (("harmful", "harmful"), ("benign", "benign"), ("zh", "task"))
    ]
    return Sweeping(
        aligned={"path": str(family / "aligned")},
        finetunes={"zh": {"path": str(family / "finetunes" / "zh")}},
        unaligned=None,
        mask=directory / "mask",
        sets=tuple(load_prompt_set(one) for one in sets),
        evaluation=EvaluationSettings(max_new_tokens=12),
        sweep=more.pop("sweep", SETTINGS),
        space=more.pop("space", SETTINGS.space),
        defaults=Tuning(fusion=FusionSettings(method="masked", form="soft")),
        own=({}, {"form": "binary"}),
        batch_size=64,
        **more,
    )


def plain(scored: list[Scored]) -> dict[str, Any]:
    """Candidate -> what became of it, without times."""
    return {candidate_key(one.candidate): [dict(one.hits), one.stopped] for one in scored}


def swept(directory: Path, actors: int, state: str, **more: Any) -> list[Scored]:
    execution = EvaluationExecution(actors=actors, max_losses=more.pop("losses", 0))
    asked = sweeping(directory, sweep=more.pop("sweep", SETTINGS), space=more.pop("space", SETTINGS.space))
    asked = replace(asked, own=more.pop("own", asked.own))
    return sweep_target(asked, execution, state_dir=directory / state, **more)


def too_many(directory: Path) -> str:
    """What a sweep ends with that loses an actor and may lose none."""
    try:
        swept(directory, 2, "too many", progress=Watching(2, murder))
    except RealignError as error:
        return str(error)
    raise AssertionError("it went on")


def see(directory: Path) -> dict[str, Any]:
    path = directory / "killed" / TRIALS_FILE
    before = path.read_text().count("\n")
    with path.open("a") as file:
        file.write('{"candidate": {"met')  # what a process wrote when it was killed
    watching = Watching(2, murder)
    resumed = swept(directory, 2, "killed", losses=1, progress=watching)
    # Whatever two actors tried is asked of this process, too: everything, and then as far as they went.
    full = replace(sweeping(directory), sweep=SETTINGS.model_copy(update={"racing": False, "trials": 2})).trying("cpu")
    return {
        "before": before,
        "told": watching.told,
        "resumed": plain(resumed),
        "lines": path.read_text().splitlines(),
        "here": plain([full.scored(one.candidate, None) for one in resumed]),
        "too many": too_many(directory),
        "storage": sorted(one.name for one in directory.glob("*/tune*")),
    }


def main() -> None:
    directory, what = Path(sys.argv[1]), sys.argv[2]
    with started_ray(2):
        if what == "die":
            die = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
            swept(directory, 2, "killed", progress=Watching(4, die))
        print(json.dumps(see(directory)))


if __name__ == "__main__":
    main()
