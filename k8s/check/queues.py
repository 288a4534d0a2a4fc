"""Kueue's queues: they are there, cover what is asked for, and have a flavour with room for it.

How flavours are given: Kueue 0.19, pkg/scheduler/flavorassigner.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from decimal import Decimal

from k8s.check.documents import Document, Documents, Pod, place
from k8s.check.finding import Finding, named
from k8s.check.pods import tolerates
from k8s.check.quantities import amount
from k8s.check.ray import QUEUE

OLD = "kueue.x-k8s.io/v1beta1"


def queue_findings(documents: Documents) -> Iterator[Finding]:
    """All rules of this file."""
    for document in documents.of("ResourceFlavor", "ClusterQueue", "LocalQueue"):
        if document["apiVersion"] == OLD:
            yield Finding(named(document), "apiVersion", f"{OLD} is on its way out", "use v1beta2")
    cluster_queues = {d["metadata"]["name"]: d for d in documents.of("ClusterQueue")}
    for local in documents.of("LocalQueue"):
        target = (local.get("spec") or {}).get("clusterQueue")
        if target not in cluster_queues:
            yield Finding(named(local), "spec.clusterQueue", f"there is no ClusterQueue {target}", "mend the name")
    for queue in cluster_queues.values():
        yield from _cluster_queue(queue, documents)
    locals_by_name = {(d["metadata"]["name"], place(d)): d for d in documents.of("LocalQueue")}
    for document in documents.all:
        name = (document["metadata"].get("labels") or {}).get(QUEUE)
        if name is None:
            continue
        local_queue = locals_by_name.get((name, place(document)))
        if local_queue is None:
            there = ", ".join(sorted(documents.names("LocalQueue", place(document)))) or "none"
            problem = f"there is no LocalQueue {name} in {place(document)}: the job waits for ever"
            yield Finding(named(document), f"metadata.labels.{QUEUE}", problem, f"there are: {there}")
            continue
        queue_of = cluster_queues.get(local_queue["spec"].get("clusterQueue"))
        if queue_of is not None:
            yield from _fits(document, queue_of, documents)


def _cluster_queue(queue: Document, documents: Documents) -> Iterator[Finding]:
    for index, group in enumerate((queue.get("spec") or {}).get("resourceGroups") or []):
        path = f"spec.resourceGroups[{index}]"
        for number, flavor in enumerate(group.get("flavors") or []):
            if flavor["name"] not in documents.names("ResourceFlavor"):
                problem = f"there is no ResourceFlavor {flavor['name']}"
                yield Finding(named(queue), f"{path}.flavors[{number}].name", problem, "define it, or mend the name")
            has = [r["name"] for r in flavor.get("resources") or []]
            if has != group.get("coveredResources"):
                problem = f"gives {has}, the group covers {group.get('coveredResources')}"
                yield Finding(
                    named(queue), f"{path}.flavors[{number}].resources", problem, "name the same, in that order"
                )


def _fits(document: Document, queue: Document, documents: Documents) -> Iterator[Finding]:
    """One pod of every group must fit a flavour that it may have, and the first of these, or the group is never given one."""
    flavors = [f for g in (queue.get("spec") or {}).get("resourceGroups") or [] for f in g.get("flavors") or []]
    defined = {d["metadata"]["name"]: d.get("spec") or {} for d in documents.of("ResourceFlavor")}
    for pod in (p for p in documents.pods if p.owner is document):
        asked: dict[str, Decimal] = defaultdict(Decimal)
        for container in pod.containers:
            for name, quantity in ((container.spec.get("resources") or {}).get("requests") or {}).items():
                asked[name] += amount(quantity)
        open_to = [f for f in flavors if _may_have(pod, defined.get(f["name"]) or {})]
        room = [f["name"] for f in open_to if _room(f, asked)]
        wants = ", ".join(f"{name}={much}" for name, much in sorted(asked.items()))
        if not room:
            problem = f"no flavour of ClusterQueue {queue['metadata']['name']} has room for one such pod"
            yield Finding(pod.name, pod.path, problem, f"it asks for {wants}: raise a quota or ask for less")
        elif room[0] != open_to[0]["name"]:
            first = open_to[0]["name"]
            problem = f"while it is empty the group is given the flavour {first}, which has no room for {wants}"
            yield Finding(pod.name, pod.path, problem, f"let {room[0]} come before {first} in the ClusterQueue")


def _may_have(pod: Pod, flavor: Document) -> bool:
    """Whether Kueue lets a pod have nodes of a flavour: its taints tolerated, its labels not contradicted."""
    asked = pod.spec.get("nodeSelector") or {}
    if any(asked.get(key, value) != value for key, value in (flavor.get("nodeLabels") or {}).items()):
        return False
    tolerations = [*(pod.spec.get("tolerations") or []), *(flavor.get("tolerations") or [])]
    hard = [t for t in flavor.get("nodeTaints") or [] if t["effect"] != "PreferNoSchedule"]
    return all(any(tolerates(one, taint) for one in tolerations) for taint in hard)


def _room(flavor: Document, asked: Mapping[str, Decimal]) -> bool:
    quota = {r["name"]: amount(r["nominalQuota"]) for r in flavor["resources"]}
    return all(quota.get(name, -1) >= much for name, much in asked.items())
