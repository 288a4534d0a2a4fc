"""Actions: what is done to the outside world after the stages. Always executed, idempotent by fingerprint."""

from __future__ import annotations

import hashlib
from datetime import datetime
from pathlib import Path
from typing import Any

from components.evaluation.choose import FORMS
from components.leases import acquire
from components.records import Record, canonical_json, fingerprint
from components.reporting.heat_map import density_svg, layer_figures
from components.reporting.schema import FinetuneSummary, RunSummary, shown_models
from components.storage import storage_errors, write_atomic
from components.tracked import Point, TrackedRun, rate_metrics, read_series
from components.tracking import CHAMPION, EVALUATION_TAG, GATE_TAG, Tracker
from pipelines.driver import RunState
from pipelines.gate import InService, registered_name
from pipelines.landscapes import STEPS, landscape_metrics, pictures_of

_VARIANTS = {"before": "before", **{form: f"after_{form}" for form in (*FORMS, "adapter")}}


def track_and_register(run: RunState, summary: RunSummary) -> None:
    """Project the run into MLflow and register each finetune's selected model; fills `registry` in the summary.

    One run of a workspace at a time: what is looked up before it is made must not be made twice. Raises TrackingError when
    the server cannot be reached or refuses; nothing is lost: running again does the same.
    """
    lease = acquire(run.workspace.root / ".tracking.lease", done=lambda: False)
    assert lease is not None
    with lease:
        _track_and_register(run, summary)


def _track_and_register(run: RunState, summary: RunSummary) -> None:
    tracker = _tracker(run)
    ids = tracker.project(_tracked(run, summary))
    if not run.config.tracking.register_models:
        return
    for entry in shown_models(summary):
        form = entry.get("selected")
        record = run.record(entry["name"], f"fuse_{form}") if form else None
        evaluated = run.record(entry["name"], f"evaluate_{form}") if form else None
        if entry["status"] != "done" or record is None or evaluated is None:
            continue
        name = registered_name(run, entry["name"])
        version = tracker.register(
            name=name,
            weights_uri=(run.result_dir(record) / "model").as_uri(),
            sha256=_weights_sha256(record),
            fingerprint=record.fingerprint,
            run_id=ids[entry["name"]],
            metrics=rate_metrics("test", evaluated.metrics["test"]),
            time_ms=_end_ms(evaluated),
            tags=_lineage(record, evaluated, str(form)) | _gate_tags(entry),
        )
        entry["registry"] = {"name": name, "version": version}


def in_service(run: RunState) -> InService:
    """Asks the registry, which is opened at the first question."""

    def ask(name: str) -> str | None:
        return _tracker(run).evaluation_of(name, CHAMPION)

    return ask


def _tracker(run: RunState) -> Tracker:
    tracking = run.config.tracking
    return Tracker(uri=tracking.uri, experiment=tracking.experiment or run.config.name, workspace=run.workspace.root)


def _gate_tags(entry: FinetuneSummary) -> dict[str, str]:
    gate = entry.get("gate")
    return {GATE_TAG: "none" if gate is None else "passed" if gate["passed"] else "shut"}


def _weights_sha256(record: Record) -> str:
    """One SHA-256 for a fused model: over the canonical JSON of its files' names and hashes, as in the record."""
    files = {name: file.sha256 for name, file in record.outputs.items() if name.startswith("model/")}
    return hashlib.sha256(canonical_json(files).encode()).hexdigest()


def _lineage(record: Record, evaluated: Record, form: str) -> dict[str, str]:
    parents = {f"realign.parent.{role}": reference for role, reference in record.parents.items()}
    return {
        "realign.form": form,
        "realign.record": record.reference,
        EVALUATION_TAG: evaluated.reference,
        **parents,
    }


def _tracked(run: RunState, summary: RunSummary) -> TrackedRun:
    records = [state.record for state in run.nodes.values() if state.record is not None]
    identity = fingerprint(
        stage="run",
        version=1,
        semantics={"name": run.config.name},
        parents={state.node.id: state.record.fingerprint for state in run.nodes.values() if state.record},
    )
    children = [_tracked_finetune(run, entry) for entry in shown_models(summary)]
    failed = any(entry["status"] == "failed" for entry in shown_models(summary))
    return TrackedRun(
        name=run.config.name,
        fingerprint=identity,
        started_ms=min(map(_start_ms, records), default=int(run.started.timestamp() * 1000)),
        ended_ms=max(map(_end_ms, records), default=None),
        status="FAILED" if failed else "FINISHED",
        params=_params(run),
        metrics=rate_metrics("aligned", summary["aligned"]) | landscape_metrics("landscape", summary.get("landscape")),
        children=children,
    )


def _tracked_finetune(run: RunState, entry: FinetuneSummary) -> TrackedRun:
    name = entry["name"]
    records = {
        state.node.step.name: state.record
        for state in run.nodes.values()
        if state.node.finetune == name and state.record is not None
    }
    metrics: dict[str, float] = {}
    for prefix, key in _VARIANTS.items():
        metrics |= rate_metrics(prefix, entry.get(key))  # type: ignore[arg-type]
    for control, rates in entry.get("controls", {}).items():
        metrics |= rate_metrics(f"control/{control}", rates)
    if "adapter" in entry:
        metrics["adapter/error"] = entry["adapter"]["error"]
    for key in STEPS:
        metrics |= landscape_metrics(f"landscape/{key}", entry.get("landscape", {}).get(key))  # type: ignore[call-overload]
    metrics |= {f"seconds/{step}": record.seconds for step, record in records.items()}
    series: list[Point] = []
    for step in ("train_mask", "train_mask_paper"):
        path = run.result_dir(records[step]) / "mask" / "metrics.jsonl" if step in records else Path("absent")
        series += read_series(path, step) if path.is_file() else []
    for step in ("train_mask", "train_mask_paper"):
        cost = records[step].metrics if step in records else {}
        metrics |= {f"{step}/{key}": cost[key] for key in ("tokens_per_second", "peak_memory_bytes") if cost.get(key)}
    shares = entry.get("density", {}).get("tensors", {})
    for layer, (mean, spread) in layer_figures(shares).items():
        metrics |= {f"density/layer_{int(layer):03d}": mean, f"density_spread/layer_{int(layer):03d}": spread}
    tags: dict[str, str] = {f"realign.record.{step}": record.reference for step, record in records.items()}
    tags |= _gate_tags(entry)
    if entry["error"]:
        tags["realign.error"] = entry["error"]
    return TrackedRun(
        name=name,
        fingerprint=name,
        started_ms=min(map(_start_ms, records.values()), default=int(run.started.timestamp() * 1000)),
        ended_ms=max(map(_end_ms, records.values()), default=None),
        status="FAILED" if entry["status"] == "failed" else "FINISHED",
        params={"selected": entry.get("selected")},
        metrics=metrics,
        tags=tags,
        series=series,
        artifacts=[*([_heat_map(run, name, shares)] if shares else []), *pictures_of(entry)],
    )


def _heat_map(run: RunState, name: str, shares: dict[str, float]) -> Path:
    """A picture of the mask, in the workspace."""
    path = run.workspace.root / "figures" / f"density-{name}.svg"
    with storage_errors(path):
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, density_svg(shares, title=f"{name}: weights of the delta that are kept, percent"))
    return path


def _params(run: RunState) -> dict[str, Any]:
    config = run.config
    return {
        "mask": config.mask.resolved.model_dump(mode="json"),
        "mask_preset": config.mask.preset,
        "fusion": config.fusion.model_dump(mode="json"),
        "evaluation": config.evaluation.model_dump(mode="json", exclude={"sets"}),
        **({"landscape": config.landscape.model_dump(mode="json")} if config.landscape is not None else {}),
        "finetunes": [f.name for f in config.finetunes],
        **({"merges": [m.model_dump(mode="json") for m in config.merges]} if config.merges else {}),
    }


def _start_ms(record: Record) -> int:
    return int(datetime.fromisoformat(record.started).timestamp() * 1000)


def _end_ms(record: Record) -> int:
    return _start_ms(record) + int(record.seconds * 1000)
