"""Whether a Ray cluster's groups, at their largest, hold the processes that a run config asks for.

What no node could take waits for `patience_s` on the cluster, with what is up by then. What each process asks for is decided in
`ray_jobs/train_ranks.py`, `ray_jobs/actors.py` and `ray_jobs/submit.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil

from components.evaluation.execution import EvaluationExecution
from components.evaluation.judges.settings import OwnModel, judges_in
from k8s.check.documents import Document, RayCluster
from k8s.check.finding import Finding, named
from k8s.check.pods import GPU
from k8s.check.quantities import amount
from k8s.check.ray import limits
from pipelines.config import RunConfig
from ray_jobs.cluster import Request


@dataclass(frozen=True)
class Nodes:
    """The nodes of one group that there can be."""

    name: str
    most: int
    each: Request
    """What Ray counts on one of them."""

    def holds(self, request: Request) -> int:
        """Processes that one node takes."""
        return min(int(self.each.get(key, 0) // much) for key, much in request.items())

    def __str__(self) -> str:
        return f"{self.name}: {self.most} with {worded(self.each)}"


@dataclass(frozen=True)
class Ask:
    """Processes of one kind that are up at the same time."""

    section: str
    """In the run config."""
    key: str
    """In the section: how many they are."""
    what: str
    count: int
    each: Request
    own: str | None = None
    """A resource of the cluster's own among those of `each`."""


def room_findings(config: str, path: str, run: RunConfig, command: str, cluster: RayCluster) -> Iterator[Finding]:
    """What a command of `realign` asks for by a run config, a document and a path in it, and the cluster's groups lack."""
    nodes = [one for one in nodes_of(cluster) if one.most > 0 and one.each["CPU"]]
    if not nodes:
        return  # another rule's
    whose = f"the groups of {named(cluster.owner)}"
    there = "; ".join(str(one) for one in nodes)
    threads, largest = run.execution.threads, max(int(one.each["CPU"]) for one in nodes)
    if threads > largest:
        problem = f"execution.threads: a stage asks for {threads} CPUs, a node of {whose} has at most {largest}"
        yield Finding(config, path, problem, "lower it, or give a group larger nodes")
        threads = 0  # said once; the others are held to the rest of what they ask for
    for ask in asked(run, command, threads):
        if ask.own is not None and not any(one.each.get(ask.own) for one in nodes):
            problem = f"{ask.section}.resource: no node of {whose} has {ask.own} ({there})"
            yield Finding(
                config, path, problem, "name one that a group's rayStartParams.resources have, or add it there"
            )
            continue
        room = [(one, one.holds(ask.each)) for one in nodes]
        most = sum(one.most * held for one, held in room)
        if most < ask.count:
            held = "; ".join(f"{one.name}: {much} on each of {one.most}" for one, much in room if much) or there
            asks = f"{ask.count} {ask.what}{'s' if ask.count > 1 else ''}, each with {worded(ask.each)}"
            problem = f"{ask.section}.{ask.key}: {asks}; {whose} hold at most {most} ({held})"
            yield Finding(
                config, path, problem, "ask for less, or give a group more or larger nodes (maxReplicas, limits)"
            )


def asked(run: RunConfig, command: str, threads: int) -> Iterator[Ask]:
    """Who asks for nodes of a certain kind, or for more than one, by the run config: what a command line says instead of it
    (`--actors`), or a sweep finds by itself, is not counted. `threads` 0: nothing is said of CPUs."""
    return (ask for ask in _asked(run, command, threads) if ask.each)


def _asked(run: RunConfig, command: str, threads: int) -> Iterator[Ask]:
    how = run.execution
    if how.mask.spread:
        each = _each(threads, int(how.mask.device == "cuda"), how.mask.resource)
        yield Ask("execution.mask", "ranks", "rank", how.mask.ranks, each, how.mask.resource)
    yield from _actors("evaluation", how.evaluation, threads)
    if run.landscape is not None:
        yield from _actors("landscape", how.landscape, threads)
    if command == "sweep":
        yield from _actors("sweep", how.sweep, threads)
    if how.judge.device.startswith("cuda") and any(isinstance(j, OwnModel) for j in judges_in(run.evaluation.judge)):
        yield Ask("execution.judge", "device", "judging stage", 1, _each(threads, 1, None))


def _actors(section: str, how: EvaluationExecution, threads: int) -> Iterator[Ask]:
    if not how.in_process:
        each = _each(threads, how.devices if how.device == "cuda" else 0, how.resource)
        yield Ask(f"execution.{section}", "actors", "actor", how.actors, each, how.resource)


def _each(threads: int, gpus: int, own: str | None) -> Request:
    each = {"CPU": threads, "GPU": gpus} | ({own: 1} if own is not None else {})
    return {key: much for key, much in each.items() if much}


def nodes_of(cluster: RayCluster) -> Iterator[Nodes]:
    """The head, which stands, and the groups' nodes."""
    yield Nodes("the head", 1, ray_resources(cluster.spec.get("headGroupSpec") or {}))
    for group in cluster.spec.get("workerGroupSpecs") or []:
        most = group.get("maxReplicas", 2**31 - 1) * group.get("numOfHosts", 1)
        yield Nodes(str(group.get("groupName")), most, ray_resources(group))


def ray_resources(group: Document) -> Request:
    """CPUs, GPUs and resources of its own that Ray counts on a node: as it is told, else by the pod's limits."""
    told = group.get("rayStartParams") or {}
    counted = {
        name: ceil(amount(told.get(said, limits(group).get(resource, 0))))
        for name, said, resource in (("CPU", "num-cpus", "cpu"), ("GPU", "num-gpus", GPU))
    }
    try:
        own = dict(json.loads(json.loads(told.get("resources", '"{}"'))))
    except (TypeError, ValueError):
        own = {}  # another rule's
    return {"CPU": counted["CPU"], **({"GPU": counted["GPU"]} if counted["GPU"] else {}), **own}


def worded(resources: Mapping[str, float]) -> str:
    """`8 CPU, 1 GPU`."""
    return ", ".join(f"{much:g} {name}" for name, much in resources.items())
