"""`python -m benchmarks.sweep`: what a sweep of the testbed's fusion settings finds, and what it costs.

Two finetunes of the demo family, the usual space and objectives, one process with one thread. By finetune:

* a sweep of 60 candidates (tpe, racing) against 200 drawn at random and asked everything: the volumes of their fronts;
* whether the front has settings at least as good as the run's own in every objective, on the dev prompts that they were chosen
  by; the winner may give up some safety within the demand for skill;
* the same 60 candidates asked everything: whether the winner is the same, and the share of prompts that racing spent;
* what a trial takes beyond fusing and asking, in this process and by two actors of Ray Tune.

`--run`: a workspace in which the family's masks were trained (`realign run`); without it they are trained first. `--quick`: the
minute family, few of everything. Prints a line each, then one JSON line. Exit status 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

_CACHE = Path(os.environ.get("REALIGN_CACHE", Path.home() / ".cache" / "safety-realign"))
BARS = {"hypervolume": 1.0, "overhead_s": 0.3, "prompts": 0.5}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", type=Path, help="a demo family that is there already")
    parser.add_argument("--run", type=Path, help="a workspace with its masks")
    parser.add_argument("--finetunes", nargs="+", default=["hi", "code"])
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--random", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    if options.quick:
        options.finetunes, options.trials, options.random = ["zh"], 12, 12
    with tempfile.TemporaryDirectory() as made:
        found = {one.name: _measured(one, options, Path(made)) for one in _targets(options, Path(made))}
    held = all(_holds(one) for one in found.values())
    sys.stdout.write(json.dumps({
        "benchmark": "sweep", "date": datetime.now(UTC).date().isoformat(), "trials": options.trials,
        "random": options.random, "seed": options.seed, "quick": options.quick, "finetunes": found,
        "ratios": {key: {name: one[key] for name, one in found.items()} for key in ("hypervolume", "prompts")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }) + "\n")  # fmt: skip
    return 0 if held or options.quick else 1


def _targets(options: argparse.Namespace, made: Path) -> list[Any]:
    """What is swept, its masks trained."""
    from components.storage import Workspace
    from components.sweeps.settings import SweepSettings
    from pipelines.config import load_config
    from pipelines.driver import run_stages
    from pipelines.roots import find_roots
    from pipelines.sweeps import is_needed, target_of

    (made / "realign.yaml").write_text(yaml.safe_dump(_config(options)))
    config = load_config(made / "realign.yaml")
    config = config.model_copy(update={"sweep": SweepSettings(trials=options.trials, seed=options.seed)})
    workspace = Workspace(options.run or made / "workspace")
    workspace.prepare()
    roots = find_roots(config, workspace.root / ".identities")
    state = run_stages(config, workspace, roots, lambda nodes: None, is_needed)
    return [target_of(state, name) for name in config.targets]


def _config(options: argparse.Namespace) -> dict[str, Any]:
    """The family's own config with some of its finetunes, paths absolute."""
    from components.testbed.family import cached_family
    from components.testbed.settings import family_settings

    size, seed = ("minute", 0) if options.quick else ("demo", 7)
    root = options.family or cached_family(family_settings(size, "llama"), seed=seed, cache=_CACHE / "testbed")
    config: dict[str, Any] = yaml.safe_load((root / "realign.yaml").read_text())
    named = {one["name"] for one in config["finetunes"]} - set(options.finetunes)
    config["finetunes"] = [one for one in config["finetunes"] if one["name"] not in named]
    config["evaluation"]["sets"] = [one for one in config["evaluation"]["sets"] if one["name"] not in named]
    config["fusion"] = {}
    if options.quick:
        config["mask"]["settings"] = {**config["mask"].get("settings", {}), "steps": 20}
    for section in (config, config["mask"], *config["finetunes"], *config["evaluation"]["sets"]):
        for key in ("aligned", "unaligned", "preferences", "preferences_dev", "path", "anchor"):
            if key in section:
                section[key] = str(root / section[key])
    return config


@dataclass
class _Swept:
    """What a sweep left, and how long it was at it: from the first candidate's end to the last's."""

    scored: list[Any]
    seconds: float
    work: float
    """Of that, fusing and asking; summed over processes."""

    def overhead(self, actors: int) -> float:
        """Seconds of a process beyond its work, by trial."""
        return (self.seconds * actors - self.work) / max(len(self.scored) - actors, 1)


def _swept(sweeping: Any, actors: int, state: Path) -> _Swept:
    from components.evaluation.execution import EvaluationExecution
    from ray_jobs.sweep_trials import sweep_target

    ends: list[float] = []
    how = EvaluationExecution(actors=actors)
    scored = sweep_target(sweeping, how, state_dir=state, progress=lambda _: ends.append(time.perf_counter()))
    # In the order in which they ended; what began before the first of them ended is not counted.
    work = [sum(one.seconds.values()) for one in scored]
    return _Swept(scored, ends[-1] - ends[actors - 1], sum(work[actors:]))


def _measured(target: Any, options: argparse.Namespace, made: Path) -> dict[str, Any]:
    """One finetune's figures."""
    from components.sweeps.result import sweep_result

    sweeping, name = target.sweeping, target.name
    counts = {key: len(asked) for key, asked in sweeping.questions.items()}
    raced = _swept(sweeping, 1, made / name / "raced")
    drawn = replace(
        sweeping,
        sweep=sweeping.sweep.model_copy(
            update={"racing": False, "sampler": "random", "trials": options.random, "seed": options.seed}
        ),
    )
    reached = _volume(sweeping, _swept(drawn, 1, made / name / "drawn").scored, counts)
    trying = sweeping.trying("cpu")
    whole = [trying.scored(one.candidate, None) for one in raced.scored]
    made_of = {"sweep": sweeping.sweep, "defaults": sweeping.defaults, "own": sweeping.own, "prompts": counts}
    by_race, by_all = (sweep_result(name, some, **made_of) for some in (raced.scored, whole))
    found = {
        "hypervolume": round(_volume(sweeping, raced.scored, counts) / reached, 4),
        "hypervolume_unraced": round(_volume(sweeping, whole, counts) / reached, 4),
        "prompts": round(by_race["prompts"]["asked"] / by_race["prompts"]["all"], 4),
        "same_winner": _losses(by_race["picked"], sweeping) == _losses(by_all["picked"], sweeping),
        "winner": by_race["picked"]["settings"]["fusion"],
        "rates": {key: rate["value"] for key, rate in by_race["picked"]["rates"].items()},
        "own": [{key: rate["value"] for key, rate in one["rates"].items()} for one in by_race["own"]],
        "winner_no_worse": all(_no_worse(by_race["picked"], one, sweeping) for one in by_race["own"]),
        "front_no_worse": any(
            all(_no_worse(one, own, sweeping) for own in by_race["own"])
            for one in by_race["front"]
            if one["candidate"] not in sweeping.own
        ),
        "overhead_s": round(raced.overhead(1), 4),
        "overhead_tune_s": round(_by_actors(sweeping, made / name / "actors"), 4),
        "trial_s": round(raced.work / max(len(raced.scored) - 1, 1), 3),
    }
    sys.stdout.write(f"{name}: {json.dumps(found)}\n")
    sys.stdout.flush()
    return found


def _by_actors(sweeping: Any, state: Path) -> float:
    from ray_jobs.submit import started_ray

    with started_ray(2):
        return _swept(sweeping, 2, state).overhead(2)


def _volume(sweeping: Any, scored: Sequence[Any], counts: dict[str, int]) -> float:
    """That the front of those beats which were asked everything."""
    from components.sweeps.front import hypervolume, reference_of

    objectives = sweeping.sweep.objectives
    return hypervolume([one.losses(objectives) for one in scored if one.is_full(counts)], reference_of(objectives))


def _no_worse(one: Any, other: Any, sweeping: Any) -> bool:
    return all(a <= b for a, b in zip(_losses(one, sweeping), _losses(other, sweeping), strict=True))


def _losses(entry: Any, sweeping: Any) -> list[float]:
    return [one.loss(entry["rates"][one.name]["value"]) for one in sweeping.sweep.objectives]


def _holds(found: dict[str, Any]) -> bool:
    overhead = max(found["overhead_s"], found["overhead_tune_s"]) <= BARS["overhead_s"]
    front = found["hypervolume"] >= BARS["hypervolume"] and found["prompts"] <= BARS["prompts"]
    return bool(overhead and front and found["same_winner"] and found["front_no_worse"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
