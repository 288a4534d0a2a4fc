"""`realign status`: where a run stands, from the files of its workspace alone."""

from __future__ import annotations

import json
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
    lines = [f"run {content['run']}, started {content['started']}"]
    groups: dict[str, list[tuple[str, str]]] = {}
    errors = []
    for node in content["nodes"]:
        status, detail = _node_status(workspace, node)
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


def _node_status(workspace: Workspace, node: dict[str, Any]) -> tuple[str, str]:
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
    return ("interrupted",) * 2 if node["status"] == "running" else (node["status"],) * 2
