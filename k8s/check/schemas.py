"""Every document against its schema, unknown fields refused: core kinds of two Kubernetes versions, others by their CRDs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from kubernetes_validate.utils import all_versions, schema_contents
from referencing import Registry, Resource

from k8s.check.documents import Document
from k8s.check.finding import Finding, named

Schema = dict[str, Any]
VERSIONS = ("1.34", "1.37")
CUSTOM = {"ray.io", "kueue.x-k8s.io", "pipelines.kubeflow.org", "kubeflow.org"}
"""Groups whose kinds come with an operator; all others are Kubernetes' own."""


def schema_findings(document: Document, crds: Path | None, versions: tuple[str, ...] = VERSIONS) -> Iterator[Finding]:
    """What the API server would refuse. A kind that has no schema is a finding where its CRDs are at hand."""
    if _group(document) in CUSTOM:
        yield from _custom(document, crds)
        return
    for version in versions:
        validator = _core(version, document["kind"], document["apiVersion"])
        if validator is None:
            problem = f"Kubernetes {version} knows no {document['kind']} in {document['apiVersion']}"
            yield Finding(named(document), "apiVersion", problem, "use a version that it serves")
            continue
        yield from _errors(validator, document, f"Kubernetes {version}")


def _group(document: Document) -> str:
    return str(document.get("apiVersion", "")).rpartition("/")[0]


@cache
def _core(version: str, kind: str, api_version: str) -> Draft202012Validator | None:
    group, _, short = api_version.rpartition("/")
    directory = f"kubernetes-json-schema/v{known_versions()[version]}-local-strict"
    name = f"{kind.lower()}-{group.split('.')[0] + '-' if group else ''}{short}.json"
    try:
        schema = schema_contents(f"{directory}/{name}", version)
    except FileNotFoundError:
        return None
    return Draft202012Validator(schema, registry=Resource.from_contents(schema) @ _definitions(version))


@cache
def _definitions(version: str) -> Registry[Any]:
    content = schema_contents(
        f"kubernetes-json-schema/v{known_versions()[version]}-local-strict/_definitions.json", version
    )
    return Resource.from_contents(content) @ Registry()


@cache
def known_versions() -> dict[str, str]:
    """Versions of Kubernetes that have schemas, oldest first: `1.34` -> `1.34.0`."""
    exact = sorted((str(v) for v in all_versions()), key=lambda version: [int(part) for part in version.split(".")])
    return {version.rpartition(".")[0]: version for version in exact}


def _custom(document: Document, crds: Path | None) -> Iterator[Finding]:
    if crds is None:
        return
    # A CRD says nothing of metadata: it is held to that of a core kind.
    bare = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": document.get("metadata")}
    core = _core(VERSIONS[-1], "ConfigMap", "v1")
    assert core is not None
    for finding in _errors(core, bare, "metadata"):
        yield Finding(named(document), finding.path, finding.problem, finding.remedy)
    schema = strict_crds(crds).get((document["apiVersion"], document["kind"]))
    if schema is None:
        problem = f"no CRD of {crds} serves {document['apiVersion']} {document['kind']}"
        yield Finding(named(document), "apiVersion", problem, "use a version that the operator serves")
        return
    yield from _errors(Draft202012Validator(schema), document, "its CRD")
    for path, problem in duplicates(schema, document, ""):
        yield Finding(named(document), path, problem, "give each its own")


def _errors(validator: Draft202012Validator, document: Document, whose: str) -> Iterator[Finding]:
    for error in validator.iter_errors(document):
        path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error.absolute_path).lstrip(".")
        message = error.message if len(error.message) < 300 else error.message[:150] + " … " + error.message[-150:]
        yield Finding(named(document), path or ".", message, f"mend it: the schema of {whose} refuses it")


@cache
def strict_crds(folder: Path) -> dict[tuple[str, str], Schema]:
    """Schemas of served versions by (apiVersion, kind), made to refuse unknown fields."""
    found: dict[tuple[str, str], Schema] = {}
    for crd in _definitions_in(folder):
        spec = crd["spec"]
        for version in spec["versions"]:
            if version.get("served", True):
                key = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
                found[key] = strict(version["schema"]["openAPIV3Schema"])
    return found


def _definitions_in(folder: Path) -> Iterator[Document]:
    """CRDs of a folder's files, one by one or in a List as `kubectl get -o yaml` writes it."""
    for file in sorted(folder.glob("*.yaml")):
        for document in yaml.load_all(file.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            inside = (document or {}).get("items") or [document or {}]
            yield from (one for one in inside if one.get("kind") == "CustomResourceDefinition")


def strict(schema: Schema) -> Schema:
    """A CRD's schema as JSON schema that refuses unknown fields, unless it says to keep them."""
    out = dict(schema)
    if "properties" in out:
        out["properties"] = {name: strict(child) for name, child in out["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(out.get(key), dict):
            out[key] = strict(out[key])
    if out.pop("x-kubernetes-int-or-string", False):
        out.pop("type", None)
        out.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    keeps = out.get("x-kubernetes-preserve-unknown-fields") or out.get("x-kubernetes-embedded-resource")
    if "properties" in out and not keeps:
        out.setdefault("additionalProperties", False)
    if "required" in out:
        # The API server fills defaults in before it looks for what is missing.
        filled = {name for name, child in (schema.get("properties") or {}).items() if "default" in child}
        out["required"] = [name for name in out["required"] if name not in filled]
    if "(?i)" in out.get("pattern", ""):
        out["pattern"] = "(?i)" + out["pattern"].replace("(?i)", "")
    return {"anyOf": [out, {"type": "null"}]} if out.pop("nullable", False) else out


def duplicates(schema: Schema, value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Elements of a list that the API server holds by key (`x-kubernetes-list-type: map`) and that have one key twice."""
    if isinstance(value, dict):
        for key, child in value.items():
            below = (schema.get("properties") or {}).get(key) or schema.get("additionalProperties")
            if isinstance(below, dict):
                yield from duplicates(below, child, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        if schema.get("x-kubernetes-list-type") == "map":
            names = schema["x-kubernetes-list-map-keys"]
            counted = Counter(tuple(str(e.get(n)) for n in names) for e in value if isinstance(e, dict))
            for key in sorted(k for k, n in counted.items() if n > 1):
                yield path, f"{', '.join(names)} {', '.join(key)} is there twice"
        for index, element in enumerate(value):
            yield from duplicates(schema["items"], element, f"{path}[{index}]")
