"""The one way a stage is run: a spec in, a status out. The driver, Ray tasks, Ray jobs and KFP steps all call `run_stage`.

A stage is a function of (config, parent records, workspace) to a record. It returns a status instead of raising what the
user must mend; only transient faults and bugs raise.
"""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypedDict

from pydantic import BaseModel, ConfigDict, field_validator

from components.errors import RealignError, StorageError, error_payload
from components.leases import Claim
from components.records import Record, fingerprint, hash_outputs, parent_fingerprint
from components.storage import Attempt, Workspace, storage_errors

VERSIONS: dict[str, int] = {
    "load": 1,
    "extract_delta": 1,
    "compare_deltas": 1,
    "merge": 1,
    "train_mask": 1,
    "search_scale": 1,
    "fuse": 1,
    "export_adapter": 1,
    "evaluate": 1,
    "landscape": 1,
}
"""stage -> version, part of every fingerprint. `ray_jobs.<stage>.run` is the stage's function. Raise the version when the
stage's code changes; a test holds this against the code."""


class StageSpec(BaseModel):
    """All that a stage needs to know, as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    workspace: str
    semantics: dict[str, Any]
    """What changes the result. Hashed."""
    execution: dict[str, Any] = {}
    """Paths, threads, batch sizes. Recorded, not hashed."""
    parents: dict[str, str] = {}
    """role -> `<stage>/<fingerprint>`."""

    @field_validator("stage")
    @classmethod
    def _known(cls, stage: str) -> str:
        if stage not in VERSIONS:
            raise ValueError(f"no stage {stage!r}; there are {', '.join(VERSIONS)}")
        return stage

    @property
    def version(self) -> int:
        return VERSIONS[self.stage]

    @property
    def fingerprint(self) -> str:
        parents = {role: parent_fingerprint(reference) for role, reference in self.parents.items()}
        return fingerprint(stage=self.stage, version=self.version, semantics=self.semantics, parents=parents)

    @property
    def reference(self) -> str:
        return f"{self.stage}/{self.fingerprint}"


class StageAnswer(TypedDict, total=False):
    """What `run_stage` returns: `record` (its dict) when done, `error` (`type`, `message`) when failed."""

    status: Literal["done", "failed"]
    record: dict[str, Any]
    error: dict[str, str]


@dataclass
class Outcome:
    """What a stage's function returns; its files lie in `context.out`."""

    metrics: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class StageContext:
    """What a stage's function is given."""

    spec: StageSpec
    workspace: Workspace
    attempt: Attempt
    parents: dict[str, Record]

    def to_plain(self) -> dict[str, Any]:
        """What another process of the same attempt needs to stand where this one stands, as JSON."""
        return {
            "spec": self.spec.model_dump(mode="json"),
            "out": str(self.attempt.out),
            "state": str(self.attempt.state),
            "lease": [str(self.attempt.lease.path), self.attempt.lease.owner],
        }

    @staticmethod
    def of_plain(plain: dict[str, Any]) -> StageContext:
        """The context that `to_plain` told of, in another process."""
        spec, (lease, owner) = StageSpec(**plain["spec"]), plain["lease"]
        workspace = Workspace(Path(spec.workspace))
        attempt = Attempt(out=Path(plain["out"]), state=Path(plain["state"]), lease=Claim(Path(lease), owner))
        return StageContext(spec, workspace, attempt, parents_of(spec, workspace))

    @property
    def out(self) -> Path:
        """Where output files go; becomes the result's directory."""
        return self.attempt.out

    @property
    def state(self) -> Path:
        """Resumable state; survives a kill, removed after publishing."""
        return self.attempt.state

    def parent_dir(self, role: str) -> Path:
        """The published files of a parent."""
        record = self.parents[role]
        return self.workspace.result_dir(record.stage, record.fingerprint)


def run_stage(spec: StageSpec) -> StageAnswer:
    """Make the spec's result, or find it made. Never runs twice what a record shows as done.

    Raises only what may be gone at the next try (LeaseLost, an OSError, …) and bugs; a RealignError is written to the
    stage's `failure.json` and returned as `status: failed`.
    """
    workspace = Workspace(Path(spec.workspace))
    try:
        record = workspace.record(spec.stage, spec.fingerprint) or _attempt(spec, workspace)
    except RealignError as error:
        # A workspace that cannot be written cannot keep the note either; the answer says it.
        if not isinstance(error, StorageError):
            workspace.write_failure(spec.stage, spec.fingerprint, error)
        return {"status": "failed", "error": error_payload(error)}
    return {"status": "done", "record": record.model_dump()}


def _attempt(spec: StageSpec, workspace: Workspace) -> Record:
    parents = parents_of(spec, workspace)
    with workspace.attempt(spec.stage, spec.fingerprint) as attempt:
        if attempt is None:
            record = workspace.record(spec.stage, spec.fingerprint)
            assert record is not None
        else:
            started, clock = datetime.now(UTC), time.monotonic()
            _set_threads(int(spec.execution.get("threads", 1)))
            with storage_errors(attempt.out):
                outcome = _function(spec.stage)(StageContext(spec, workspace, attempt, parents))
                record = Record(
                    stage=spec.stage,
                    stage_version=spec.version,
                    fingerprint=spec.fingerprint,
                    semantics=spec.semantics,
                    execution=spec.execution,
                    parents=spec.parents,
                    outputs=hash_outputs(attempt.out),
                    metrics=outcome.metrics,
                    notes=outcome.notes,
                    code=code_version(),
                    environment=environment(),
                    started=started.isoformat(timespec="seconds"),
                    seconds=round(time.monotonic() - clock, 3),
                )
            record = workspace.publish(attempt, record)
    workspace.forget_state(spec.stage, spec.fingerprint)
    return record


def parents_of(spec: StageSpec, workspace: Workspace) -> dict[str, Record]:
    """The records of a spec's parents, by role. Raises StorageError for one that is not there."""
    return {role: _parent(workspace, role, reference) for role, reference in spec.parents.items()}


def _parent(workspace: Workspace, role: str, reference: str) -> Record:
    stage, _, name = reference.partition("/")
    record = workspace.record(stage, name)
    if record is None:
        raise StorageError(f"{workspace.root}: no record {reference} (parent '{role}'); run that stage first")
    return record


def _function(stage: str) -> Callable[[StageContext], Outcome]:
    run: Callable[[StageContext], Outcome] = importlib.import_module(f"ray_jobs.{stage}").run
    return run


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)


@cache
def code_version() -> dict[str, str]:
    """Package version, and the commit where the code lies in a git checkout."""
    try:
        version = metadata.version("safety-realign")
    except metadata.PackageNotFoundError:
        version = "not installed"
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return {"version": version}
    return {"version": version, "commit": commit + ("+changes" if changed else "")}


@cache
def environment() -> dict[str, str]:
    """What a result may depend on beside config and code."""
    packages = {name: metadata.version(name) for name in ("torch", "transformers", "safetensors", "tokenizers")}
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpus": str(os.cpu_count()),
        **packages,
    }
