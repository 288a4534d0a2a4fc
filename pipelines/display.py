"""Live progress: in a terminal a row per finetune and a column per stage; elsewhere a plain line per event."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from components.storage import Workspace

if TYPE_CHECKING:
    from rich.table import Table

    from pipelines.driver import NodeState, Watcher

_COLUMNS = ("load", "extract_delta", "train_mask", "search_scale", "fuse", "evaluate", "export_adapter", "landscape")
"""Those that a run has are shown."""
_TELL_SECONDS = 10.0
"""Between two lines of progress where no terminal is."""
_MARKS = {"waiting": "·", "running": "…", "done": "✓", "kept": "✓", "failed": "✗", "skipped": "-"}


@contextmanager
def progress_display(workspace: Workspace, stream: TextIO | None = None) -> Iterator[Watcher]:
    """A watcher for `run_stages`, fit for where the output goes."""
    stream = stream or sys.stderr
    if not stream.isatty():
        yield PlainLines(stream)
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(file=stream), refresh_per_second=4, transient=True) as live:
        yield lambda nodes: live.update(progress_table(nodes, workspace))


class PlainLines:
    """One line when a step ends; results that were there already are counted, not listed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._seen: dict[str, str] = {}
        self._kept = 0
        """Not told yet."""
        self._start = time.monotonic()

    def __call__(self, nodes: dict[str, NodeState]) -> None:
        skipped = 0
        for name, state in nodes.items():
            if state.status == self._seen.get(name, "waiting"):
                continue
            self._seen[name] = state.status
            self._kept += state.status == "kept"
            skipped += state.status == "skipped"
            if state.status in ("kept", "skipped", "running"):  # running may still mean queued: what has ended counts
                continue
            detail = ""
            if state.status == "done" and state.record is not None:
                detail = f" in {state.record.seconds:.1f} s"
            elif state.error is not None:
                detail = f": {state.error['message']}"
            self._line(f"{name} {state.status}{detail}")
        if self._kept and (all(s.ended for s in nodes.values()) or any(s.status == "running" for s in nodes.values())):
            self._line(f"{self._kept} {'result was' if self._kept == 1 else 'results were'} there already")
            self._kept = 0
        if skipped:
            self._line(f"{skipped} {'step' if skipped == 1 else 'steps'} skipped: what they need failed")

    def _line(self, text: str) -> None:
        self._stream.write(f"[{time.monotonic() - self._start:6.1f} s] {text}\n")
        self._stream.flush()


def progress_table(nodes: dict[str, NodeState], workspace: Workspace) -> Table:
    """A row per finetune (and one for what runs once), a column per stage with how many of its steps are done."""
    from rich.table import Table

    table = Table(title=f"{sum(s.ended for s in nodes.values())} of {len(nodes)} steps", title_justify="left")
    table.add_column("")
    columns = [column for column in _COLUMNS if any(s.node.step.stage == column for s in nodes.values())]
    for column in columns:
        table.add_column(column)
    rows = dict.fromkeys(s.node.finetune for s in nodes.values())
    for finetune in rows:
        mine = [s for s in nodes.values() if s.node.finetune == finetune]
        cells = [_cell([s for s in mine if s.node.step.stage == column], workspace) for column in columns]
        table.add_row(finetune or "(once)", *cells)
    return table


def _cell(states: list[NodeState], workspace: Workspace) -> str:
    if not states:
        return ""
    failed = [s for s in states if s.status == "failed"]
    if failed:
        return f"[red]{_MARKS['failed']} {failed[0].node.step.name}[/red]"
    if len(states) == 1:
        return f"{_MARKS[states[0].status]} {_detail(states[0], workspace)}".strip()
    ended = sum(s.ended for s in states)
    running = next((s for s in states if s.status == "running"), None)
    if ended == len(states):
        return f"[green]{_MARKS['done']}[/green]"
    return f"{ended}/{len(states)} {_detail(running, workspace) if running else ''}".strip()


def _detail(state: NodeState, workspace: Workspace) -> str:
    if state.status != "running" or state.spec is None:
        return ""
    values = workspace.progress(state.spec.stage, state.spec.fingerprint)
    if values is None:
        return "queued"
    return f"{values['done']}/{values['total']}" if {"done", "total"} <= set(values) else "…"


def teller(name: str, what: str) -> Callable[[Mapping[str, Any]], None]:
    """Progress of one thing on stderr, `done` of `total`: in place in a terminal, else a line now and then."""
    told_at = time.monotonic()

    def tell(told: Mapping[str, Any]) -> None:
        nonlocal told_at
        line, whole = f"{name}: {told['done']}/{told['total']} {what}", told["done"] == told["total"]
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{line}" + ("\n" if whole else ""))
            sys.stderr.flush()
        elif whole or time.monotonic() - told_at > _TELL_SECONDS:
            told_at = time.monotonic()
            sys.stderr.write(f"{line}\n")

    return tell
