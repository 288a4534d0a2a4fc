"""Who can reach whom, computed from the NetworkPolicies and held against one table of what must be and may be.

Beside the pods of the manifests there are strangers: a pod without labels in the same namespace, one of another namespace, an
address outside. What the table has and the policies cut is a finding, and what they let through and the table lacks is another.
Who comes in is judged at the target alone: nobody's safety rests on what another may send.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from ipaddress import ip_address, ip_network

from k8s.check.documents import Document, Documents, Pod, selects
from k8s.check.finding import Finding, named

COMPONENT = "app.kubernetes.io/component"
KFP = {"pipelines.kubeflow.org/v2_component": "true"}
ANY_PORT = 40000
"""Stands for the ports that Ray and NCCL choose by themselves."""
RAY_PORTS = (6379, 8265, 10001, 52365, 8080, ANY_PORT)
RAY = ("ray-head", "ray-worker")

FLOWS: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...]], ...] = (
    (RAY, RAY, RAY_PORTS),
    (("ray-submit", "kubeflow step", "kubeflow step here", "kuberay operator"), ("ray-head",), (8265,)),
    ((*RAY, "kubeflow step here"), ("mlflow",), (5000,)),
    (("mlflow",), ("mlflow-postgres",), (5432,)),
    (("ray-head",), ("redis",), (6379,)),
    ((*RAY, "mlflow"), ("object store",), (443,)),
    (("ray-head", "kubeflow step here"), ("kubernetes api",), (443, 6443, 8443)),
    (("kubeflow step here",), ("kubeflow",), (8887, 8888, 9000)),
)
"""Sources, targets, TCP ports: the whole of what may talk. Everything may ask for names besides."""


@dataclass(frozen=True)
class Peer:
    """Somebody who talks or is talked to."""

    actor: str
    """The component, or what a stranger is called."""
    address: str
    namespace: str | None = None
    """None: no pod."""
    labels: tuple[tuple[str, str], ...] = ()
    namespace_labels: tuple[tuple[str, str], ...] = ()
    pod: Pod | None = None
    """None: not of these manifests, and no policy of theirs binds it."""
    ports: tuple[int, ...] = ()
    """That somebody might try."""


def _strangers(namespace: str) -> tuple[list[Peer], list[Peer]]:
    """Who might come, and where one might go."""

    def pod(actor: str, where: str, labels: dict[str, str], *ports: int) -> Peer:
        around = (("kubernetes.io/metadata.name", where),)
        return Peer(actor, "10.244.9.9", where, tuple(labels.items()), around, None, ports)

    both = [
        pod("kubeflow", "kubeflow", {"app": "ml-pipeline"}, 8887, 8888, 9000),
        pod("another namespace", "default", {"app": "anything"}, 80, 8080),
        Peer("the cluster's nodes", "10.0.3.4", ports=(22, 10250)),
    ]
    come = [
        pod("a pod without labels", namespace, {}),
        pod("kubeflow step here", namespace, KFP),
        pod("kubeflow step", "kubeflow", KFP),
        pod("kuberay operator", "kuberay-system", {"app.kubernetes.io/name": "kuberay-operator"}),
        Peer("the internet", "203.0.113.7"),
    ]
    go = [
        Peer("kubernetes api", "10.96.0.1", ports=(443, 6443, 8443)),
        Peer("object store", "203.0.113.7", ports=(443, 25, 80)),
        Peer("the cloud's metadata", "169.254.169.254", ports=(80, 443)),
    ]
    return both + come, both + go


def network_findings(documents: Documents) -> Iterator[Finding]:
    """What is open and should not be, and what is cut and should not be."""
    policies = documents.of("NetworkPolicy")
    around = documents.names("Namespace")
    for namespace in sorted({p.namespace for p in documents.pods}):
        # A set of documents without any policy is a run that is checked without what it runs in.
        own = [p for p in policies if p["metadata"].get("namespace", "default") == namespace]
        if own or namespace in around:
            yield from _findings(list(peers_of(documents, namespace)), own, namespace)


def _findings(mine: list[Peer], policies: list[Document], namespace: str) -> Iterator[Finding]:
    come, go = _strangers(namespace)
    opened: dict[tuple[str, str], set[tuple[str, str, int]]] = defaultdict(set)
    cut: dict[tuple[str, str], set[int]] = defaultdict(set)
    for source in [*mine, *come]:
        for target in [*mine, *go]:
            if target.pod is None and source.namespace != namespace:
                continue
            for port in target.ports:
                out = allowing(policies, source, target, port, "Egress", namespace)
                into = allowing(policies, target, source, port, "Ingress", namespace)
                if not _wanted(source.actor, target.actor, port):
                    for way in into if target.pod else out:
                        opened[way].add((source.actor, target.actor, port))
                elif not (out and into):
                    cut[(source.actor, target.actor)].add(port)
    for (document, path), talk in sorted(opened.items()):
        who = sorted({s for s, _, _ in talk})
        whom = sorted({f"{t}:{'any port' if p == ANY_PORT else p}" for _, t, p in talk})
        problem = f"lets {', '.join(who)} reach {', '.join(whom)}"
        yield Finding(document, path, problem, "say whom and which port, as network.py's table has it")
    remedy = "allow it, out of the one and into the other"
    for (source_actor, target_actor), ports in sorted(cut.items()):
        problem = f"{source_actor} cannot reach {target_actor} on {', '.join(str(p) for p in sorted(ports))}"
        yield Finding(f"Namespace/{namespace}", "networkpolicies", problem, remedy)
    system = (("kubernetes.io/metadata.name", "kube-system"),)
    dns = Peer("names", "10.244.0.2", "kube-system", (("k8s-app", "kube-dns"),), system)
    for peer in mine:
        if not allowing(policies, peer, dns, 53, "Egress", namespace, "UDP"):
            yield Finding(_name(peer), "networkpolicies", "cannot ask for names", "allow UDP 53 to kube-dns")


def _name(peer: Peer) -> str:
    return peer.pod.name if peer.pod else peer.actor


def peers_of(documents: Documents, namespace: str) -> Iterator[Peer]:
    """The pods of the manifests in a namespace."""
    around = {d["metadata"]["name"]: d["metadata"].get("labels") or {} for d in documents.of("Namespace")}
    labels = {"kubernetes.io/metadata.name": namespace} | around.get(namespace, {})
    for pod in documents.pods:
        if pod.namespace == namespace:
            actor = pod.labels.get(COMPONENT, "a pod without labels")
            ports = {p["containerPort"] for c in pod.containers for p in c.spec.get("ports") or []}
            ports |= set(RAY_PORTS) if pod.role in {"head", "worker"} else {ANY_PORT}
            yield Peer(
                actor,
                "10.244.1.1",
                namespace,
                tuple(pod.labels.items()),
                tuple(labels.items()),
                pod,
                tuple(sorted(ports)),
            )


def _wanted(source: str, target: str, port: int) -> bool:
    return any(source in sources and target in targets and port in ports for sources, targets, ports in FLOWS)


def allowing(
    policies: list[Document], bound: Peer, other: Peer, port: int, direction: str, here: str, protocol: str = "TCP"
) -> list[tuple[str, str]]:
    """Document and path of every rule that lets it on the side of `bound`; these policies bind nobody but pods of `here`."""
    if bound.namespace != here:
        return [(bound.actor, direction)]
    key, peers = ("ingress", "from") if direction == "Ingress" else ("egress", "to")
    holding = binding(policies, bound, direction)
    if not holding:
        return [(_name(bound), f"no NetworkPolicy for {direction.lower()}")]
    ports_at = bound if direction == "Ingress" else other
    return [
        (named(policy), f"spec.{key}[{index}]")
        for policy in holding
        for index, rule in enumerate(policy["spec"].get(key) or [])
        if _matches_peer(rule.get(peers), other, policy) and matches_port(rule.get("ports"), port, protocol, ports_at)
    ]


def binding(policies: list[Document], bound: Peer, direction: str) -> list[Document]:
    """Policies of its namespace that say whom a pod may talk to in that direction."""
    return [
        p
        for p in policies
        if selects(p["spec"].get("podSelector"), dict(bound.labels)) and direction in policy_types(p["spec"])
    ]


def policy_types(spec: Document) -> list[str]:
    """The directions that a policy is for, also where it does not say them."""
    return spec.get("policyTypes") or (["Ingress", "Egress"] if "egress" in spec else ["Ingress"])


def _matches_peer(peers: list[Document] | None, other: Peer, policy: Document) -> bool:
    if not peers:
        return True
    for peer in peers:
        if "ipBlock" in peer:
            block = peer["ipBlock"]
            if _within(other.address, block["cidr"]) and not any(
                _within(other.address, e) for e in block.get("except") or []
            ):
                return True
            continue
        if other.namespace is None:
            continue
        if "namespaceSelector" in peer:
            around = selects(peer["namespaceSelector"], dict(other.namespace_labels))
        else:
            around = other.namespace == policy["metadata"].get("namespace", "default")
        if around and ("podSelector" not in peer or selects(peer["podSelector"], dict(other.labels))):
            return True
    return False


@cache
def _within(address: str, block: str) -> bool:
    return ip_address(address) in ip_network(block)


def matches_port(ports: list[Document] | None, port: int, protocol: str, target: Peer) -> bool:
    if not ports:
        return True
    names = {
        p.get("name"): p["containerPort"]
        for c in (target.pod.containers if target.pod else [])
        for p in c.spec.get("ports") or []
    }
    for one in ports:
        if one.get("protocol", "TCP") != protocol:
            continue
        if "port" not in one:
            return True
        first = int(names.get(one["port"], -1) if isinstance(one["port"], str) else one["port"])
        if first <= port <= one.get("endPort", first):
            return True
    return False
