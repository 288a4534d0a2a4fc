"""`realign status`: where a run stands, from the files of its workspace alone."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from components.errors import StorageError
from components.storage import Workspace
from pipelines.driver import RUN_FILE


def run_status(root: Path) -> list[str]:
    """Lines for a person: one per finetune with its steps, then what failed. Raises StorageError where no run is."""
    path = root / RUN_FILE
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise StorageError(f"{path}: no run here; give the workspace directory of `realign run`") from e
    workspace = Workspace(root)
    gone = _driver_gone(content.get("driver"))
    over = all(node["status"] not in ("waiting", "running") for node in content["nodes"])
    lines = [f"run {content['run']}, started {content['started']}"]
    if gone and not over:
        lines[0] += "; its driver is gone: the same `realign run` continues it"
    groups: dict[str, list[tuple[str, str]]] = {}
    errors = []
    for node in content["nodes"]:
        status, detail = _node_status(workspace, node, gone)
        groups.setdefault(node["finetune"] or "(once)", []).append((node["step"], detail))
        if status == "failed":
            message = (workspace.failure(node["stage"], node["fingerprint"] or "") or node["error"] or {}).get(
                "message"
            )
            errors.append(f"{node['id']} failed: {message}")
    for name, steps in groups.items():
        done = sum(detail == "done" for _, detail in steps)
        rest = [f"{step} {detail}" for step, detail in steps if detail not in ("done", "waiting")]
        lines.append(f"{name}: {done}/{len(steps)} done{'; ' + ', '.join(rest) if rest else ''}")
    return lines + errors


def _driver_gone(driver: dict[str, Any] | None) -> bool:
    """Whether the run's driver was on this machine and is no more. A pid that somebody else has now counts as it."""
    if driver is None or driver["host"] != socket.gethostname():
        return False
    try:
        os.kill(int(driver["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _node_status(workspace: Workspace, node: dict[str, Any], gone: bool) -> tuple[str, str]:
    """Status now (the files know more than run.json when its driver was killed), and a word on it."""
    fingerprint = node["fingerprint"]
    if fingerprint is None:
        return node["status"], node["status"]
    if workspace.record(node["stage"], fingerprint) is not None:
        return "done", "done"
    progress = workspace.progress(node["stage"], fingerprint)
    if progress is not None:
        known = {"done", "total"} <= set(progress)
        return "running", f"{progress['done']}/{progress['total']}" if known else "running"
    if workspace.failure(node["stage"], fingerprint) is not None:
        return "failed", "failed"
    if node["status"] == "running":
        return ("interrupted",) * 2 if gone else ("queued",) * 2
    return (node["status"],) * 2
