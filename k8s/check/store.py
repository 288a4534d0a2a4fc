"""An object store that is not public: whether the NetworkPolicies let those reach it who read and write there.

Shipped policies let pods out to public addresses on 443 alone. Anywhere else (`AWS_ENDPOINT_URL_S3`) asks for rules of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Literal
from urllib.parse import urlsplit

from k8s.check.documents import Document, Documents, place, selects
from k8s.check.environment import variables_of
from k8s.check.finding import Finding, named
from k8s.check.network import FLOWS, Peer, allowing, binding, matches_port, peers_of
from k8s.check.peers import NAMESPACE, NOT_PUBLIC, asked_labels
from k8s.check.pods import selected

VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL")
INSIDE = (".local", ".internal", ".lan", ".localdomain")
"""Endings of names that no public server has."""
CLIENTS = {actor for sources, targets, _ in FLOWS if "object store" in targets for actor in sources}
Reach = Literal["yes", "perhaps", "no"]


@dataclass(frozen=True)
class Address:
    """Where a store is, and who is told of it."""

    url: str
    document: str
    path: str
    host: str
    port: int
    tls: bool
    namespace: str
    """Of the pods that are told."""

    @property
    def ip(self) -> IPv4Address | IPv6Address | None:
        """None for a name."""
        try:
            return ip_address(self.host)
        except ValueError:
            return None

    @property
    def service(self) -> tuple[str, str] | None:
        """Name and namespace where it is a Service of the cluster."""
        labels = self.host.split(".")
        if self.ip is None and len(labels) == 1:
            return self.host, self.namespace
        at = next((i for i in (2, 3) if labels[i : i + 1] == ["svc"]), None)  # 3: of one of its pods
        return (labels[at - 2], labels[at - 1]) if at is not None else None

    @property
    def perhaps_service(self) -> tuple[str, str] | None:
        """The same where it may as well be a name of the internet: `minio.storage`."""
        labels = self.host.split(".")
        return (labels[0], labels[1]) if self.ip is None and len(labels) == 2 else self.service

    @property
    def private(self) -> bool:
        """Whether its name says that it lies inside the network."""
        return self.service is not None or self.host.endswith(INSIDE)

    @property
    def public(self) -> bool:
        """Whether it is where the shipped policies let everyone out to."""
        seen = self.ip.is_global if self.ip is not None else not self.private
        return seen and self.tls and self.port == 443


def store_findings(documents: Documents) -> Iterator[Finding]:
    """Stores that are cut off from those who are told to use them."""
    for address, reach in _stores(documents).items():
        cut = sorted({peer.actor for peer, how in reach if how == "no"})
        if cut:
            holding = sorted({name for peer, how in reach if how == "no" for name in _to_stores(peer, documents)})
            problem = f"{address.url} is no public HTTPS address, and no NetworkPolicy lets {', '.join(cut)} reach it"
            whose = "its pods' port" if address.service else f"port {address.port}"
            remedy = (
                f"let {' and '.join(holding) or 'one that binds them'} send there on {whose}, and give the store a row in the "
                "tables of network.py and peers.py"
            )
            yield Finding(address.document, address.path, problem, remedy)


def store_notes(documents: Documents) -> Iterator[str]:
    """Stores of which the manifests do not say whether the policies reach them."""
    for address, reach in _stores(documents).items():
        perhaps = sorted({peer.actor for peer, how in reach if how == "perhaps"})
        if perhaps and not any(how == "no" for _, how in reach):
            hangs = "labels and ports of its pods" if address.service else "its address"
            yield f"whether the NetworkPolicies let {', '.join(perhaps)} reach {address.url} hangs on {hangs}: see that they do"


def _stores(documents: Documents) -> dict[Address, list[tuple[Peer, Reach]]]:
    found: dict[Address, list[tuple[Peer, Reach]]] = defaultdict(list)
    for namespace in sorted({pod.namespace for pod in documents.pods}):
        policies = [p for p in documents.of("NetworkPolicy") if place(p) == namespace]
        # Without any policy it is a run that is checked without what it runs in.
        for peer in peers_of(documents, namespace) if policies else ():
            address = _told(peer, documents) if peer.actor in CLIENTS else None
            if address is not None and not address.public:
                found[address].append((peer, _reach(peer, address, policies, documents)))
    return found


def _told(peer: Peer, documents: Documents) -> Address | None:
    pod = peer.pod
    assert pod is not None
    for container in pod.containers:
        variables = variables_of(pod, container, documents) or {}
        for name in (one for one in VARIABLES if variables.get(one)):
            maps = (d for d in documents.of("ConfigMap") if (d.get("data") or {}).get(name) == variables[name])
            where = next(((named(d), f"data.{name}") for d in maps), (pod.name, f"{container.path}.env"))
            return _address(variables[name], *where, pod.namespace)
    return None


def _address(url: str, document: str, path: str, namespace: str) -> Address:
    parts = urlsplit(url if "://" in url else f"//{url}")
    tls = parts.scheme == "https"
    try:
        port = parts.port or (443 if tls else 80)
    except ValueError:
        port = 0  # nobody reaches it there
    return Address(url, document, path, (parts.hostname or "").rstrip("."), port, tls, namespace)


def _to_stores(peer: Peer, documents: Documents) -> Iterator[str]:
    """The policies that let a pod out to public stores: where a store of yours belongs as well."""
    policies = [p for p in documents.of("NetworkPolicy") if place(p) == peer.namespace]
    public = Peer("object store", "203.0.113.7")
    yield from (name for name, _ in allowing(policies, peer, public, 443, "Egress", str(peer.namespace)))


def _reach(peer: Peer, address: Address, policies: list[Document], documents: Documents) -> Reach:
    if address.ip is not None:
        there = Peer("object store", str(address.ip))
        return "yes" if allowing(policies, peer, there, address.port, "Egress", address.namespace) else "no"
    holding = binding(policies, peer, "Egress")
    if not holding:
        return "yes"
    hows = {
        _by_peer(other, rule, address, documents)
        for policy in holding
        for rule in policy["spec"].get("egress") or []
        for other in rule.get("to") or [{}]
    }
    return next(how for how in ("yes", "perhaps", "no") if how in hows or how == "no")


def _by_peer(other: Document, rule: Document, address: Address, documents: Documents) -> Reach:
    """Whether one of those whom a rule names ({}: everybody) is a store that has a name."""
    numbered = matches_port(rule.get("ports"), address.port, "TCP", Peer("object store", ""))
    if not other:
        return "yes" if not rule.get("ports") or (numbered and address.service is None) else "perhaps"
    if "ipBlock" in other:
        numbered |= address.service is not None  # a rule's port is the pods', which a Service may call otherwise
        return "perhaps" if numbered and (not address.private or _holds_private(other["ipBlock"])) else "no"
    service = address.perhaps_service
    if service is None:
        return "no"
    _, namespace = service
    around, pods = (
        other.get("namespaceSelector", {"matchLabels": {NAMESPACE: address.namespace}}),
        other.get("podSelector"),
    )
    if namespace not in (asked_labels(around, NAMESPACE) or {namespace}):
        return "no"
    if _is_for_others(pods, service, documents):
        return "no"
    sure = address.service and selects(around, {NAMESPACE: namespace}) and not pods and not rule.get("ports")
    return "yes" if sure else "perhaps"


def _is_for_others(pods: Document | None, service: tuple[str, str], documents: Documents) -> bool:
    """Whether a selector is for pods of the manifests that are not a Service's own."""
    name, namespace = service
    meant = selected(pods, namespace, documents) if pods else []
    found = documents.find("Service", name, namespace)
    labels = (found.get("spec") or {}).get("selector") if found else None
    if found and not labels:
        return False  # it leads out of the cluster, or to addresses that somebody else writes down
    return bool(meant) and not any(labels and selects({"matchLabels": labels}, pod.labels) for pod in meant)


def _holds_private(block: Document) -> bool:
    network, without = ip_network(block["cidr"]), {ip_network(one) for one in block.get("except") or []}
    return any(network.overlaps(one) and one not in without for one in NOT_PUBLIC)
