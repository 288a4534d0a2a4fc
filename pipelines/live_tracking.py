"""MLflow while a run goes on: what has ended is shown beside the stages, by a thread that nothing ever waits for.

A server that is away costs the run nothing: every `tracking.every_s` the thread tries again with what stands then, and the
end of the run shows all.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

from components.errors import RealignError
from components.leases import try_acquire
from components.reporting.schema import FinetuneSummary, RunSummary
from components.storage import Workspace
from components.tracking import Tracker
from pipelines.actions import TRACKING_LEASE, VARIANTS, tracked, tracker_of
from pipelines.config import RunConfig
from pipelines.driver import NodeState, RunState, Watcher
from pipelines.roots import Roots

_SOON_SECONDS = 1.0
"""Rest after each write, so that many models that end together are written together."""
_LEAVE_SECONDS = 45.0
"""How long the end of a run waits for a request that is under way: mlflow's own are bounded by about as much."""


@contextmanager
def live_tracking(config: RunConfig, workspace: Workspace, roots: Roots) -> Iterator[Watcher]:
    """A watcher for `run_stages` that projects the run into MLflow as it goes on. Afterwards nobody else writes there."""
    live = _Live(config, workspace, roots)
    try:
        yield live.watch
        live.leave(_LEAVE_SECONDS)
    finally:
        live.leave(0)


class _Live:
    """The driver's loop hands over what stands (`watch`), a thread writes the latest of it."""

    def __init__(self, config: RunConfig, workspace: Workspace, roots: Roots) -> None:
        self._base = RunState(config, workspace, roots, {})
        self._latest: RunState | None = None
        self._asked: set[str] = set()
        """What the thread was to show last; what it has shown, None: nothing yet, not even that there is a run."""
        self._shown: set[str] | None = None
        self._due = time.monotonic() + config.tracking.every_s
        self._wake, self._over = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, nodes: Mapping[str, NodeState]) -> None:
        """Cheap: twice a second, in the driver's loop."""
        made = _made(nodes)
        # What the end is about to say needs no telling.
        if made == self._shown or all(state.ended for state in nodes.values()):
            return
        if time.monotonic() < self._due and not self._finished_one(nodes, made - self._asked):
            return
        self._asked, self._due = made, time.monotonic() + self._base.config.tracking.every_s
        self._latest = replace(self._base, nodes={name: replace(state) for name, state in nodes.items()})
        self._wake.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name="live-tracking", daemon=True)
            self._thread.start()

    def leave(self, seconds: float) -> None:
        """Stop after what is under way."""
        self._over.set()
        self._wake.set()
        if self._thread is not None and seconds:
            self._thread.join(seconds)

    def _finished_one(self, nodes: Mapping[str, NodeState], new: set[str]) -> bool:
        """Whether all stages of a model have ended by now."""
        names = {nodes[name].node.finetune for name in new} - {None}
        return any(all(s.ended for s in nodes.values() if s.node.finetune == name) for name in names)

    def _write(self) -> None:
        tracker: Tracker | None = None
        while not self._over.is_set():
            self._wake.wait()
            self._wake.clear()
            state, self._latest = self._latest, None
            if state is None or self._over.is_set():
                continue
            try:
                lease = try_acquire(state.workspace.root / TRACKING_LEASE)
                if lease is None:  # another run of the workspace is writing
                    continue
                with lease:
                    tracker = tracker or tracker_of(state)
                    tracker.project(tracked(state, so_far(state)), ended=False)
                self._shown = _made(state.nodes)
            except (RealignError, OSError):
                # The end of the run says so, should it last. A tracker remembers what it wrote, and the server may not.
                tracker = None
            self._over.wait(_SOON_SECONDS)


def _made(nodes: Mapping[str, NodeState]) -> set[str]:
    """Nodes that ended in this run; what was there already has been shown by the run that made it."""
    return {name for name, state in nodes.items() if state.status in ("done", "failed")}


def so_far(run: RunState) -> RunSummary:
    """The part of a run's summary that costs nothing: rates of what has been evaluated."""
    models = [*(f.name for f in run.config.finetunes), *(m.name for m in run.config.merges)]
    aligned = run.record(None, "evaluate_aligned")
    return {
        "schema": 1,
        "run": run.config.name,
        "aligned": aligned.metrics.get("test") if aligned else None,
        "finetunes": [_entry_so_far(run, name) for name in models],
    }


def _entry_so_far(run: RunState, name: str) -> FinetuneSummary:
    failure = run.failure_of(name)
    entry: dict[str, Any] = {
        "name": name,
        "status": "failed" if failure else "done",
        "error": failure.complaint if failure else None,
        "controls": {},
    }
    for state in run.nodes.values():
        if state.node.finetune == name and state.node.step.stage == "evaluate" and state.record is not None:
            variant, rates = state.node.step.variant, state.record.metrics.get("test")
            if variant in VARIANTS:
                entry[VARIANTS[variant]] = rates
            else:
                entry["controls"][variant] = rates
    return cast("FinetuneSummary", entry)
