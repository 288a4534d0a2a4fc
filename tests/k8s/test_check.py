"""The check's own parts against what Kubernetes says of them."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from k8s.check import check, peers
from k8s.check.__main__ import main
from k8s.check.cron import shortest
from k8s.check.documents import Documents, selects
from k8s.check.network import COMPONENT, network_findings
from k8s.check.peers import peer_findings
from k8s.check.quantities import amount
from k8s.check.schemas import duplicates, strict, strict_crds


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("500m", "0.5"),
        ("2", "2"),
        ("1Gi", "1073741824"),
        ("1G", "1000000000"),
        ("1.5Ki", "1536"),
        ("2e3", "2000"),
        (8, "8"),
    ],
)
def test_quantities_are_what_kubernetes_takes_them_for(text: object, number: str) -> None:
    assert amount(text) == Decimal(number)


@pytest.mark.parametrize("text", ["many", "1GB", "", "0x10"])
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no quantity"):
        amount(text)


def test_selectors() -> None:
    labels = {"a": "1", "b": "2"}
    assert selects({}, labels)
    assert not selects(None, labels)
    assert selects({"matchLabels": {"a": "1"}}, labels)
    assert not selects({"matchLabels": {"a": "1", "c": "3"}}, labels)
    for operator, values, matches in (
        ("In", ["1", "9"], True),
        ("In", ["9"], False),
        ("NotIn", ["1"], False),
        ("NotIn", ["9"], True),
        ("Exists", None, True),
        ("DoesNotExist", None, False),
    ):
        expression = {"key": "a", "operator": operator} | ({"values": values} if values else {})
        assert selects({"matchExpressions": [expression]}, labels) is matches, operator
    assert selects({"matchExpressions": [{"key": "c", "operator": "NotIn", "values": ["1"]}]}, labels)


def test_a_crd_is_made_strict() -> None:
    schema = strict(
        {
            "type": "object",
            "required": ["size", "name"],
            "properties": {
                "name": {"type": "string"},
                "size": {"type": "integer", "default": 1},
                "port": {"x-kubernetes-int-or-string": True},
                "note": {"type": "string", "nullable": True},
                "free": {"type": "object", "properties": {}, "x-kubernetes-preserve-unknown-fields": True},
                "any": {"type": "object", "additionalProperties": {"type": "string"}},
                "unit": {"type": "string", "pattern": "^(?i)gib$"},
            },
        }
    )
    good = {"name": "a", "port": "http", "note": None, "free": {"x": 1}, "any": {"k": "v"}, "unit": "GiB"}
    jsonschema.Draft202012Validator(schema).validate(good)
    for wrong in (
        {},
        {"name": "a", "nmae": 1},
        {"name": "a", "port": 1.5},
        {"name": "a", "any": {"k": 1}},
        {"name": None},
    ):
        assert not jsonschema.Draft202012Validator(schema).is_valid(wrong), wrong


def test_crds_are_read_one_by_one_and_in_lists(tmp_path: Path) -> None:
    def crd(kind: str) -> dict[str, Any]:
        schema = {"openAPIV3Schema": {"type": "object", "properties": {"spec": {"type": "object"}}}}
        versions = [{"name": "v1", "served": True, "schema": schema}, {"name": "v0", "served": False, "schema": schema}]
        return {
            "kind": "CustomResourceDefinition",
            "spec": {"group": "g.io", "names": {"kind": kind}, "versions": versions},
        }

    (tmp_path / "a.yaml").write_text(yaml.safe_dump_all([crd("A"), crd("B")]))
    (tmp_path / "b.yaml").write_text(yaml.safe_dump({"kind": "List", "items": [crd("C")]}))
    assert set(strict_crds(tmp_path)) == {("g.io/v1", kind) for kind in "ABC"}


def test_an_overlay_that_cannot_be_rendered_says_why(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["k8s.check", str(tmp_path)])
    assert main() == 2
    assert "kubectl" in capsys.readouterr().err


def test_elements_that_are_held_by_key_must_differ() -> None:
    keyed = {
        "type": "array",
        "items": {},
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["name", "port"],
    }
    schema = {"properties": {"ports": keyed}}
    ports = [{"name": "a", "port": 1}, {"name": "a", "port": 2}, {"name": "a", "port": 1}]
    assert list(duplicates(schema, {"ports": ports}, "")) == [("ports", "name, port a, 1 is there twice")]
    assert list(duplicates(schema, {"ports": ports[:2]}, "")) == []


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


@pytest.mark.parametrize(
    ("schedule", "hours"),
    [
        ("0 2 * * 6", 7 * 24),
        ("@hourly", 1),
        ("@every 1h30m", 1.5),
        ("*/15 * * * *", 0.25),
        ("0 22,2 * * *", 4),
        ("0 0 1 * *", 28 * 24),
        ("0 0 1 * mon", 24),
        ("30 8-18/5 * * MON-FRI", 5),
        ("0 0 29 2 *", 4 * 365.25 * 24),
    ],
)
def test_the_shortest_time_between_two_starts(schedule: str, hours: float) -> None:
    assert shortest(schedule) == timedelta(hours=hours)


@pytest.mark.parametrize(
    "schedule", ["0 2 * *", "61 * * * *", "a * * * *", "* * * * 1-", "@every day", "*/0 * * * *", ""]
)
def test_what_is_no_schedule_is_refused(schedule: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        shortest(schedule)


def test_a_store_inside_the_network_has_a_row_in_both_tables(monkeypatch) -> None:
    rule = _out({"to": [{"ipBlock": {"cidr": "10.1.2.3/32"}}], "ports": [{"port": 9000}]})
    said = Documents([_pod("server", "mlflow", 5000), rule])
    assert len(list(peer_findings(said))) == 1
    monkeypatch.setattr(peers, "FLOWS", (*peers.FLOWS, (("mlflow",), ("our store",), (9000,))))
    monkeypatch.setitem(peers.BLOCKS, "our store", (ip_network("10.1.2.0/24"),))
    assert list(peer_findings(said)) == []
