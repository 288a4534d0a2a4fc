"""summary.json from the records of a run: what became of every finetune, in numbers that can be checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.evaluation.choose import FORMS, choose_form
from components.evaluation.compare import compare_outcomes, flipped
from components.evaluation.outcomes import NamedSet, Outcome, read_answers
from components.records import Record
from components.reporting.schema import FinetuneSummary, Rates, RunSummary
from components.storage import storage_errors, write_atomic
from pipelines.driver import RunState
from pipelines.provenance import add_provenance, delta_tensors

_CONTROLS = ("paper_soft", "paper_binary", "interpolation", "resta", "random_mask")


def summarise(run: RunState) -> RunSummary:
    """The summary of a run whose stages have ended, whatever became of them. The registry is filled in later."""
    aligned = run.record(None, "evaluate_aligned")
    notes = [
        f"{state.node.id}: {state.error['message']}"
        for state in run.nodes.values()
        if state.node.finetune is None and state.error is not None
    ]
    summary: RunSummary = {
        "schema": 1,
        "run": run.config.name,
        "confidence": run.config.evaluation.confidence,
        "created": run.started.isoformat(timespec="seconds"),
        "aligned": _rates(aligned),
        "finetunes": [_model(run, finetune.name) for finetune in run.config.finetunes],
        "seconds": _seconds(run, None),
        "notes": notes,
    }
    if run.config.merges:
        summary["merged"] = [_model(run, merge.name) for merge in run.config.merges]
    add_provenance(run, summary)
    return summary


def _model(run: RunState, name: str) -> FinetuneSummary:
    failure = run.failure_of(name)
    entry: FinetuneSummary = {
        "name": name,
        "status": "failed" if failure else "done",
        "error": failure.complaint if failure else None,
        "seconds": _seconds(run, name),
    }
    measured = {v: run.record(name, f"evaluate_{v}") for v in ("before", *FORMS, "adapter", *_CONTROLS)}
    entry["before"] = _rates(measured["before"])
    entry["after_soft"], entry["after_binary"] = _rates(measured["soft"]), _rates(measured["binary"])
    tuned = run.config.fusion.tuned.get(name)
    if tuned is not None and (rates := _rates(measured["tuned"])) is not None:
        entry["after_tuned"], entry["tuned"] = rates, tuned.model_dump(mode="json", exclude_defaults=True)
    entry["controls"] = {v: rates for v in _CONTROLS if (rates := _rates(measured[v])) is not None}
    entry["control_settings"] = _control_settings(run, name)
    fused = {form: run.record(name, f"fuse_{form}") for form in FORMS}
    entry["fused"] = {form: str(run.result_dir(r) / "model") for form, r in fused.items() if r}  # type: ignore[typeddict-item]
    entry["selected"] = _selected(run, measured)
    _add_adapter(run, entry, measured["adapter"])
    entry["registry"] = None
    _add_statistics(run, entry)
    _add_comparisons(run, entry, measured)
    entry["notes"] = _notes(run, name)
    return entry


def _notes(run: RunState, name: str) -> list[str]:
    """What the finetune's stages have to say, each thing once and of which variant, and which controls are missing."""
    said: dict[str, list[str]] = {}
    for state in run.nodes.values():
        if state.node.finetune == name and state.record is not None:
            for note in state.record.notes:
                said.setdefault(note, []).append(state.node.step.variant.replace("_", " "))
    told = [
        f"{', '.join(filter(None, variants))}: {note}" if any(variants) else note for note, variants in said.items()
    ]
    owner = run.config.mask_owner(name)
    lent = [f"the mask was trained on {owner}"] if owner != name else []
    whole = any(f.name == name and not f.is_adapter for f in run.config.finetunes)
    lent += ["came as a full model, so it leaves as one: no adapter"] if run.config.fusion.adapter and whole else []
    missing = [f"{_extra(run, what)} is missing: {s.complaint}" for what, s in run.failed_controls(name).items()]
    return list(dict.fromkeys([*told, *lent, *missing]))


def _extra(run: RunState, what: str) -> str:
    """How the extra is called that `failed_controls` has under this name."""
    if what.startswith("landscape"):
        return "a landscape"
    if what != "unaligned":
        return {"adapter": "the adapter", "tuned": "the tuned form"}.get(what, f"control {what}")
    control = "resta" in run.config.fusion.controls
    drawn = run.config.landscape is not None and "unaligned" in run.config.landscape.models
    return " and ".join([*(["control resta"] if control else []), *(["a landscape"] if drawn else [])])


def _add_adapter(run: RunState, entry: FinetuneSummary, measured: Record | None) -> None:
    """The low-rank adapter of the selected form, where one was asked for."""
    exported = run.record(entry["name"], "export_adapter")
    if exported is not None:
        entry["adapter"] = {
            "path": str(run.result_dir(exported) / "adapter"),
            "form": exported.metrics["form"],
            "error": exported.metrics["error"],
        }
    rates = _rates(measured)
    if rates is not None:
        entry["after_adapter"] = rates


def _rates(record: Record | None, split: str = "test") -> Rates | None:
    return record.metrics.get(split) if record else None


def _seconds(run: RunState, finetune: str | None) -> dict[str, float]:
    return {s.node.step.name: s.record.seconds for s in run.nodes.values() if s.node.finetune == finetune and s.record}


def _control_settings(run: RunState, name: str) -> dict[str, dict[str, Any]]:
    searches = {control: run.record(name, f"search_{control}") for control in ("interpolation", "resta")}
    return {control: record.metrics["chosen"] for control, record in searches.items() if record}


def _selected(run: RunState, measured: dict[str, Record | None]) -> Any:
    """The form to serve."""
    there = {form: dict(_rates(record, "dev") or {}) for form in FORMS if (record := measured[form]) is not None}
    return choose_form(there, select=run.config.fusion.select, max_asr=run.config.fusion.max_asr)


def _add_statistics(run: RunState, entry: FinetuneSummary) -> None:
    owner = run.config.mask_owner(entry["name"])
    mask, delta = run.record(owner, "train_mask"), run.record(entry["name"], "extract_delta")
    if mask:
        tensors = json.loads((run.result_dir(mask) / "mask" / "mask.json").read_text())["tensors"]
        entry["density"] = {
            "mean": mask.metrics["density"],
            "soft_mean": mask.metrics["soft_mean"],
            "tensors": {name: t["density"] for name, t in tensors.items()},
        }
    if delta:
        overall = delta.metrics["overall"]
        entry["delta"] = {"norm": overall["norm"], "zero_fraction": overall["zeros"]}
        if overall["relative_norm"] is not None:
            entry["delta"]["relative_norm"] = overall["relative_norm"]
        entry["delta"]["tensors"] = delta_tensors(run.result_dir(delta))
        together = run.record(None, "compare_deltas")
        if together:
            found = together.metrics["cosines"].get(entry["name"], {})
            entry["delta"]["cosines"] = {o: c for o, c in found.items() if o != entry["name"] and c is not None}


def _add_comparisons(run: RunState, entry: FinetuneSummary, measured: dict[str, Record | None]) -> None:
    """Paired differences of both forms against what was before and every control, on the test prompts."""
    sets = run.config.tested_on(entry["name"])
    answers = {v: _answers(run, record, sets) for v, record in measured.items() if record}
    confidence = run.config.evaluation.confidence
    entry["comparisons"] = {
        f"{form}_vs_{other}": compare_outcomes(
            sets=sets, first=answers[form], second=answers[other], confidence=confidence
        )
        for form in FORMS
        if form in answers
        for other in answers
        if other != form
    }
    after = entry["selected"] or "soft"
    if "before" in answers and after in answers:
        entry["examples"] = flipped(before=answers["before"], after=answers[after])


def _answers(run: RunState, record: Record, sets: Sequence[NamedSet]) -> dict[str, list[Outcome]]:
    directory = run.result_dir(record) / "test" / "answers"
    return {s.name: read_answers(directory / f"{s.name}.jsonl") for s in sets}


def failures(run: RunState) -> list[str]:
    """One line for each cause: the finetunes that did not make it, controls that are missing, and what else failed."""
    causes: dict[str, list[str]] = {}
    told: set[str] = set()
    for name in [*(f.name for f in run.config.finetunes), *(m.name for m in run.config.merges)]:
        failure = run.failure_of(name)
        if failure is not None:
            causes.setdefault(f" failed at {failure.complaint}", []).append(name)
            told.add(failure.node.id)
        for control, state in run.failed_controls(name).items():
            causes.setdefault(f": {_extra(run, control)} is missing: {state.complaint}", []).append(name)
            told.add(state.node.id)
    others = [s for s in run.nodes.values() if s.node.finetune is None and s.error and s.node.id not in told]
    return [f"{', '.join(names)}{cause}" for cause, names in causes.items()] + [s.complaint for s in others]


def write_summary(summary: RunSummary, path: Path) -> None:
    with storage_errors(path):
        write_atomic(path, json.dumps(summary, indent=1, allow_nan=False) + "\n")
