"""Whom each rule of a NetworkPolicy names, held to those that network.py's table knows.

`network` tries who is there; a rule may name somebody who is not there yet. So every selector must ask for the labels of one
that the table has, and every address block must lie within one that it has, on that one's ports.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network, ip_network

from k8s.check.documents import Document, Documents, place, selects
from k8s.check.finding import Finding, named
from k8s.check.network import COMPONENT, FLOWS, KFP, policy_types

NAMESPACE = "kubernetes.io/metadata.name"
OUTSIDE: tuple[tuple[str, dict[str, str], tuple[str, ...]], ...] = (
    ("kubeflow", KFP, ("Ingress", "Egress")),
    ("kuberay-system", {"app.kubernetes.io/name": "kuberay-operator"}, ("Ingress",)),
    ("kubeflow", {}, ("Egress",)),
    ("kube-system", {"k8s-app": "kube-dns"}, ("Egress",)),
)
"""Namespace and labels of those in other namespaces, and on which side a rule may name them."""
API = tuple(ip_network(block) for block in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"))
BLOCKS = {"kubernetes api": API}
"""Addresses of FLOWS' targets; a store inside your network has a row in both. Object stores have every public address."""
NOT_PUBLIC = (*API, ip_network("100.64.0.0/10"), ip_network("169.254.0.0/16"))


def peer_findings(documents: Documents) -> Iterator[Finding]:
    """Peers of rules that the table does not have."""
    for policy in documents.of("NetworkPolicy"):
        bound = _bound(policy, documents)
        for direction, key, side in (("Ingress", "ingress", "from"), ("Egress", "egress", "to")):
            rules = (policy["spec"].get(key) or []) if direction in policy_types(policy["spec"]) else []
            for index, rule in enumerate(rules):
                path = f"spec.{key}[{index}]"
                if not rule.get(side):
                    remedy = f"say whom: `{side}` with selectors or blocks that network.py's table has"
                    yield Finding(named(policy), path, "is for everybody", remedy)
                for number, peer in enumerate(rule.get(side) or []):
                    if not _known(peer, rule.get("ports") or [], direction, bound, place(policy)):
                        problem = f"{peer} on {_ports(rule)} is nobody that network.py's table has"
                        remedy = "narrow it to one of these, or add it to the table"
                        yield Finding(named(policy), f"{path}.{side}[{number}]", problem, remedy)


def _ports(rule: Document) -> str:
    return ", ".join(str(port.get("port", "every port")) for port in rule.get("ports") or []) or "every port"


def _bound(policy: Document, documents: Documents) -> set[str]:
    """Actors that a policy binds."""
    selector, here = policy["spec"].get("podSelector"), place(policy)
    bound = {p.labels.get(COMPONENT, "") for p in documents.pods if p.namespace == here and selects(selector, p.labels)}
    return bound | ({"kubeflow step here"} if selects(selector, KFP) else set())


def _known(peer: Document, ports: list[Document], direction: str, bound: set[str], here: str) -> bool:
    if "ipBlock" in peer:
        return direction == "Egress" and any(_may(bound, target, ports) for target in _targets(peer["ipBlock"]))
    pods = peer.get("podSelector")
    where = {here} if "namespaceSelector" not in peer else asked_labels(peer["namespaceSelector"], NAMESPACE)
    if where == {here}:
        actors = {actor for sources, targets, _ in FLOWS for actor in (*sources, *targets)}
        own = asked_labels(pods, COMPONENT)
        return (own is not None and own <= actors) or _asks_for(pods, KFP)
    return any(where == {name} and direction in ways and _asks_for(pods, labels) for name, labels, ways in OUTSIDE)


def asked_labels(selector: Document | None, key: str) -> set[str] | None:
    """The values of a label that a selector takes, None where it takes any."""
    values = {(selector or {}).get("matchLabels", {}).get(key)} - {None}
    for expression in (selector or {}).get("matchExpressions") or []:
        if expression["key"] == key and expression["operator"] == "In":
            values = values & set(expression["values"]) if values else set(expression["values"])
    return values or None


def _asks_for(selector: Document | None, labels: dict[str, str]) -> bool:
    return all(asked_labels(selector, key) == {value} for key, value in labels.items())


def _targets(block: Document) -> Iterator[str]:
    """Which of the table's addresses a block lies within."""
    network, without = ip_network(block["cidr"]), [ip_network(e) for e in block.get("except") or []]
    yield from (target for target, blocks in BLOCKS.items() if any(_within(network, one) for one in blocks))
    closed = (one for one in NOT_PUBLIC if network.overlaps(one))
    if network.version == 4 and all(any(_within(one, e) for e in without) for one in closed):
        yield "object store"


def _within(network: IPv4Network | IPv6Network, other: IPv4Network | IPv6Network) -> bool:
    if isinstance(network, IPv4Network):
        return isinstance(other, IPv4Network) and network.subnet_of(other)
    return isinstance(other, IPv6Network) and network.subnet_of(other)


def _may(bound: set[str], target: str, ports: list[Document]) -> bool:
    """Whether the table lets everyone who is bound reach a target on every port of a rule."""
    asked = [port for one in ports for port in _numbers(one)]
    allowed = [{p for s, t, ps in FLOWS if actor in s and target in t for p in ps} for actor in bound]
    return bool(asked) and all(port in each for port in asked for each in allowed)


def _numbers(port: Document) -> range:
    """Numbers of a rule's port; 0, which the table never has, for every port, a name, or what is not TCP."""
    first = port.get("port")
    if port.get("protocol", "TCP") != "TCP" or not isinstance(first, int):
        return range(1)
    return range(first, port.get("endPort", first) + 1)
