"""`realign run`: stages, summary, actions (tracking, registry), then report and model cards. The summary always appears."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from components.errors import GateError, RealignError
from components.reporting.report import write_report
from components.reporting.schema import RunSummary
from components.reporting.table import comparison_caption, comparison_table, comparison_text
from components.storage import Workspace, storage_errors
from pipelines.actions import in_service, track_and_register
from pipelines.cards import write_cards
from pipelines.config import RunConfig
from pipelines.display import progress_display
from pipelines.driver import NodeState, RunState, run_stages
from pipelines.gate import decide_gates
from pipelines.landscapes import add_landscapes
from pipelines.live_tracking import live_tracking
from pipelines.patience import Patience
from pipelines.place import settled
from pipelines.preflight import require_memory
from pipelines.report_action import log_report
from pipelines.roots import find_roots
from pipelines.summary import failures, summarise, write_summary


def realign(config: RunConfig, root: Path) -> list[str]:
    """Run a config in a workspace. Returns one line for each thing that failed; an empty list is success.

    Writes `summary.json` and `report.html` and prints the table, also when finetunes failed. Raises RealignError for what
    keeps the whole run from starting, GateError where nothing failed and a realigned model does not pass the gate.
    """
    workspace = Workspace(root)
    workspace.prepare()
    settled(config.tracking.uri, root)
    roots = find_roots(config, root / ".identities")
    require_memory(config, workspace, roots)
    with progress_display(workspace) as shown, live_tracking(config, workspace, roots) as live:

        def watch(nodes: dict[str, NodeState]) -> None:
            shown(nodes)
            live(nodes)

        state = run_stages(config, workspace, roots, watch)
    return finish(state)


def finish(state: RunState) -> list[str]:
    """All that comes after the stages: see `realign`."""
    root, patience, failed = state.workspace.root, Patience(state.config.tracking.patience_s), failures(state)
    summary, shut = decided(state, patience)
    if _told(root, summary, failed, lambda: shut.extend(patience(lambda: track_and_register(state, summary)))):
        _write_all(state, summary)
        # Last, for the report names the registered versions.
        _told(root, summary, failed, lambda: patience(lambda: log_report(state, summary)))
    if failed:
        _write_all(state, summary)  # with what tracking had to say
    _print_table(summary)
    for name in ("summary.json", "report.html"):
        sys.stdout.write(f"{root / name}\n")
    for line in failed:
        sys.stderr.write(f"realign: {line}\n")
    if shut and not failed:
        raise GateError(f"the gate is shut for {', '.join(shut)}; see {root / 'summary.json'}")
    return failed


def decided(state: RunState, patience: Patience) -> tuple[RunSummary, list[str]]:
    """The summary with the gate's decisions, written; and names of the models for which it is shut."""
    path = state.workspace.root / "summary.json"
    summary = summarise(state)
    write_summary(summary, path)
    add_landscapes(state, summary)
    shut = decide_gates(state, summary, in_service(state, patience))
    write_summary(summary, path)
    return summary, shut


def _told(where: Path, summary: RunSummary, failed: list[str], track: Callable[[], None]) -> bool:
    """Whether tracking went well: what a server or a disk refuses fails the run, and takes nothing else from it."""
    try:
        with storage_errors(where):
            track()
    except RealignError as error:
        failed.append(f"tracking: {error}")
        summary.setdefault("notes", []).append(f"tracking: {error}")
        return False
    return True


def _write_all(state: RunState, summary: RunSummary) -> None:
    """Summary, report and model cards, with what is known now."""
    root = state.workspace.root
    write_summary(summary, root / "summary.json")
    write_report(summary, root / "report.html")
    write_cards(state, summary)


def _print_table(summary: RunSummary) -> None:
    """As wide as the terminal; in full where the output goes to a file."""
    if not sys.stdout.isatty():
        sys.stdout.write(comparison_text(summary))
        return
    from rich.console import Console

    console = Console()
    console.print(comparison_table(summary, width=console.width))
    for line in comparison_caption(summary):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
