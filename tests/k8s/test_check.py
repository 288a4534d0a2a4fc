"""The check's own parts against what Kubernetes says of them."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from k8s.check.__main__ import main
from k8s.check.documents import selects
from k8s.check.quantities import amount
from k8s.check.schemas import duplicates, strict, strict_crds
from tests.k8s.rendered import needs_kubectl


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


def test_a_version_without_schemas_is_one_line_that_names_those_there_are(tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path), "--kubernetes", "1.34", "1.99"]) == 2
    said = capsys.readouterr()
    assert re.fullmatch(r"no schemas of Kubernetes 1\.99; there are: 1\.25, .*1\.34, .*\n", said.err)
    assert not said.out


@needs_kubectl
def test_notes_are_told_apart_from_findings(tmp_path: Path, capsys) -> None:
    claim: dict[str, Any] = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "c"}}
    claim["spec"] = {"storageClassName": "shared", "accessModes": ["ReadWriteMany"]}
    (tmp_path / "kustomization.yaml").write_text("resources: [claim.yaml]\n")
    for name, notes in (("shared", 2), ("mine", 1)):
        claim["spec"]["storageClassName"] = name
        (tmp_path / "claim.yaml").write_text(yaml.safe_dump(claim))
        assert main([str(tmp_path)]) == 0
        *lines, last = capsys.readouterr().out.splitlines()
        assert last == f"1 documents: 0 findings; {notes} notes: what only you can know, and no finding"
        assert len(lines) == notes
        assert all(line.startswith("note: ") for line in lines)
        asked = [line for line in lines if "PersistentVolumeClaim/c: the storage class is still called shared" in line]
        assert len(asked) == (name == "shared")


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
