"""The local driver: walks the graph, submits stages whose parents are done, and ends with the summary.

A finetune that fails never stops the others, and the summary is always written.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from components.errors import RealignError, error_payload
from components.records import Record
from components.storage import Workspace, storage_errors, write_atomic
from pipelines.config import RunConfig
from pipelines.graph import Node, expand
from pipelines.roots import Roots
from pipelines.specs import build_spec, root_key
from ray_jobs.stage import StageAnswer, StageSpec
from ray_jobs.submit import RayRunner, ray_runner

Status = Literal["waiting", "running", "done", "kept", "failed", "skipped"]
"""kept: its record was there already. skipped: something it needs failed."""

RUN_FILE = "run.json"
MASK_STEPS = ("load", "train_mask")
"""What a finetune stands on that takes another one's mask."""
_POLL_SECONDS = 0.5


@dataclass
class NodeState:
    """Where a node stands."""

    node: Node
    status: Status = "waiting"
    spec: StageSpec | None = None
    record: Record | None = None
    error: dict[str, str] | None = None

    @property
    def ended(self) -> bool:
        return self.status in ("done", "kept", "failed", "skipped")

    @property
    def complaint(self) -> str:
        """Which step failed and why, in a line. Empty for one that did not fail."""
        return f"{self.node.step.name}: {self.error['message']}" if self.error else ""


Watcher = Callable[[dict[str, NodeState]], None]


@dataclass
class RunState:
    """Everything the driver knows; what the summary is made from."""

    config: RunConfig
    workspace: Workspace
    roots: Roots
    nodes: dict[str, NodeState]
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    noted: str = ""
    """What `run.json` holds."""

    def record(self, finetune: str | None, step: str) -> Record | None:
        """The record of a step, None where it failed or the run does not have it."""
        state = self.nodes.get(f"{finetune}/{step}" if finetune else step)
        return state.record if state else None

    def result_dir(self, record: Record) -> Path:
        return self.workspace.result_dir(record.stage, record.fingerprint)

    def failure_of(self, finetune: str) -> NodeState | None:
        """The first failure among a finetune's own steps, or among those it stands on. Controls do not count."""
        needed = [s for s in self.nodes.values() if not s.node.step.needs]
        own = [s for s in needed if s.node.finetune == finetune and s.error is not None]
        owner = self.config.mask_owner(finetune)
        lent = [s for s in needed if owner != finetune and s.node.finetune == owner and s.node.step.name in MASK_STEPS]
        members = {f.name for f in self.config.members(finetune)} - {finetune}
        lent += [s for s in needed if s.node.finetune in members and s.node.step.name == "load"]
        shared = [s for s in needed if s.node.finetune is None and not s.node.joins]
        shared = [s for s in (*shared, *lent) if s.error is not None]
        blocked = any(s.status == "skipped" for s in needed if s.node.finetune == finetune)
        found = own or (shared if blocked else [])
        return found[0] if found else None

    def failed_controls(self, finetune: str) -> dict[str, NodeState]:
        """What failed, of controls of a finetune (or what they stand on) that are missing for it: of each control one, by its
        name; of landscapes, which are each for themselves, every one, by its step's."""
        theirs = (finetune, self.config.mask_owner(finetune), None)
        wanted = [s for s in self.nodes.values() if s.node.step.needs and s.node.finetune in theirs]
        wanted = [s for s in wanted if s.node.finetune in (finetune, None) or s.node.step.stage == "train_mask"]
        failed = [s for s in reversed(wanted) if s.error is not None]
        return {s.node.step.name if s.node.step.needs == "landscape" else s.node.step.needs: s for s in failed}


def run_stages(
    config: RunConfig,
    workspace: Workspace,
    roots: Roots,
    watch: Watcher,
    wanted: Callable[[Node], bool] = lambda node: node.step.kind == "stage",
    *,
    noted: bool = True,
    lost: Collection[str] = (),
) -> RunState:
    """Run every stage of the graph that has no record yet, or those that are `wanted`, which must have each other's parents.
    Failures are in the state that comes back. `noted`: where everything stands is kept for `realign status`; not by one of
    several that run parts of one run. `lost`: ids of nodes that another of these has tried; they are skipped.

    Raises StorageError when the workspace cannot be written.
    """
    nodes = {
        node.id: NodeState(node, "skipped" if node.id in lost else "waiting") for node in expand(config) if wanted(node)
    }
    state = RunState(config, workspace, roots, nodes)
    with ray_runner(config.execution.workers, config.execution.cluster) as runner:
        while True:
            for ready in _ready(nodes):
                _start(ready, state, runner)
            if noted:
                _note(state)
            watch(nodes)
            if all(s.ended for s in nodes.values()):
                return state
            if _ready(nodes):
                continue  # a kept or skipped node has freed others
            for spec, answer in runner.wait(_POLL_SECONDS):
                _finish(nodes, spec, answer)


def stages_so_far(config: RunConfig, workspace: Workspace, roots: Roots) -> RunState:
    """What a run has made by now, with nothing run: a stage without a record failed as its last attempt says, or was not made.
    Raises StorageError for records that are damaged."""
    nodes = {node.id: NodeState(node) for node in expand(config) if node.step.kind == "stage"}
    run = RunState(config, workspace, roots, nodes)
    while ready := _ready(nodes):
        for state in ready:
            spec = _found(state, run)
            if spec is not None:
                state.status = "failed"
                state.error = workspace.failure(spec.stage, spec.fingerprint) or dict(_NOT_MADE)
    return run


_NOT_MADE = {"type": "Fault", "message": "was not made; the log of its step says why"}


def _ready(nodes: dict[str, NodeState]) -> list[NodeState]:
    return [s for s in nodes.values() if s.status == "waiting" and all(nodes[p].ended for _, p in s.node.parents)]


def _start(state: NodeState, run: RunState, runner: RayRunner) -> None:
    spec = _found(state, run)
    if spec is None:
        return
    state.status = "running"
    # Two nodes may ask for one result (a finetune listed twice under other names): submit it once.
    if not any(s is not state and s.status == "running" and s.spec == spec for s in run.nodes.values()):
        runner.submit(spec)


def _found(state: NodeState, run: RunState) -> StageSpec | None:
    """What is to be made for a node whose parents have ended; None where nothing is, which its state says."""
    parents = {role: run.nodes[parent] for role, parent in state.node.parents}
    alive = {role: parent.record.reference for role, parent in parents.items() if parent.record is not None}
    # A merge without one of its members would be another merge.
    joining = {role for role in parents if ":" in role and state.node.finetune is None}
    missing = set(parents) - set(alive)
    if missing - joining or (joining and len(joining - missing) < 2):
        state.status = "skipped"
        return None
    try:
        error = run.roots.errors.get(root_key(state.node))
        if error is not None and state.node.step.stage == "load":
            raise error
        spec = build_spec(state.node, config=run.config, roots=run.roots, parents=alive, workspace=run.workspace.root)
        record = run.workspace.record(spec.stage, spec.fingerprint)
    except RealignError as error:
        state.status, state.error = "failed", error_payload(error)
        return None
    state.spec = spec
    if record is not None:
        state.status, state.record = "kept", record
        # A process killed right after publishing leaves the state that its training could have gone on from.
        run.workspace.forget_state(spec.stage, spec.fingerprint)
        return None
    return spec


def _finish(nodes: dict[str, NodeState], spec: StageSpec, answer: StageAnswer) -> None:
    for state in nodes.values():
        if state.spec == spec and state.status == "running":
            if answer["status"] == "done":
                state.status, state.record = "done", Record.model_validate(answer["record"])
            else:
                state.status, state.error = "failed", answer["error"]


def _note(run: RunState) -> None:
    """Write where everything stands, for `realign status`, when it has changed."""
    nodes: list[dict[str, Any]] = [
        {
            "id": s.node.id,
            "finetune": s.node.finetune,
            "step": s.node.step.name,
            "stage": s.node.step.stage,
            "fingerprint": s.spec.fingerprint if s.spec else None,
            "status": s.status,
            "error": s.error,
        }
        for s in run.nodes.values()
    ]
    content = {
        "run": run.config.name,
        "started": run.started.isoformat(timespec="seconds"),
        "driver": {"pid": os.getpid(), "host": socket.gethostname()},
        "nodes": nodes,
    }
    text = json.dumps(content, indent=1) + "\n"
    if text != run.noted:
        with storage_errors(run.workspace.root):
            write_atomic(run.workspace.root / RUN_FILE, text, durable=False)
        run.noted = text
