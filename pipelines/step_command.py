"""`realign step`: a part of a run, in a job of a Ray cluster that a pipeline's step has submitted. Same graph, same stages.

What a part leaves is in the workspace; the last line that it prints (`ANSWER` and JSON) is for the step.
"""

from __future__ import annotations

import base64
import gzip
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from components.errors import ConfigError, GateError, RealignError, TrackingError
from components.reporting.schema import FinetuneSummary, read_summary, shown_models
from components.reporting.table import comparison_markdown
from components.storage import Workspace
from components.tracked import rate_metrics
from pipelines.config import RunConfig, load_config
from pipelines.display import progress_display
from pipelines.driver import RunState, run_stages, stages_so_far
from pipelines.graph import STEPS, Node, expand
from pipelines.patience import Patience
from pipelines.report_action import tracked_at
from pipelines.roots import find_roots
from pipelines.run import decided, finish
from ray_jobs.cluster import cluster_address, join_cluster
from ray_jobs.stage import VERSIONS

CONFIG_VARIABLE = "REALIGN_CONFIG"
PLAN, GATE, PUBLISH = "plan", "gate", "publish"
_RATES = ("before", "after_soft", "after_binary", "after_tuned")
_FILES = ("report.html", "summary.json")


def step_command(
    config: str,
    root: Path,
    *,
    of: str | None = None,
    steps: Sequence[str] = (),
    lost: Collection[str] = (),
    patience_s: float | None = None,
) -> dict[str, Any]:
    """The answer: `status` (done or failed), `error`, and what the part has to tell.

    Args:
        config: the run config; `-` for the text in REALIGN_CONFIG, whose paths must be absolute.
        of: a finetune or merge; None for what the run does once.
        steps: stages of it (all, where none is named), or one of plan, gate and publish.
        lost: nodes of the graph that a step before has tried in vain: they are not tried again for what stands on them.
        patience_s: how long a stage may wait for a node, in place of what the config says.
    """
    try:
        workspace = Workspace(root)
        workspace.prepare()
        loaded = _patient(_config(config), patience_s)
        if len(steps) == 1 and steps[0] in (PLAN, GATE, PUBLISH):
            return {PLAN: _plan, GATE: _gate, PUBLISH: _publish}[steps[0]](loaded, workspace)
        return _stages(loaded, workspace, of, steps, lost)
    except RealignError as error:
        return {"status": "failed", "error": f"{type(error).__name__}: {error}"}


def _config(given: str) -> RunConfig:
    if given != "-":
        return load_config(Path(given))
    text = os.environ.get(CONFIG_VARIABLE)
    if not text:
        raise ConfigError(f"CONFIG is -, and {CONFIG_VARIABLE} is empty: put the run config's text there")
    return load_config(Path(CONFIG_VARIABLE), text=text)


def _patient(config: RunConfig, patience_s: float | None) -> RunConfig:
    if patience_s is None:
        return config
    how, patience = config.execution, {"patience_s": patience_s}
    parts = {
        name: getattr(how, name).model_copy(update=patience) for name in ("cluster", "mask", "evaluation", "landscape")
    }
    return config.model_copy(update={"execution": how.model_copy(update=parts)})


def _stages(
    config: RunConfig, workspace: Workspace, of: str | None, steps: Sequence[str], lost: Collection[str] = ()
) -> dict[str, Any]:
    """Run a model's stages, and what they stand on where that is missing."""
    wanted = _wanted(config, of, steps)
    needed = _with_parents(expand(config), wanted)
    if cluster_address() is not None:
        join_cluster()
    roots = find_roots(config, workspace.root / ".identities")
    with progress_display(workspace) as watch:
        run = run_stages(config, workspace, roots, watch, lambda node: node.id in needed, noted=False, lost=lost)
    states = [run.nodes[name] for name in sorted(wanted)]
    errors = [f"{s.node.id}: {s.error['message']}" for s in run.nodes.values() if s.error is not None]
    failed = any(s.record is None for s in states)
    return {
        "status": "failed" if failed else "done",
        "of": of,
        "nodes": {s.node.id: s.status for s in states},
        "error": "; ".join(errors),
    }


def _wanted(config: RunConfig, of: str | None, steps: Sequence[str]) -> set[str]:
    """Ids of a model's nodes of these stages. Raises ConfigError for names that are not there."""
    unknown = [one for one in steps if one not in VERSIONS]
    if unknown:
        there = ", ".join((*VERSIONS, PLAN, GATE, PUBLISH))
        raise ConfigError(f"no step {', '.join(unknown)}; there are {there} (the last three by themselves)")
    names = {node.finetune for node in expand(config)} - {None}
    if of is not None and of not in names:
        raise ConfigError(f"no finetune or merge {of}; there are {', '.join(sorted(map(str, names)))}")
    return {
        node.id
        for node in expand(config)
        if node.step.kind == "stage" and node.finetune == of and (not steps or node.step.stage in steps)
    }


def _with_parents(nodes: Sequence[Node], wanted: Collection[str]) -> set[str]:
    parents = {node.id: [parent for _, parent in node.parents] for node in nodes}
    found, left = set[str](), list(wanted)
    while left:
        one = left.pop()
        if one not in found:
            found.add(one)
            left += parents[one]
    return found


def _plan(config: RunConfig, workspace: Workspace) -> dict[str, Any]:
    """Load the aligned model; what there is to do for whom."""
    done = _stages(config, workspace, None, ["load"])
    return {
        **done,
        "mode": config.mode,
        "finetunes": [{"name": finetune.name} for finetune in config.finetunes],
        "targets": [{"name": name} for name in config.targets],
        "stages": sorted(
            {step.stage for step in STEPS if step.kind == "stage"} & {n.step.stage for n in expand(config)}
        ),
    }


def _so_far(config: RunConfig, workspace: Workspace) -> RunState:
    return stages_so_far(config, workspace, find_roots(config, workspace.root / ".identities"))


def _gate(config: RunConfig, workspace: Workspace) -> dict[str, Any]:
    """The summary of what there is, and whether each realigned model may serve."""
    summary, _ = decided(_so_far(config, workspace), Patience(config.tracking.patience_s))
    models = shown_models(summary)
    gates = {one["name"]: one.get("gate") for one in models if one["name"] in config.targets}
    return {
        "status": "done",
        "error": "",
        "passed": {name: gate["passed"] if gate else None for name, gate in gates.items()},
        "findings": {name: gate["findings"] if gate else [] for name, gate in gates.items()},
        "rates": {one["name"]: _rates(one) for one in models},
        "table": comparison_markdown(summary),
    }


def _rates(entry: FinetuneSummary) -> dict[str, float]:
    """`after_soft/asr` and so on."""
    return {
        name: value
        for variant in _RATES
        for name, value in rate_metrics(variant, cast("Mapping[str, Any] | None", entry.get(variant))).items()
    }


def _publish(config: RunConfig, workspace: Workspace) -> dict[str, Any]:
    """Tracking, registry, promotion, report and cards of what there is."""
    run = _so_far(config, workspace)
    failed, shut, page = list[str](), "", None
    try:
        failed = finish(run)
    except GateError as error:
        shut = str(error)
    with suppress(TrackingError):  # which `failed` has
        page = tracked_at(run)
    summary = read_summary(workspace.root / "summary.json")
    return {
        "status": "failed" if failed else "done",
        "error": "; ".join(failed),
        "failed": failed,
        "shut": shut,
        "mlflow": page,
        "registered": {one["name"]: one["registry"] for one in shown_models(summary) if one.get("registry")},
        "files": {name: _packed(workspace.root / name) for name in _FILES if (workspace.root / name).is_file()},
    }


def _packed(path: Path) -> str:
    """A file as text."""
    return base64.b64encode(gzip.compress(path.read_bytes(), mtime=0)).decode()
