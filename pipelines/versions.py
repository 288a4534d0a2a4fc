"""What a registered version says of itself, as a run writes it and a promotion reads it: where its weights lie, what its gate
demands, and which evaluations are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlparse

from pydantic import TypeAdapter, ValidationError

from components.errors import GateError, StorageError, TrackingError, listed
from components.evaluation.gates import Finding, Requirement
from components.published import MODEL, altered, evaluation_sha256
from components.records import Record
from components.storage import Workspace
from components.tracking import EVALUATION_TAG, GATE_TAG, Registry, Version
from components.tracking.names import FINDINGS_TAG, RECORD_TAG, REQUIREMENTS_TAG, TAG_CHARS, WEIGHTS_TAG
from components.tracking.server import as_json

T = TypeVar("T")


def weights_of(version: Version, workspace: Path | None = None) -> Path:
    """The directory with a version's weights: in `workspace` where it has that result, else where they were registered.
    Raises StorageError for weights that are no directory."""
    result = version.tags.get(RECORD_TAG)
    if workspace is not None and result is not None and (workspace / result / MODEL).is_dir():
        return workspace / result / MODEL
    place = urlparse(version.tags[WEIGHTS_TAG])
    if place.scheme not in ("", "file"):
        raise StorageError(f"{version} lies at {version.tags[WEIGHTS_TAG]}; only weights in a directory can be checked")
    return Path(unquote(place.path))


def evaluation_tags(record: Record, of: str | None = None) -> dict[str, str]:
    """What a version says of an evaluation: its own, or that `of` another model that its gate compares it with."""
    key = EVALUATION_TAG if of is None else f"{EVALUATION_TAG}.{of}"
    return {key: record.reference, f"{key}.sha256": evaluation_sha256(record)}


def requirements_of(version: Version) -> tuple[Requirement, ...]:
    """The gate that a version was registered with. Raises GateError where it had none, TrackingError for one it cannot read."""
    if REQUIREMENTS_TAG not in version.tags or version.tags.get(GATE_TAG) == "none":
        raise GateError(
            f"{version} has no gate: nobody has said when it may serve; give the config that it was run with one (after a "
            "sweep that is sweeps/tuned.yaml), and run that again"
        )
    return _parsed(version, REQUIREMENTS_TAG, TypeAdapter(tuple[Requirement, ...]))


def gate_word(gate: Mapping[str, Any] | None) -> str:
    """A gate's decision as GATE_TAG says it."""
    return "none" if gate is None else "passed" if gate["passed"] else "shut"


def gate_tags(gate: Mapping[str, Any] | None, requirements: Sequence[Requirement]) -> dict[str, str]:
    """What a version says of its gate: the decision, what was demanded, and what became of that."""
    if gate is None:
        return {GATE_TAG: gate_word(gate)}
    demanded = as_json([one.model_dump(exclude_none=True) for one in requirements])
    if len(demanded) > TAG_CHARS:
        raise TrackingError(f"a gate of {len(requirements)} requirements is too long for a tag; split it")
    findings = [dict(one) for one in gate["findings"]]
    while len(as_json(findings)) > TAG_CHARS:  # it can be decided again; what it demands must stay
        findings.pop()
    return {
        GATE_TAG: gate_word(gate),
        REQUIREMENTS_TAG: demanded,
        FINDINGS_TAG: as_json(findings),
    }


def kept_findings(version: Version) -> dict[str, Finding]:
    """What became of each requirement when the gate was decided last; what is not known has failed."""
    given = _parsed(version, FINDINGS_TAG, TypeAdapter(list[Finding])) if FINDINGS_TAG in version.tags else []
    known = {one.requirement: one for one in given}
    absent = {str(one) for one in requirements_of(version)} - known.keys()
    return known | {name: Finding(name, False, None, None, None, 0, "not recorded") for name in absent}


def evaluation_of(version: Version, tag: str, root: Path) -> Record:
    """The evaluation that a version's tag names, when it is as it was registered."""
    reference = version.tags[tag]
    stage, _, fingerprint = reference.partition("/")
    workspace = Workspace(root)
    record = workspace.record(stage, fingerprint)
    if record is None:
        raise StorageError(
            f"{version}: its evaluation {reference} is not in {root}; give --workspace where it lies now"
        )
    directory = workspace.result_dir(stage, fingerprint)
    wrong = altered(directory, record.outputs)
    if wrong:
        raise StorageError(f"{directory} was changed: {listed(wrong)}; remove it, run again")
    if version.tags.get(f"{tag}.sha256") != evaluation_sha256(record):
        raise StorageError(
            f"{directory} is not the evaluation that {version} was registered with; remove it, run again"
        )
    return record


def evaluation_in_service(registry: Registry, name: str, champion: int, root: Path) -> tuple[Workspace, Record]:
    """The evaluation of the version in service, in the workspace `root` or in its own. Raises TrackingError where it names
    none, StorageError for one that is not there or was changed."""
    version = registry.version(name, str(champion))
    if EVALUATION_TAG not in version.tags:
        raise TrackingError(f"{version} names no evaluation; register it by a run")
    stage, _, fingerprint = version.tags[EVALUATION_TAG].partition("/")
    here = Workspace(root).record(stage, fingerprint) is not None
    place = root if here else weights_of(version).parents[2]
    return Workspace(place), evaluation_of(version, EVALUATION_TAG, place)


def _parsed(version: Version, tag: str, form: TypeAdapter[T]) -> T:
    try:
        return form.validate_json(version.tags[tag])
    except ValidationError as error:
        raise TrackingError(
            f"{version}: its tag {tag} was written by another version of realign, or by hand; run its config again, or use "
            "the realign that registered it"
        ) from error
