"""Before any work: whether mask training as configured would clearly not fit the memory that is free."""

from __future__ import annotations

import sys

from components.errors import CheckpointError, DataError, RealignError, StorageError
from components.storage import Workspace
from pipelines.config import RunConfig
from pipelines.graph import expand
from pipelines.inputs import open_models, trainings
from pipelines.machine import Cluster, this_machine
from pipelines.placement import on_gpu, require_fit
from pipelines.roots import Roots
from pipelines.specs import build_spec, root_key
from ray_jobs.cluster import cluster_address


def require_memory(config: RunConfig, workspace: Workspace, roots: Roots) -> None:
    """Raises ConfigError with what training needs, what there is and what would fit. Masks that are there already need nothing.

    Only what is known refuses, which is nothing of a Ray cluster: ranks on CPUs are processes of this machine (Ray is started
    here), as are ranks on GPUs where there are enough of them; with fewer here they are meant for others, whose memory nobody
    has told. The estimate without a tokenizer is an upper bound: most runs fit it and pay for no more.
    """
    if cluster_address() is not None:
        return  # a driver's node says nothing of those where stages go
    pending = _pending(config, workspace, roots)
    cluster = this_machine(workspace.root, config.execution)
    if not pending or not _known(config, cluster):
        return
    finetunes = {f.name: roots.errors[key] for f in config.finetunes if (key := f"finetune:{f.name}") in roots.errors}
    try:
        models = open_models(config, finetunes)
        for tokenize in (False, True):
            found = trainings(config, models, tokenize=tokenize)
            wanted = [one for name, one in found.items() if name in pending]
            if not wanted or require_fit(wanted, config.execution, cluster, refuse=tokenize):
                break
    except (CheckpointError, DataError) as error:
        _unchecked("", error)  # of the aligned model's, which its stage reports
        return
    for label, unknown in {**models.errors, **models.untrained}.items():
        if label not in finetunes:
            _unchecked(f" for {label}", unknown)


def _unchecked(whose: str, error: RealignError) -> None:
    sys.stderr.write(f"realign: memory is not checked{whose}: {error}\n")


def _known(config: RunConfig, cluster: Cluster) -> bool:
    mask = config.execution.mask
    return cluster.gpus >= mask.ranks if on_gpu(mask) else True


def _pending(config: RunConfig, workspace: Workspace, roots: Roots) -> set[str]:
    """Node ids of masks that have no record yet: what a stage's result will be called hangs on no result."""
    references: dict[str, str] = {}
    found = set[str]()
    for node in expand(config):
        stage = node.step.stage
        if node.step.kind != "stage" or (stage == "load" and root_key(node) in roots.errors):
            continue
        if not all(parent in references for _, parent in node.parents):
            continue  # it stands on a model that cannot be read, or joins such
        parents = {role: references[parent] for role, parent in node.parents}
        spec = build_spec(node, config=config, roots=roots, parents=parents, workspace=workspace.root)
        references[node.id] = spec.reference
        if stage != "train_mask":
            continue
        try:
            if workspace.record(spec.stage, spec.fingerprint) is None:
                found.add(node.id)
        except StorageError as error:  # its node fails by it, and trains nothing
            _unchecked(f" for {node.id}", error)
    return found
