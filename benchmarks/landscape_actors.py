"""`python -m benchmarks.landscape_actors`: a grid of a landscape by one process and by two actors of Ray Tune.

The testbed's aligned model, 21 points of one random direction, every process with one thread: one process of its own, as a run
without actors has it, and two actors, in turn. Timed from the begin of the first point to the end of the last; what starting
takes is told beside it. The points must be the same.

Prints a line a round, then one JSON line; the ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

_CACHE = Path(os.environ.get("REALIGN_CACHE", Path.home() / ".cache" / "safety-realign"))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=240)
    parser.add_argument("--points", type=int, default=21)
    parser.add_argument("--new", type=int, default=40, help="tokens of an answer at most")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--family", type=Path, help="a testbed family that is there already")
    options = parser.parse_args(arguments)
    from ray_jobs.submit import started_ray

    surveying = _surveying(options)
    ratios, starts, same = [], [], True
    with started_ray(options.actors):
        for _ in range(options.rounds):
            (alone, _, points), (shared, start, others) = _timed(surveying, 1), _timed(surveying, options.actors)
            same = same and points == others
            ratios.append(alone / shared)
            starts.append(start)
            sys.stdout.write(
                f"{alone:.2f} s by one process, {shared:.2f} s by {options.actors} actors: {ratios[-1]:.2f} times\n"
            )
            sys.stdout.flush()
    sys.stdout.write(json.dumps({
        "benchmark": "landscape_actors", "date": datetime.now(UTC).date().isoformat(),
        "ratios": {"actors_vs_one": round(median(ratios), 3)}, "rounds": [round(one, 2) for one in ratios],
        "same_points": same, "start_s": round(median(starts), 1), "points": options.points, "prompts": options.prompts,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }) + "\n")  # fmt: skip
    return 0 if same else 1


def _surveying(options: argparse.Namespace) -> Any:
    from components.evaluation.prompts import load_prompt_set
    from components.evaluation.settings import EvaluationSettings, SetSettings
    from components.landscape.settings import RandomAxis, Scan
    from components.testbed.family import cached_family
    from components.testbed.settings import family_settings
    from ray_jobs.actors import Place
    from ray_jobs.landscape_trials import Surveying

    root = options.family or cached_family(family_settings("demo", "llama"), seed=7, cache=_CACHE)
    path = root / "data" / "test" / "harmful.jsonl"
    return Surveying(
        place=Place(root / "aligned"),
        sources={},
        scans=(Scan(axes=(RandomAxis(seed=500),), directions=1, points=options.points),),
        sets=(load_prompt_set(SetSettings(name="harmful", kind="harmful", path=path, limit=options.prompts)),),
        settings=EvaluationSettings(max_new_tokens=options.new),
        batch_size=4,
    )


def _timed(surveying: Any, actors: int) -> tuple[float, float, list[Any]]:
    """(seconds of the points, seconds before the first of them, the points without what they took)."""
    from components.evaluation.execution import EvaluationExecution
    from ray_jobs.landscape_trials import survey_points

    ends: list[float] = []
    started = time.time()
    with tempfile.TemporaryDirectory() as state:
        points, _ = survey_points(
            surveying,
            EvaluationExecution(actors=actors),
            state_dir=Path(state),
            progress=lambda _: ends.append(time.time()),
        )
        taken = [json.loads(line)["seconds"] for line in (Path(state) / "points.jsonl").read_text().splitlines()]
    begin = min(end - seconds for end, seconds in zip(ends, taken, strict=True))
    found = sorted((point.to_json() for point in points), key=lambda one: one["at"])
    for one in found:
        del one["seconds"]
    return ends[-1] - begin, begin - started, found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
