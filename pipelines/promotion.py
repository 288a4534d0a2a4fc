"""Promotion and rollback: which version of a realigned model is in service, held to its weights and its gate once more.

A version says of itself all that this needs (versions.py): where its weights and its evaluation lie, and what
its gate demands. So a promotion needs no run config, and is the same from the command line and as an action of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from components.errors import GateError, RealignError, StorageError, TrackingError, listed
from components.evaluation.capability.settings import settings_of
from components.evaluation.gates import VISAGE, Decision, Finding, Measured, Reference, decide
from components.evaluation.outcomes import NamedSet
from components.evaluation.settings import SetKind
from components.published import changed_files, model_files, weights_sha256
from components.records import RECORD_FILE, Record
from components.storage import Workspace
from components.tracking import CANDIDATE, EVALUATION_TAG, PREVIOUS, Registry, TrackingUnavailableError, Version
from components.tracking.names import GATE_TAG, SHA256_TAG, WEIGHTS_TAG
from components.tracking.promotions import Ledger, Service
from pipelines.gate import measured, serving
from pipelines.versions import (
    evaluation_in_service,
    evaluation_of,
    gate_tags,
    kept_findings,
    requirements_of,
    weights_of,
)


@dataclass(frozen=True)
class Promoted:
    """What became of a promotion or rollback."""

    version: Version
    service: Service
    """Who is in service after it."""
    moved: bool
    """False where the version was in service already, or was to be promoted once and has been."""


@dataclass(frozen=True)
class _Asked:
    """A prompt set as an evaluation's record has it."""

    name: str
    kind: SetKind
    counts: bool


def promote(
    registry: Registry, name: str, which: str = CANDIDATE, *, workspace: Path | None = None, once: bool = False
) -> Promoted:
    """Put a version (its number, or an alias) in service: `champion` moves to it, `previous` to what was there before.

    Its weights are read and hashed first, before anything is claimed. The gate is decided against whoever is in service, and
    again when that has changed meanwhile. `workspace`: where its results lie now, by default where they were registered.
    `once`: leave alone a version that was in service before, or is older than the one that is: somebody has decided so.
    Raises GateError with the reasons, StorageError for weights that are not as registered, TrackingError.
    """
    version = registry.version(name, which)
    ledger = Ledger(registry, name)
    _require_ours(version)
    checked = False
    while True:
        service = ledger.service()
        there = service.champion == version.number
        if once and (there or version.number in service.served or version.number < (service.champion or 0)):
            return Promoted(version, service, moved=False)
        if not checked:
            require_unchanged(version, workspace)
            checked = True
        if there:
            return Promoted(version, service, moved=False)
        try:
            decision = decided(registry, version, service.champion, workspace)
            registry.set_tags(version, gate_tags(decision.to_json(), requirements_of(version)))
            _require_passed(version, decision)
        except GateError as error:
            raise GateError(f"{error}{_others(registry, version)}") from error
        done = ledger.put(version.number, service, "promote")
        if done is not None:
            return Promoted(version, done, moved=True)


def _others(registry: Registry, version: Version) -> str:
    """Which versions might serve instead, where there are any."""
    found = [one for one in registry.versions(version.name) if one.tags.get(GATE_TAG) == "passed"]
    numbers = listed([str(one.number) for one in found if one.number != version.number])
    return f"; versions whose gate passed: {numbers} (--version)" if numbers else ""


def roll_back(registry: Registry, name: str, *, workspace: Path | None = None) -> Promoted:
    """Swap `champion` and `previous`, once the weights that are to serve again are read and found as they were.

    A rollback that broke off after its entry in the ledger is finished, and is the result. Raises StorageError for weights that
    are not as they were, TrackingError where there is no way back, or the champion has moved meanwhile, or was not the one that
    its alias named: whoever rolled back meant another one.
    """
    ledger = Ledger(registry, name)
    service = ledger.service()
    if service.aliases == "pending" and service.kind == "rollback":
        return Promoted(registry.version(name, str(service.champion)), service, moved=True)
    if service.aliases != "written":
        raise TrackingError(
            f"the aliases of {name} did not say who is in service: it is version {service.champion}, and they say so now; "
            "nothing was rolled back. Look again"
        )
    if service.previous is None or service.previous == service.champion:
        there = listed([f"{alias}: version {number}" for alias, number in registry.aliases(name).items()]) or "none"
        raise TrackingError(f"{name} has no {PREVIOUS} version to go back to; its aliases: {there}")
    version = registry.version(name, str(service.previous))
    _require_ours(version)
    require_unchanged(version, workspace)
    done = ledger.put(version.number, service, "rollback")
    if done is None:
        now = ledger.service().champion
        raise TrackingError(f"{name} version {now} was put in service meanwhile; nothing was rolled back. Look again")
    return Promoted(version, done, moved=True)


def require_unchanged(version: Version, workspace: Path | None = None) -> None:
    """Read every file of a version's weights. Raises StorageError that names those that are not as they were registered."""
    directory = weights_of(version, workspace)
    path = directory.parent / RECORD_FILE
    remedy = "restore them from a copy, or remove the result and run again (other bytes become a version of their own)"
    try:
        record = Record.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise StorageError(
            f"{version}: {path} cannot be read, so nothing says what its weights were ({type(error).__name__}); give "
            "--workspace where its results lie now"
        ) from error
    files = model_files(record)
    if weights_sha256(files) != version.tags[SHA256_TAG]:
        raise StorageError(f"{version}: {path} records other weights than were registered; {remedy}")
    wrong = changed_files(directory, files)
    if wrong:
        raise StorageError(
            f"{version} has other weights in {directory} than were registered: {listed(wrong)}; {remedy}"
        )


def decided(registry: Registry, version: Version, champion: int | None, workspace: Path | None = None) -> Decision:
    """Hold a version to the gate it was registered with, against the version in service now.

    From the answers of its evaluation, whose files are hashed; what landscapes were asked for stands as it was decided: no
    landscape of the version in service is kept. Raises GateError where it has no gate, StorageError, TrackingError.
    """
    requirements = requirements_of(version)
    root = weights_of(version, workspace).parents[2]
    own = evaluation_of(version, EVALUATION_TAG, root)
    sets = _sets(own)
    references: dict[Reference, Measured | None] = {}
    for than in {one.than for one in requirements}:
        if than == "serving":
            references[than] = _serving(registry, version, champion, own, root)
        elif than is not None and (key := f"{EVALUATION_TAG}.{than}") in version.tags:
            references[than] = measured(Workspace(root), evaluation_of(version, key, root), sets)
    settings = own.semantics["evaluation"]
    now = [one for one in requirements if one.metric != VISAGE]
    known = kept_findings(version)
    if now:
        model = measured(Workspace(root), own, sets)
        fresh = decide(now, model, references, confidence=settings["confidence"], interval=settings["interval"])
        known |= {one.requirement: one for one in fresh.findings}
    findings = tuple(known[str(one)] for one in requirements)
    return Decision(all(one.passed for one in findings), findings)


def reasons(findings: Sequence[Finding]) -> str:
    """Why a gate is shut, in a line."""
    return listed([f"{one.requirement}: {one.reason}" for one in findings if not one.passed])


def _require_passed(version: Version, decision: Decision) -> None:
    if not decision.passed:
        raise GateError(f"{version} is not promoted, its gate is shut: {reasons(decision.findings)}")


def _require_ours(version: Version) -> None:
    if not version.ours:
        raise TrackingError(
            f"{version} was registered by another tool: it does not say where its weights lie and what they were "
            f"({WEIGHTS_TAG}, {SHA256_TAG}); promote a version that `realign run` registered"
        )


def _sets(record: Record) -> list[NamedSet]:
    """The test sets of an evaluation."""
    asked = record.semantics["sets"]
    sets: list[NamedSet] = [_Asked(s["name"], s["kind"], s["headline"]) for s in asked if s["split"] == "test"]
    if "capability" in record.semantics:
        sets += settings_of(record.semantics["capability"], record.execution["capability"]).tasks
    return sets


def _serving(registry: Registry, version: Version, champion: int | None, own: Record, root: Path) -> Measured | None:
    """The answers of the version in service. Raises GateError where it cannot be compared with."""
    try:
        found = None if champion is None else evaluation_in_service(registry, version.name, champion, root)
        return serving(found, own, _sets(own))
    except TrackingUnavailableError:
        raise
    except RealignError as error:
        raise GateError(
            f"{version} cannot be compared with version {champion}, which is in service: {error}"
        ) from error
