"""Action `gate`: whether the selected form of every realigned model may be served, from the answers that a run left.

Always decided anew: what it is compared with (the version in service) moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

from components.errors import EvaluationError, RealignError, StorageError
from components.evaluation.gates import VISAGE, Measured, Reference, decide
from components.evaluation.outcomes import NamedSet, read_answers
from components.records import Record
from components.reporting.schema import FinetuneSummary, GateDecision, RunSummary, shown_models
from components.storage import Workspace
from pipelines.config import RunConfig
from pipelines.driver import RunState
from pipelines.landscapes import drawn_of

InService = Callable[[str], tuple[Workspace, Record] | None]
"""Name of a registered model -> the evaluation of its version in service, None if there is none."""


def decide_gates(run: RunState, summary: RunSummary, in_service: InService) -> list[str]:
    """Fill in `gate` of every realigned model in the summary; names of those for which it is shut.

    `in_service` is asked only where a requirement compares with the version in service; what it raises shuts the gate, too.
    """
    if run.config.gate is None:
        return []
    shut = []
    for entry in shown_models(summary):
        if entry["name"] not in run.config.targets:
            continue
        entry["gate"] = _decided(run, entry, in_service)
        if not entry["gate"]["passed"]:
            shut.append(entry["name"])
    return shut


def registered_name(run: RunState, name: str) -> str:
    """Under which name a realigned model is registered."""
    return registered_as(run.config, name)


def registered_as(config: RunConfig, name: str) -> str:
    """As registered_name, before there is a run."""
    return f"{config.name}-{name}"


def _decided(run: RunState, entry: FinetuneSummary, in_service: InService) -> GateDecision:
    assert run.config.gate is not None
    name, form, settings = entry["name"], entry.get("selected"), run.config.evaluation
    sets = run.config.tested_on(name)
    own = run.record(name, f"evaluate_{form}") if form else None
    drawn = {one.than for one in run.config.gate if one.metric == VISAGE}
    references: dict[Reference, Measured | None] = {}
    for than in dict.fromkeys(requirement.than for requirement in run.config.gate):
        try:
            if than == "serving":
                references[than] = serving(in_service(registered_name(run, name)), own, sets)
            elif than is not None:
                other = (
                    run.record(None, "evaluate_aligned") if than == "aligned" else run.record(name, "evaluate_before")
                )
                landscape = drawn_of(run, name, than) if than in drawn else None
                references[than] = replace(measured(run.workspace, other, sets), landscape=landscape)
        except RealignError as error:  # left out, which shuts the gate
            entry.setdefault("notes", []).append(f"gate: {error}")
    model = measured(run.workspace, own, sets)
    if drawn:
        try:
            model = replace(model, landscape=drawn_of(run, name, "realigned"))
        except StorageError as error:
            entry.setdefault("notes", []).append(f"gate: {error}")
    decision = decide(
        run.config.gate, model, references, confidence=settings.confidence, interval=settings.interval
    ).to_json()
    return cast("GateDecision", {**decision, "findings": list(decision["findings"])})


def serving(found: tuple[Workspace, Record] | None, own: Record | None, sets: Sequence[NamedSet]) -> Measured | None:
    """The answers of the version in service, of its evaluation; None where nothing is. Raises EvaluationError where it was not
    asked and judged as the model was."""
    if found is None:
        return None
    if own is not None and _how(found[1]) != _how(own):
        raise EvaluationError(
            "the version in service was asked or judged in another way; evaluate it under this config"
        )
    return measured(*found, sets)


def _how(record: Record) -> Any:
    """How answers came about and were judged; the sets are held to each other prompt by prompt."""
    return record.semantics["evaluation"], record.semantics.get("capability")


def measured(workspace: Workspace, record: Record | None, sets: Sequence[NamedSet]) -> Measured:
    """The answers of an evaluation to these sets, as far as it was asked them; none where there was none."""
    if record is None:
        return Measured(sets, {})
    directory = workspace.result_dir(record.stage, record.fingerprint) / "test" / "answers"
    there = [one.name for one in sets if (directory / f"{one.name}.jsonl").is_file()]
    return Measured(sets, {name: read_answers(directory / f"{name}.jsonl") for name in there})
