"""Who reaches whom, of small sets of pods and policies."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import pytest

from k8s.check import check, peers
from k8s.check.documents import Documents
from k8s.check.network import COMPONENT, network_findings
from k8s.check.peers import NAMESPACE, NOT_PUBLIC, peer_findings
from k8s.check.store import store_findings, store_notes


def _pod(name: str, component: str, port: int) -> dict[str, Any]:
    ports = [{"name": "main", "containerPort": port}]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "n", "labels": {"app.kubernetes.io/component": component}},
        "spec": {"containers": [{"name": "c", "ports": ports}]},
    }


def _policy(name: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": "n"},
        "spec": spec,
    }


DENY = _policy("deny", podSelector={}, policyTypes=["Ingress", "Egress"])
DATABASE = {"matchLabels": {"app.kubernetes.io/component": "mlflow-postgres"}}
MLFLOW = {"podSelector": {"matchLabels": {"app.kubernetes.io/component": "mlflow"}}}


def _said(*policies: dict[str, Any]) -> set[str]:
    pods = [_pod("db", "mlflow-postgres", 5432), _pod("server", "mlflow", 5000)]
    found = network_findings(Documents([*pods, *policies]))
    return {f"{f.document} {f.path}: {f.problem}" for f in found if f.problem != "cannot ask for names"}


def _to_database(said: set[str]) -> set[str]:
    return {line for line in said if "postgres" in line}


def _out(rule: dict[str, Any]) -> dict[str, Any]:
    return _policy("out", podSelector=MLFLOW["podSelector"], policyTypes=["Egress"], egress=[rule])


@pytest.mark.parametrize(
    "port", [{"port": 5432}, {"port": "main"}, {"port": 5000, "endPort": 6000}, {"protocol": "TCP", "port": 5432}]
)
def test_a_port_is_reached_by_number_by_name_and_by_range(port: dict[str, Any]) -> None:
    into = _policy("in", podSelector=DATABASE, ingress=[{"from": [MLFLOW], "ports": [port]}])
    assert _to_database(_said(DENY, into, _out({"to": [{"podSelector": DATABASE}], "ports": [port]}))) == set()


def test_both_ends_must_let_it() -> None:
    cut = "Namespace/n networkpolicies: mlflow cannot reach mlflow-postgres on 5432"
    into = _policy("in", podSelector=DATABASE, ingress=[{"from": [MLFLOW], "ports": [{"port": 5432}]}])
    out = _out({"to": [{"podSelector": DATABASE}]})
    assert _to_database(_said(DENY)) == _to_database(_said(DENY, into)) == _to_database(_said(DENY, out)) == {cut}
    assert _to_database(_said(DENY, into, out)) == set()
    assert _to_database(
        _said(DENY, _policy("in", podSelector=DATABASE, ingress=[{"from": [MLFLOW], "ports": [{"port": 1}]}]), out)
    ) >= {cut}


def test_udp_does_not_open_tcp_and_exceptions_stay_closed() -> None:
    udp = _policy("in", podSelector=DATABASE, ingress=[{"ports": [{"protocol": "UDP", "port": 5432}]}])
    assert not any("lets" in line for line in _said(DENY, udp))
    block = {"cidr": "0.0.0.0/0", "except": ["10.0.0.0/8", "203.0.113.0/24", "169.254.0.0/16"]}
    assert not any(
        "lets" in line
        for line in _said(DENY, _policy("in", podSelector=DATABASE, ingress=[{"from": [{"ipBlock": block}]}]))
    )
    block = {"cidr": "0.0.0.0/0", "except": ["10.0.0.0/8"]}
    opened = _said(DENY, _policy("in", podSelector=DATABASE, ingress=[{"from": [{"ipBlock": block}]}]))
    assert {line for line in opened if "lets" in line} == {
        "NetworkPolicy/in spec.ingress[0]: lets the internet reach mlflow-postgres:5432, mlflow-postgres:any port"
    }


def test_a_pod_that_no_policy_binds_is_open() -> None:
    only_out = _policy("out", podSelector={}, policyTypes=["Egress"])
    assert any(line.startswith("Pod/db no NetworkPolicy for ingress: lets") for line in _said(only_out))


def test_a_selector_of_pods_and_namespaces_means_both() -> None:
    both = {"namespaceSelector": {}, "podSelector": MLFLOW["podSelector"]}
    assert not any(
        "lets" in line
        for line in _said(
            DENY, _policy("in", podSelector=DATABASE, ingress=[{"from": [both], "ports": [{"port": 5432}]}])
        )
    )
    either = [{"namespaceSelector": {}}, MLFLOW]
    opened = _said(DENY, _policy("in", podSelector=DATABASE, ingress=[{"from": either, "ports": [{"port": 5432}]}]))
    assert any("another namespace" in line for line in opened)


def test_a_document_that_cannot_be_read_does_not_hide_the_others() -> None:
    broken = _pod("db", "mlflow-postgres", 5432)
    broken["spec"]["containers"] = "none"
    said = [str(f) for f in check([broken, _pod("server", "mlflow", 5000)])]
    assert any(line.startswith("Pod/db spec.containers: 'none' is not of type") for line in said)
    assert any("could not be read to the end" in line for line in said)


@pytest.mark.parametrize(
    "peer",
    [
        {"podSelector": {"matchLabels": {"app.kubernetes.io/component": "mlflow", "more": "x"}}},
        {"podSelector": {"matchExpressions": [{"key": COMPONENT, "operator": "In", "values": ["ray-head", "redis"]}]}},
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kubeflow"}}},
        {"ipBlock": {"cidr": "8.8.8.0/24"}},
    ],
)
def test_a_rule_may_name_less_than_the_table_has(peer: dict[str, Any]) -> None:
    rule = _out({"to": [peer], "ports": [{"port": 443}]})
    assert list(peer_findings(Documents([_pod("server", "mlflow", 5000), rule]))) == []
    into = _policy("in", podSelector=MLFLOW["podSelector"], ingress=[{"from": [peer]}])
    found = list(peer_findings(Documents([_pod("server", "mlflow", 5000), into])))
    assert len(found) == ("podSelector" not in peer)


def test_a_store_inside_the_network_has_a_row_in_both_tables(monkeypatch) -> None:
    rule = _out({"to": [{"ipBlock": {"cidr": "10.1.2.3/32"}}], "ports": [{"port": 9000}]})
    said = Documents([_pod("server", "mlflow", 5000), rule])
    assert len(list(peer_findings(said))) == 1
    monkeypatch.setattr(peers, "FLOWS", (*peers.FLOWS, (("mlflow",), ("our store",), (9000,))))
    monkeypatch.setitem(peers.BLOCKS, "our store", (ip_network("10.1.2.0/24"),))
    assert list(peer_findings(said)) == []


SERVICE = "http://minio.minio.svc:9000"
PUBLIC = {"cidr": "0.0.0.0/0", "except": [str(block) for block in NOT_PUBLIC]}


def _namespace(**labels: str) -> dict[str, Any]:
    return {"namespaceSelector": {"matchLabels": labels}}


@pytest.mark.parametrize(
    ("url", "peer", "port", "reached"),
    [
        (SERVICE, _namespace(**{NAMESPACE: "minio"}), None, "yes"),
        (SERVICE, _namespace(**{NAMESPACE: "minio"}), 9000, "perhaps"),
        (
            SERVICE,
            _namespace(**{NAMESPACE: "minio"}) | {"podSelector": {"matchLabels": {"app": "minio"}}},
            None,
            "perhaps",
        ),
        (SERVICE, _namespace(**{NAMESPACE: "other"}), None, "no"),
        (SERVICE, _namespace(team="storage"), None, "perhaps"),
        (SERVICE, {"podSelector": {}}, None, "no"),
        (SERVICE, {"ipBlock": {"cidr": "10.0.0.0/8"}}, 9000, "perhaps"),
        (SERVICE, {"ipBlock": {"cidr": "10.0.0.0/8"}}, 443, "perhaps"),
        (SERVICE, None, None, "yes"),
        ("http://minio.minio:9000", _namespace(**{NAMESPACE: "minio"}), None, "perhaps"),
        ("http://minio.minio:9000", _namespace(**{NAMESPACE: "other"}), None, "no"),
        ("http://store:9000", {"podSelector": {}}, None, "yes"),
        ("http://store:9000", {"podSelector": DATABASE}, 5432, "perhaps"),
        ("http://store:9000", {"podSelector": {"matchLabels": {COMPONENT: "mlflow"}}}, 9000, "no"),
        ("http://mlflow-postgres.n.svc:9000", {"podSelector": DATABASE}, 9000, "no"),
        ("https://s3.corp.local", {"ipBlock": PUBLIC}, 443, "no"),
        ("https://s3.corp.local", {"ipBlock": {"cidr": "10.1.0.0/16"}}, 443, "perhaps"),
        ("https://s3.example.com:9000", {"ipBlock": PUBLIC}, 9000, "perhaps"),
        ("https://s3.example.com:9000", {"ipBlock": PUBLIC}, 443, "no"),
        ("https://s3.example.com", {"podSelector": DATABASE}, 5432, "yes"),
        ("http://10.1.2.3:9000", {"ipBlock": {"cidr": "10.1.0.0/16"}}, 9000, "yes"),
        ("http://10.1.2.3:9000", {"ipBlock": {"cidr": "10.1.0.0/16"}}, 9001, "no"),
        ("http://10.1.2.3:no", {"ipBlock": {"cidr": "10.1.0.0/16"}}, 9000, "no"),
    ],
)
def test_whether_a_policy_lets_a_store_be_reached(
    url: str, peer: dict[str, Any] | None, port: int | None, reached: str
):
    server, database = _pod("server", "mlflow", 5000), _pod("db", "mlflow-postgres", 5432)
    server["spec"]["containers"][0]["env"] = [{"name": "AWS_ENDPOINT_URL_S3", "value": url}]
    service = {"kind": "Service", "metadata": {"name": "store", "namespace": "n"}}
    service["spec"] = {"selector": DATABASE["matchLabels"]}
    rule = ({"to": [peer]} if peer is not None else {}) | ({"ports": [{"port": port}]} if port else {})
    whole = Documents([server, database, service, DENY, _out(rule)])
    assert len(list(store_findings(whole))) == (reached == "no")
    assert len(list(store_notes(whole))) == (reached == "perhaps")


def test_a_service_without_pods_of_its_own_may_be_reached() -> None:
    server = _pod("server", "mlflow", 5000)
    server["spec"]["containers"][0]["env"] = [{"name": "AWS_ENDPOINT_URL_S3", "value": "http://minio:9000"}]
    out = _policy("out", podSelector={}, egress=[{"to": [{"podSelector": {"matchLabels": {COMPONENT: "mlflow"}}}]}])
    away = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "minio", "namespace": "n"}, "spec": {}}
    away["spec"] = {"type": "ExternalName", "externalName": "minio.example.com"}
    whole = Documents([server, out, away])
    assert list(store_findings(whole)) == []
    assert len(list(store_notes(whole))) == 1


def test_a_store_of_pods_that_nothing_binds_is_reached() -> None:
    server = _pod("server", "mlflow", 5000)
    server["spec"]["containers"][0]["env"] = [{"name": "AWS_ENDPOINT_URL_S3", "value": SERVICE}]
    into = _policy("in", podSelector={}, ingress=[])
    assert [*store_findings(Documents([server, into])), *store_notes(Documents([server, into]))] == []
    assert len(list(store_findings(Documents([server, DENY])))) == 1
