"""Before any work: whether mask training as configured would clearly not fit the memory that is free."""

from __future__ import annotations

import sys

from components.errors import CheckpointError, DataError
from components.storage import Workspace
from pipelines.config import RunConfig
from pipelines.graph import expand
from pipelines.inputs import open_models, trainings
from pipelines.machine import Cluster, this_machine
from pipelines.placement import on_gpu, require_fit
from pipelines.roots import ALIGNED, Roots
from pipelines.specs import build_spec


def require_memory(config: RunConfig, workspace: Workspace, roots: Roots) -> None:
    """Raises ConfigError with what training needs, what there is and what would fit. Masks that are there already need nothing.

    Only what is known refuses: ranks on CPUs are processes of this machine (Ray is started here), as are ranks on GPUs where
    there are enough of them; with fewer here they are meant for others, whose memory nobody has told. The estimate without a
    tokenizer is an upper bound: most runs fit it and pay for no more.
    """
    pending = _pending(config, workspace, roots)
    cluster = this_machine(workspace.root, config.execution)
    if not pending or not _known(config, cluster):
        return
    try:
        models = open_models(config)
        for tokenize in (False, True):
            found = trainings(config, models, tokenize=tokenize)
            wanted = [one for name, one in found.items() if name in pending]
            if not wanted or require_fit(wanted, config.execution, cluster, refuse=tokenize):
                return
    except (CheckpointError, DataError) as error:
        # Of the models' or the data's, which the stages report: a finetune's stops nobody else.
        sys.stderr.write(f"realign: memory is not checked: {error}\n")


def _known(config: RunConfig, cluster: Cluster) -> bool:
    mask = config.execution.mask
    return cluster.gpus >= mask.ranks if on_gpu(mask) else True


def _pending(config: RunConfig, workspace: Workspace, roots: Roots) -> set[str]:
    """Node ids of masks that have no record yet: what a stage's result will be called hangs on no result."""
    references: dict[str, str] = {}
    found = set[str]()
    if ALIGNED in roots.errors:
        return found
    for node in expand(config):
        members = config.members(node.finetune) if node.finetune else ()
        if node.step.kind != "stage" or any(f"finetune:{m.name}" in roots.errors for m in members):
            continue
        if not all(parent in references for _, parent in node.parents):
            continue  # it stands on a model that cannot be read, or joins such
        parents = {role: references[parent] for role, parent in node.parents}
        spec = build_spec(node, config=config, roots=roots, parents=parents, workspace=workspace.root)
        references[node.id] = spec.reference
        if node.step.stage == "train_mask" and workspace.record(spec.stage, spec.fingerprint) is None:
            found.add(node.id)
    return found
