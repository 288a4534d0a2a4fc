"""Rendered manifests, and the pods that they lead to."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from k8s.check.finding import named

Document = dict[str, Any]
Role = Literal["head", "worker", "submit", ""]
TEMPLATES = {"Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job"}


def render(overlay: Path) -> list[Document]:
    """What `kubectl apply -k OVERLAY` would send. Raises RuntimeError with kustomize's own words, or without kubectl."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise RuntimeError("kubectl is not on the PATH; it renders the overlays (`kubectl kustomize`)")
    done = subprocess.run([kubectl, "kustomize", str(overlay)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"kubectl kustomize {overlay}: {done.stderr.strip()}")
    return [document for document in yaml.safe_load_all(done.stdout) if document]


@dataclass(frozen=True)
class Container:
    """A container of a pod, with its place in the document."""

    path: str
    spec: Document


@dataclass(frozen=True)
class Pod:
    """A pod that a document leads to, with the labels that it will have."""

    owner: Document
    path: str
    """Of the pod's template in its owner."""
    template: Document
    role: Role = ""
    extra_labels: tuple[tuple[str, str], ...] = ()
    """What KubeRay adds."""
    autoscaler: Container | None = None
    """What KubeRay puts beside Ray in the head, as `autoscalerOptions` says."""

    @property
    def name(self) -> str:
        return named(self.owner)

    @property
    def namespace(self) -> str:
        return str(self.owner["metadata"].get("namespace", "default"))

    @property
    def spec(self) -> Document:
        return self.template.get("spec") or {}

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.extra_labels) | ((self.template.get("metadata") or {}).get("labels") or {})

    @property
    def containers(self) -> list[Container]:
        own = [
            Container(f"{self.path}.spec.{kind}[{index}]", container)
            for kind in ("initContainers", "containers")
            for index, container in enumerate(self.spec.get(kind) or [])
        ]
        return own + ([self.autoscaler] if self.autoscaler else [])


@dataclass(frozen=True)
class RayCluster:
    """A cluster's spec in a RayCluster, a RayJob or a RayCronJob."""

    owner: Document
    path: str
    spec: Document

    @property
    def pods(self) -> Iterator[Pod]:
        name = self.owner["metadata"]["name"]
        # A job's cluster is called after it, with a suffix that nobody knows beforehand.
        cluster = name if self.owner["kind"] == "RayCluster" else f"{name}-xxxxx"
        base = {"ray.io/is-ray-node": "yes", "ray.io/cluster": cluster, "app.kubernetes.io/name": "kuberay"}
        head = self.spec.get("headGroupSpec") or {}
        options = self.spec.get("autoscalerOptions") or {}
        scales = self.spec.get("enableInTreeAutoscaling", False)
        yield Pod(
            self.owner,
            f"{self.path}.headGroupSpec.template",
            head.get("template") or {},
            "head",
            tuple((base | {"ray.io/node-type": "head", "ray.io/group": "headgroup"}).items()),
            Container(f"{self.path}.autoscalerOptions", options) if scales else None,
        )
        for index, group in enumerate(self.spec.get("workerGroupSpecs") or []):
            labels = base | {"ray.io/node-type": "worker", "ray.io/group": str(group.get("groupName"))}
            path = f"{self.path}.workerGroupSpecs[{index}].template"
            yield Pod(self.owner, path, group.get("template") or {}, "worker", tuple(labels.items()))


def job_spec(document: Document) -> tuple[str, Document] | None:
    """Path and spec of a Ray job, None where the document is none."""
    if document["kind"] == "RayJob":
        return "spec", document.get("spec") or {}
    if document["kind"] == "RayCronJob":
        return "spec.jobTemplate", (document.get("spec") or {}).get("jobTemplate") or {}
    return None


def place(document: Document) -> str:
    """The namespace of a document, "" for one of the whole cluster."""
    return str(document["metadata"].get("namespace", ""))


class Documents:
    """Everything that is applied together."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self.all = list(documents)

    def of(self, *kinds: str) -> list[Document]:
        return [d for d in self.all if d["kind"] in kinds]

    def names(self, kind: str, namespace: str | None = None) -> set[str]:
        """Names of that kind; in one namespace, or of any."""
        return {
            d["metadata"]["name"]
            for d in self.of(kind)
            if namespace is None or d["metadata"].get("namespace", "default") == namespace
        }

    def find(self, kind: str, name: str | None, namespace: str) -> Document | None:
        """The document of that kind and name in a namespace."""
        found = (d for d in self.of(kind) if d["metadata"]["name"] == name and place(d) == namespace)
        return next(found, None)

    @cached_property
    def clusters(self) -> list[RayCluster]:
        found = [RayCluster(d, "spec", d.get("spec") or {}) for d in self.of("RayCluster")]
        for document in self.of("RayJob", "RayCronJob"):
            path, spec = job_spec(document) or ("", {})
            if spec.get("rayClusterSpec"):
                found.append(RayCluster(document, f"{path}.rayClusterSpec", spec["rayClusterSpec"]))
        return found

    @cached_property
    def pods(self) -> list[Pod]:
        found = [Pod(d, "spec.template", d["spec"].get("template") or {}) for d in self.all if d["kind"] in TEMPLATES]
        found += [
            Pod(d, "spec.jobTemplate.spec.template", d["spec"]["jobTemplate"]["spec"]["template"])
            for d in self.of("CronJob")
        ]
        found += [Pod(d, "", d) for d in self.of("Pod")]
        for cluster in self.clusters:
            found += cluster.pods
        for document in self.of("RayJob", "RayCronJob"):
            path, spec = job_spec(document) or ("", {})
            if spec.get("submitterPodTemplate"):
                found.append(Pod(document, f"{path}.submitterPodTemplate", spec["submitterPodTemplate"], "submit"))
        return found


def selects(selector: Document | None, labels: dict[str, str]) -> bool:
    """Whether a label selector matches; None matches nothing, {} everything."""
    if selector is None:
        return False
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    return all(_holds(expression, labels) for expression in selector.get("matchExpressions") or [])


def _holds(expression: Document, labels: dict[str, str]) -> bool:
    value, values = labels.get(expression["key"]), expression.get("values") or []
    operator = expression["operator"]
    if operator == "In":
        return value in values
    if operator == "NotIn":
        return value not in values
    return bool((value is not None) == (operator == "Exists"))
