"""What every pod must be like, whoever makes it: locked down, bounded, pinned, and whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from k8s.check.documents import Container, Documents, Pod, selects
from k8s.check.finding import Finding, named
from k8s.check.quantities import amount

DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
"""What restricted pod security lets a pod mount."""
TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"
GPU = "nvidia.com/gpu"
ENFORCE = "pod-security.kubernetes.io/enforce"


def pod_findings(documents: Documents) -> Iterator[Finding]:
    """All rules of this file, for every pod."""
    yield from _namespaces(documents)
    for pod in documents.pods:
        yield from _pod_security(pod)
        yield from _volumes(pod)
        yield from _gpu(pod)
        for container in pod.containers:
            yield from _container_security(pod, container)
            yield from _bounds(pod, container)
            yield from _mounts(pod, container)
            yield from _shared_memory(pod, container)
            yield from _probes(pod, container)


def _namespaces(documents: Documents) -> Iterator[Finding]:
    for namespace in documents.of("Namespace"):
        name = namespace["metadata"]["name"]
        labels = namespace["metadata"].get("labels") or {}
        locked = any("IPC_LOCK" in _adds(c) for p in documents.pods if p.namespace == name for c in p.containers)
        allowed = {"restricted", "privileged"} if locked else {"restricted"}
        for label, levels in ((ENFORCE, allowed), (ENFORCE.replace("enforce", "warn"), {"restricted"})):
            if labels.get(label) not in levels:
                problem = f"pod security {label.rpartition('/')[2]} is {labels.get(label)}"
                path = f"metadata.labels.{label}"
                yield Finding(named(namespace), path, problem, f"set it to {' or '.join(sorted(levels))}")
        if locked and labels.get(ENFORCE) == "restricted":
            problem = "a pod in it adds IPC_LOCK, which restricted pod security refuses"
            yield Finding(
                named(namespace), f"metadata.labels.{ENFORCE}", problem, "enforce privileged, or drop IPC_LOCK"
            )


def _adds(container: Container) -> set[str]:
    """Capabilities that a container adds beyond what restricted pod security allows."""
    capabilities = (container.spec.get("securityContext") or {}).get("capabilities") or {}
    return set(capabilities.get("add") or []) - {"NET_BIND_SERVICE"}


def _pod_security(pod: Pod) -> Iterator[Finding]:
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.spec.get(field):
            yield Finding(pod.name, f"{pod.path}.spec.{field}", "the pod shares the node's own", "remove it")
    if pod.spec.get("automountServiceAccountToken") is not False:
        problem = "every container is given a token for the Kubernetes API"
        path = f"{pod.path}.spec.automountServiceAccountToken"
        yield Finding(pod.name, path, problem, "set it to false; mount a projected token where one is needed")
    if not pod.spec.get("serviceAccountName"):
        path = f"{pod.path}.spec.serviceAccountName"
        yield Finding(pod.name, path, "the pod runs as the namespace's default account", "name one of its own")
    if pod.role and pod.spec.get("restartPolicy") != "Never":
        problem = f"a Ray pod restarts in place ({pod.spec.get('restartPolicy', 'Always')})"
        remedy = "set Never: the autoscaler (v2) and the operator replace pods"
        yield Finding(pod.name, f"{pod.path}.spec.restartPolicy", problem, remedy)


def _container_security(pod: Pod, container: Container) -> Iterator[Finding]:
    path = f"{container.path}.securityContext"
    own: dict[str, Any] = container.spec.get("securityContext") or {}
    whole: dict[str, Any] = pod.spec.get("securityContext") or {}

    def wrong(field: str, problem: str, remedy: str) -> Finding:
        return Finding(pod.name, f"{path}.{field}", problem, remedy)

    if own.get("privileged"):
        yield wrong("privileged", "the container is privileged: it has the node", "remove it")
    if own.get("allowPrivilegeEscalation") is not False:
        yield wrong("allowPrivilegeEscalation", "privilege escalation is not forbidden", "set it to false")
    if not own.get("runAsNonRoot", whole.get("runAsNonRoot")):
        yield wrong("runAsNonRoot", "the container may run as root", "set it to true")
    if own.get("runAsUser", whole.get("runAsUser")) == 0:
        yield wrong("runAsUser", "the container runs as root", "give a user id above 0")
    if (own.get("seccompProfile") or whole.get("seccompProfile") or {}).get("type") not in {
        "RuntimeDefault",
        "Localhost",
    }:
        yield wrong("seccompProfile", "no seccomp profile", "set type: RuntimeDefault")
    capabilities = own.get("capabilities") or {}
    if "ALL" not in (capabilities.get("drop") or []):
        yield wrong("capabilities.drop", "capabilities are not dropped", "drop: [ALL]")
    rdma = any(name.startswith("rdma/") for name in _limits(container))
    more = _adds(container) - ({"IPC_LOCK"} if rdma else set())
    if more:
        remedy = "remove them (IPC_LOCK may be added where the container asks for rdma/…)"
        yield wrong("capabilities.add", f"capabilities are added: {', '.join(sorted(more))}", remedy)
    if own.get("readOnlyRootFilesystem") is not True:
        yield wrong(
            "readOnlyRootFilesystem", "the image's files can be changed", "set it to true; mount what is written"
        )
    for index, port in enumerate(container.spec.get("ports") or []):
        if port.get("hostPort"):
            yield Finding(
                pod.name, f"{container.path}.ports[{index}].hostPort", "opens a port of the node", "remove it"
            )


def _limits(container: Container) -> dict[str, Any]:
    return (container.spec.get("resources") or {}).get("limits") or {}


def _bounds(pod: Pod, container: Container) -> Iterator[Finding]:
    """Requests and limits, and an image that cannot change. The autoscaler takes the head's image."""
    resources = container.spec.get("resources") or {}
    for side in ("requests", "limits"):
        missing = [name for name in ("cpu", "memory") if name not in (resources.get(side) or {})]
        if missing:
            path = f"{container.path}.resources.{side}"
            yield Finding(pod.name, path, f"no {' and no '.join(missing)} given", "say how much it takes")
    image = container.spec.get("image")
    if container is pod.autoscaler and image is None:
        return
    if not DIGEST.search(str(image)):
        problem = f"{image} can change under its name"
        yield Finding(
            pod.name, f"{container.path}.image", problem, "pin it by digest, with `images:` of the overlay's site"
        )


def _volumes(pod: Pod) -> Iterator[Finding]:
    for index, volume in enumerate(pod.spec.get("volumes") or []):
        for kind in sorted(set(volume) - VOLUMES - {"name"}):
            path = f"{pod.path}.spec.volumes[{index}].{kind}"
            yield Finding(pod.name, path, f"{kind} is refused by restricted pod security", "use a claim or an emptyDir")


def _mounts(pod: Pod, container: Container) -> Iterator[Finding]:
    there = {v["name"] for v in pod.spec.get("volumes") or []}
    there |= {c["metadata"]["name"] for c in (pod.owner.get("spec") or {}).get("volumeClaimTemplates") or []}
    taken: set[str] = set()
    for index, mount in enumerate(container.spec.get("volumeMounts") or []):
        path = f"{container.path}.volumeMounts[{index}]"
        if mount["name"] not in there:
            problem = f"mounts the volume {mount['name']}, which the pod does not have"
            yield Finding(pod.name, f"{path}.name", problem, f"there are: {', '.join(sorted(there)) or 'none'}")
        if mount["mountPath"] in taken:
            yield Finding(pod.name, f"{path}.mountPath", f"{mount['mountPath']} is mounted twice", "remove one")
        taken.add(mount["mountPath"])
    if container is pod.autoscaler and TOKEN not in taken:
        problem = "the autoscaler has no token for the Kubernetes API, so it can add no workers"
        yield Finding(pod.name, f"{container.path}.volumeMounts", problem, f"mount a projected token at {TOKEN}")


def _shared_memory(pod: Pod, container: Container) -> Iterator[Finding]:
    volumes = {v["name"]: (i, v) for i, v in enumerate(pod.spec.get("volumes") or [])}
    mounted = [m for m in container.spec.get("volumeMounts") or [] if m["mountPath"] == "/dev/shm"]
    if not mounted:
        if pod.role in {"head", "worker"} and container is not pod.autoscaler:
            remedy = "mount an emptyDir of medium Memory there, with a sizeLimit"
            yield Finding(pod.name, f"{container.path}.volumeMounts", "nothing is mounted at /dev/shm", remedy)
        return
    index, volume = volumes.get(mounted[0]["name"], (0, {}))
    path = f"{pod.path}.spec.volumes[{index}].emptyDir"
    empty = volume.get("emptyDir") or {}
    if volume and (empty.get("medium") != "Memory" or "sizeLimit" not in empty):
        yield Finding(pod.name, path, "/dev/shm is no bounded memory", "set medium: Memory and a sizeLimit")
    elif volume and "memory" in _limits(container):
        memory, shm = amount(_limits(container)["memory"]), amount(empty["sizeLimit"])
        if shm >= memory:
            problem = (
                f"/dev/shm of {empty['sizeLimit']} is not less than the memory limit {_limits(container)['memory']}"
            )
            yield Finding(
                pod.name, f"{path}.sizeLimit", problem, "what lies there counts to the limit: make it smaller"
            )


def _gpu(pod: Pod) -> Iterator[Finding]:
    for container in pod.containers:
        resources = container.spec.get("resources") or {}
        asked, limit = (Decimal(amount((resources.get(s) or {}).get(GPU, 0))) for s in ("requests", "limits"))
        path = f"{container.path}.resources"
        if asked != limit:
            yield Finding(
                pod.name, path, f"{GPU}: {asked} requested, {limit} as limit", "GPUs are given whole: make both equal"
            )
        if not limit:
            continue
        taint = {"key": GPU, "effect": "NoSchedule"}
        if not any(tolerates(t, taint) for t in pod.spec.get("tolerations") or []):
            problem = f"asks for {limit} GPUs and does not tolerate the taint {GPU}"
            remedy = f"add the toleration {{key: {GPU}, operator: Exists, effect: NoSchedule}}"
            yield Finding(pod.name, f"{pod.path}.spec.tolerations", problem, remedy)
        if not pod.spec.get("nodeSelector") and not pod.spec.get("affinity", {}).get("nodeAffinity"):
            problem = "asks for GPUs and names no nodes that have them"
            yield Finding(pod.name, f"{pod.path}.spec.nodeSelector", problem, "Kueue finds the flavour by it: set one")


def tolerates(toleration: dict[str, Any], taint: dict[str, str]) -> bool:
    """Whether a toleration answers a taint; without a value of the taint, whatever its value is."""
    key, effect = toleration.get("key"), toleration.get("effect")
    exists = toleration.get("operator") == "Exists"
    named_so = key == taint["key"] or (key is None and exists)
    same = exists or "value" not in taint or toleration.get("value", "") == taint["value"]
    return named_so and same and effect in {None, taint["effect"]}


def _probes(pod: Pod, container: Container) -> Iterator[Finding]:
    """Of what stands for long. KubeRay gives Ray's containers their probes."""
    if pod.owner["kind"] not in {"Deployment", "StatefulSet"} or ".initContainers[" in container.path:
        return
    for probe in ("readinessProbe", "livenessProbe"):
        if probe not in container.spec:
            yield Finding(pod.name, f"{container.path}.{probe}", "nobody asks whether it works", "add one")


def selected(selector: dict[str, Any] | None, namespace: str, documents: Documents) -> list[Pod]:
    """Pods of a namespace that a selector matches."""
    return [p for p in documents.pods if p.namespace == namespace and selects(selector, p.labels)]
