"""A sweep in MLflow: one run, and below it one for each candidate of a front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from components.leases import acquire
from components.records import fingerprint
from components.sweeps.result import Entry, SweepResult, asked_share
from components.sweeps.trials import candidate_id
from components.tracked import TrackedRun
from components.tracking import Tracker
from pipelines.config import RunConfig


def track_sweep(
    config: RunConfig, root: Path, results: Mapping[str, SweepResult], *, artifacts: Sequence[Path]
) -> None:
    """Project a sweep's results. Raises TrackingError when the server cannot be reached or refuses; sweeping again, which tries
    nothing twice, does the same."""
    tracking = config.tracking
    lease = acquire(root / ".tracking.lease", done=lambda: False)
    assert lease is not None
    with lease:  # what is looked up before it is made must not be made twice
        tracker = Tracker(uri=tracking.uri, experiment=tracking.experiment or config.name, workspace=root)
        tracker.project(tracked_sweep(config, results, artifacts=artifacts))


def tracked_sweep(config: RunConfig, results: Mapping[str, SweepResult], *, artifacts: Sequence[Path]) -> TrackedRun:
    """What is shown: a sweep that found the same is the same run."""
    fronts = {name: [one["candidate"] for one in result["front"]] for name, result in results.items()}
    counts = {name: len(result["trials"]) for name, result in results.items()}
    semantics = {"name": config.name, "fronts": fronts, "trials": counts}
    metrics = {f"{name}/hypervolume": result["hypervolume"] for name, result in results.items()}
    metrics |= {f"{name}/prompts_share": asked_share(result) for name, result in results.items()}
    for name, result in results.items():
        metrics |= {f"{name}/picked/{key}": value for key, value in _rates(result["picked"]).items()}
    return TrackedRun(
        name=f"{config.name} sweep",
        fingerprint=fingerprint(stage="sweep", version=1, semantics=semantics, parents={}),
        started_ms=min(result["started_ms"] for result in results.values()),
        params={"sweep": config.sweep.model_dump(mode="json", exclude={"space"}) if config.sweep else {}},
        metrics=metrics,
        tags={"realign.sweep": "true"},
        artifacts=artifacts,
        children=[_child(name, result, one) for name, result in results.items() for one in result["front"]],
    )


def _child(name: str, result: SweepResult, one: Entry) -> TrackedRun:
    picked = one["number"] == result["picked"]["number"]
    return TrackedRun(
        name=f"{name} {one['number']}" + (" picked" if picked else ""),
        fingerprint=f"{name}/{candidate_id(one['candidate'])}",
        started_ms=result["started_ms"],
        params={"settings": one["settings"]},
        metrics=_rates(one),
        tags={
            "realign.target": name,
            "realign.picked": str(picked).lower(),
            "realign.meets": str(one["meets"]).lower(),
        },
    )


def _rates(one: Entry) -> dict[str, float]:
    return {
        f"dev/{name.replace('/', '_')}{end}": interval[key]  # type: ignore[literal-required]
        for name, interval in one["rates"].items()
        for end, key in (("", "value"), ("_low", "low"), ("_high", "high"))
    }
