"""Actions: what is done to the outside world after the stages. Always executed, idempotent by fingerprint."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from components.errors import GateError, RealignError, TrackingError, listed
from components.evaluation.choose import FORMS
from components.leases import acquire
from components.published import MODEL, model_files, weights_sha256
from components.records import Record
from components.reporting.heat_map import density_svg, layer_figures
from components.reporting.schema import FinetuneSummary, RunSummary, shown_models
from components.storage import Workspace, storage_errors, write_atomic
from components.tracked import Point, TrackedRun, rate_metrics, read_series
from components.tracking import GATE_TAG, Registered, Tracker, TrackingUnavailableError
from components.tracking.names import CONFIG_TAG, FORM_TAG, RECORD_TAG
from components.tracking.promotions import Ledger
from pipelines.driver import RunState
from pipelines.gate import InService, registered_name
from pipelines.identity import run_identity
from pipelines.landscapes import STEPS, landscape_metrics, pictures_of
from pipelines.patience import Patience
from pipelines.promotion import promote
from pipelines.versions import evaluation_in_service, evaluation_tags, gate_tags, gate_word

VARIANTS = {"before": "before", **{form: f"after_{form}" for form in (*FORMS, "adapter")}}
"""Variant of a model -> key of its rates in the summary."""
TRACKING_LEASE = ".tracking.lease"
_PROMOTE = "promote: "
"""Before notes that a promotion leaves."""


def track_and_register(run: RunState, summary: RunSummary) -> list[str]:
    """Project the run into MLflow, register each finetune's selected model, and promote those whose gate passed where the
    config says so; fills `registry` in the summary. Names of those that were refused promotion.

    One run of a workspace at a time: what is looked up before it is made must not be made twice. Raises TrackingError when
    the server cannot be reached or refuses; nothing is lost: running again does the same.
    """
    lease = acquire(run.workspace.root / TRACKING_LEASE, done=lambda: False)
    assert lease is not None
    with lease:
        tracker = tracker_of(run)
        ids = tracker.project(tracked(run, summary))
        if run.config.tracking.register_models:
            for entry in shown_models(summary):
                _register(run, entry, tracker, ids[entry["name"]])
    # Weights are hashed for a promotion, which may take minutes; the registry needs no lease.
    return _promote_all(run, summary, tracker) if run.config.tracking.promote else []


def _promote_all(run: RunState, summary: RunSummary, tracker: Tracker) -> list[str]:
    """Each by itself: names of those whose gate turned out to be shut, and afterwards what else was wrong with any."""
    refused: list[str] = []
    wrong: list[str] = []
    for entry in shown_models(summary):
        if "notes" in entry:  # of a try before the server went away
            entry["notes"] = [note for note in entry["notes"] if not note.startswith(_PROMOTE)]
        try:
            _promote(run, entry, tracker)
        except GateError as error:
            entry.setdefault("notes", []).append(f"{_PROMOTE}{error}")
            refused.append(entry["name"])
        except TrackingUnavailableError:
            raise
        except RealignError as error:
            wrong.append(str(error))
    if wrong:
        raise TrackingError(listed(wrong))
    return refused


def _register(run: RunState, entry: FinetuneSummary, tracker: Tracker, run_id: str) -> None:
    form = entry.get("selected")
    record = run.record(entry["name"], f"fuse_{form}") if form else None
    evaluated = run.record(entry["name"], f"evaluate_{form}") if form else None
    if entry["status"] != "done" or record is None or evaluated is None:
        return
    name = registered_name(run, entry["name"])
    version = tracker.register(
        Registered(
            name=name,
            weights_uri=(run.result_dir(record) / MODEL).as_uri(),
            sha256=weights_sha256(model_files(record)),
            fingerprint=record.fingerprint,
            run_id=run_id,
            metrics=rate_metrics("test", evaluated.metrics["test"]),
            time_ms=_end_ms(evaluated),
            tags=_lineage(record, evaluated, str(form)) | _sources(run, entry["name"]),
            decided=gate_tags(entry.get("gate"), run.config.gate or ()),
        )
    )
    entry["registry"] = {"name": name, "version": version}


def _promote(run: RunState, entry: FinetuneSummary, tracker: Tracker) -> None:
    registered, gate = entry.get("registry"), entry.get("gate")
    if registered is None or gate is None:
        return
    registered["promoted"] = False
    if not gate["passed"]:
        return
    done = promote(tracker, registered["name"], registered["version"], workspace=run.workspace.root, once=True)
    registered["promoted"] = done.service.champion == done.version.number
    if not registered["promoted"]:
        served = done.version.number in done.service.served
        why = (
            "it was in service before" if served else f"version {done.service.champion}, which is in service, is newer"
        )
        entry.setdefault("notes", []).append(
            f"{_PROMOTE}{done.version} stays as it is: {why}; `realign promote` puts it there"
        )


def in_service(run: RunState, patience: Patience) -> InService:
    """Asks the registry, which is opened at the first question."""

    def look(name: str) -> tuple[Workspace, Record] | None:
        registry = tracker_of(run)
        champion = Ledger(registry, name).look().champion if registry.has_model(name) else None
        return None if champion is None else evaluation_in_service(registry, name, champion, run.workspace.root)

    return lambda name: patience(lambda: look(name))


def tracker_of(run: RunState) -> Tracker:
    """The run's experiment on its server. Raises TrackingError."""
    tracking = run.config.tracking
    return Tracker(uri=tracking.uri, experiment=tracking.experiment or run.config.name, workspace=run.workspace.root)


def _lineage(record: Record, evaluated: Record, form: str) -> dict[str, str]:
    parents = {f"realign.parent.{role}": reference for role, reference in record.parents.items()}
    return {FORM_TAG: form, RECORD_TAG: record.reference, **evaluation_tags(evaluated), **parents}


def _sources(run: RunState, name: str) -> dict[str, str]:
    """What a finetune's realigned model was made from and is compared with."""
    identities = {"aligned": run.roots.models.get("aligned")}
    members = [member.name for member in run.config.members(name)]
    for member in members:
        key = "finetune" if members == [name] else f"finetune.{member}"
        identities[key] = run.roots.models.get(f"finetune:{member}")
    found = {f"realign.identity.{key}": identity for key, identity in identities.items() if identity is not None}
    compared = {"aligned": run.record(None, "evaluate_aligned"), "finetune": run.record(name, "evaluate_before")}
    for key, record in compared.items():
        found |= evaluation_tags(record, key) if record is not None else {}
    return {CONFIG_TAG: run.config.name, **found}


def tracked(run: RunState, summary: RunSummary) -> TrackedRun:
    """What MLflow is to show of a run, which may still go on: of a summary that has no more than `entry_so_far`s."""
    records = [state.record for state in run.nodes.values() if state.record is not None]
    children = [_tracked_finetune(run, entry) for entry in shown_models(summary)]
    failed = any(entry["status"] == "failed" for entry in shown_models(summary))
    return TrackedRun(
        name=run.config.name,
        fingerprint=run_identity(run),
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
    for prefix, key in VARIANTS.items():
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
    tags[GATE_TAG] = gate_word(entry.get("gate"))
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
