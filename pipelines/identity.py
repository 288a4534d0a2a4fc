"""By what a run is known again before any of its stages has run."""

from __future__ import annotations

from components.records import fingerprint, parent_fingerprint
from pipelines.driver import RunState
from pipelines.graph import expand
from pipelines.specs import build_spec, root_key


def run_identity(run: RunState) -> str:
    """A run's identity: its name, and the fingerprints that its stages have if all goes well. The same models, data and
    settings are the same run, whatever fails on the way and however often it goes on."""
    expected: dict[str, str] = {}
    for node in expand(run.config):
        if node.step.kind != "stage" or root_key(node) in run.roots.errors:
            continue
        parents = {role: expected[parent] for role, parent in node.parents if parent in expected}
        if any(parent not in expected and ":" not in role for role, parent in node.parents):
            continue
        spec = build_spec(node, config=run.config, roots=run.roots, parents=parents, workspace=run.workspace.root)
        expected[node.id] = spec.reference
    return fingerprint(
        stage="run",
        version=1,
        semantics={"name": run.config.name},
        parents={node: parent_fingerprint(reference) for node, reference in expected.items()},
    )
