"""A run that goes on, in MLflow: shown within `every_s`, and tried again for as long as it cannot be."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from components.leases import acquire
from components.storage import Workspace
from components.tracking import default_uri
from pipelines.actions import TRACKING_LEASE
from pipelines.config import load_config
from pipelines.driver import NodeState
from pipelines.graph import expand
from pipelines.live_tracking import _Live
from pipelines.roots import find_roots
from tests.pipelines.small import small_config, write_config

EVERY_S = 1.0


def shown(root: Path) -> dict[str, dict[str, str]]:
    """run name -> tags, of what MLflow shows."""
    from mlflow import MlflowClient

    if not (root / "mlflow.db").exists():
        return {}
    client = MlflowClient(default_uri(root))
    found = client.get_experiment_by_name("small")
    runs = client.search_runs([found.experiment_id]) if found is not None else []
    return {run.info.run_name: run.data.tags for run in runs}


@pytest.fixture
def live(tmp_path: Path) -> Any:
    config = small_config(tmp_path, finetunes=("zh",))
    config["tracking"] = {"every_s": EVERY_S}
    loaded = load_config(write_config(tmp_path, config))
    root = tmp_path / "workspace"
    root.mkdir()
    made = _Live(loaded, Workspace(root), find_roots(loaded, tmp_path / "identities"))
    yield made
    made.leave(60)


def watch_for(live: _Live, nodes: dict[str, NodeState], done: Any, seconds: float) -> bool:
    """Whether that came true while the driver's loop went on, in which nothing ends."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        live.watch(nodes)
        if done():
            return True
        time.sleep(0.1)
    return False


def test_a_run_is_shown_before_anything_has_ended_and_after_whatever_kept_it_from_being(live: _Live) -> None:
    root = live._base.workspace.root
    nodes = {node.id: NodeState(node) for node in expand(live._base.config)}
    lease = root / TRACKING_LEASE
    root.rmdir()
    root.touch()  # nothing can be written there, as on a full disk
    assert not watch_for(live, nodes, lambda: shown(root), 3 * EVERY_S)
    root.unlink()
    root.mkdir()
    assert watch_for(live, nodes, lambda: "small" in shown(root), 60)

    [failed] = [state for state in nodes.values() if state.node.finetune == "zh" and state.node.step.name == "load"]
    failed.status, failed.error = "failed", {"type": "CheckpointError", "message": "broken"}
    somebody = acquire(lease, done=lambda: False)
    assert somebody is not None
    with somebody:
        assert not watch_for(live, nodes, lambda: "realign.error" in shown(root)["zh"], 3 * EVERY_S)
    assert watch_for(live, nodes, lambda: "realign.error" in shown(root)["zh"], 60)
    assert live._thread is not None
    tried = live._due
    assert not watch_for(live, nodes, lambda: live._due != tried, 3 * EVERY_S), "what is shown is not written again"
