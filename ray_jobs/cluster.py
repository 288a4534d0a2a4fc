"""A Ray cluster that is there already: RAY_ADDRESS names it, as Ray's Jobs API and KubeRay do for a job's entrypoint.

Without the variable stages run on a Ray of this machine (`ray_jobs/submit.py`).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field

from components.errors import ClusterError
from ray_jobs.signals import sigterm_kept

Request = Mapping[str, float]
"""CPU, GPU or a resource of the cluster's own -> how much of it one process takes."""
_LOOK_SECONDS = 5.0


class ClusterExecution(BaseModel):
    """How a run shares a Ray cluster. Changes no result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spread: int = Field(default=4, ge=1)
    """Stages with processes of their own (ranks of a training, actors of an evaluation) that go on at once: as many as the
    cluster has room for at its largest. The others wait for their turn."""
    patience_s: float = Field(default=1800.0, gt=0)
    """How long a stage may wait for a node that could take it, while the cluster grows, until that is an error. Waiting for its
    turn on nodes that are there does not count."""


def cluster_address() -> str | None:
    """Of the cluster that this process belongs to, if any."""
    return os.environ.get("RAY_ADDRESS") or None


def join_cluster() -> None:
    """Connect this process to its cluster, once. Raises ClusterError where it does not answer or refuses."""
    import ray

    if ray.is_initialized():
        return
    address = cluster_address()
    try:
        with sigterm_kept():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        said = str(error).strip().splitlines()[0]
        raise ClusterError(
            f"the Ray cluster at RAY_ADDRESS {address} takes no driver ({type(error).__name__}: {said}); see that its head is "
            "up and that RAY_AUTH_MODE and RAY_AUTH_TOKEN are the cluster's own, or unset RAY_ADDRESS to run on this machine"
        ) from error


def could_hold(request: Request, count: int = 1) -> bool:
    """Whether the nodes that are up could hold so many processes at once, were nothing else on them."""
    import ray

    asked = {key: value for key, value in request.items() if value > 0}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not asked:
        return bool(nodes)
    return sum(int(min(one.get(key, 0.0) / value for key, value in asked.items())) for one in nodes) >= count


def is_busy(request: Request) -> bool:
    """Whether a cluster's nodes could hold a process, and others have its place: it waits for its turn and not for a node.
    Never of this machine's own Ray."""
    import ray

    if cluster_address() is None or not could_hold(request):
        return False
    free = ray.available_resources()
    return any(free.get(key, 0.0) < value for key, value in request.items())


def wait_for_room(request: Request, count: int, patience_s: float, what: str) -> None:
    """Return once a cluster has had room for so many processes at the same time; what takes the place then asks for it anew.
    Nothing is asked of this machine's own Ray. Raises ClusterError when there were no such nodes for `patience_s` seconds;
    while others have their place that time does not run."""
    if cluster_address() is None:
        return
    import ray
    from ray.util import placement_group, remove_placement_group

    group = placement_group([dict(request)] * count, strategy="PACK")
    since = time.monotonic()
    try:
        while not ray.wait([group.ready()], timeout=_LOOK_SECONDS)[0]:
            if could_hold(request, count):
                since = time.monotonic()
            elif time.monotonic() - since > patience_s:
                each = amounts(request)
                needs = each if count == 1 else f"{count} processes with {each} each"
                raise ClusterError(no_room(what, needs, patience_s, "execution.mask.patience_s"))
    finally:
        remove_placement_group(group)


def no_room(what: str, needs: str, patience_s: float, key: str) -> str:
    """That no nodes came for a request in time: what it asks for, and what there is. `key`: of the time, in a run config."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    there = "; ".join(sorted({amounts(one) for one in alive})) or "nothing"
    return (
        f"{what}: no node took it within {patience_s:g} s; it asks for {needs}; nodes that are up: {len(alive)}, with {there}; "
        f"ask for less (execution), let the cluster grow to such nodes, or wait longer ({key})"
    )


_RAYS = ("CPU", "GPU", "memory", "object_store_memory")


def amounts(resources: Mapping[str, float]) -> str:
    """`8 CPUs and 1 GPU`; other resources only where they are a process's own request."""
    found = [
        f"{resources[key]:g} {key}{'s' if resources[key] != 1 else ''}" for key in ("CPU", "GPU") if resources.get(key)
    ]
    if "memory" in resources:
        found.append(f"{resources['memory'] / 2**30:.3g} GiB")
    return " and ".join(found) or "no CPUs"
