"""MLflow's server: who may talk to it, and under which name."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from k8s.check.documents import Container, Documents, Pod
from k8s.check.finding import Finding, named


def service_findings(documents: Documents) -> Iterator[Finding]:
    """Rules for containers that run `mlflow server`, and for the address that clients are given."""
    hosts: set[str] = set()
    for pod in documents.pods:
        for container in pod.containers:
            words = [*(container.spec.get("command") or []), *(container.spec.get("args") or [])]
            if words[:2] == ["mlflow", "server"]:
                options = dict(word.partition("=")[::2] for word in words if word.startswith("--"))
                hosts |= set(options.get("--allowed-hosts", "").split(","))
                yield from _server(pod, container, options)
    for document in documents.of("ConfigMap") if hosts else []:
        uri = (document.get("data") or {}).get("MLFLOW_TRACKING_URI")
        if uri and urlsplit(uri).netloc not in hosts and "*" not in hosts:
            problem = f"the server answers 403 to {urlsplit(uri).netloc}, which --allowed-hosts does not have"
            yield Finding(named(document), "data.MLFLOW_TRACKING_URI", problem, "add it there, with its port")


def _server(pod: Pod, container: Container, options: dict[str, str]) -> Iterator[Finding]:
    path = f"{container.path}.args"
    if options.get("--app-name") != "basic-auth":
        yield Finding(pod.name, path, "MLflow asks nobody for a password", "add --app-name=basic-auth")
    if "*" in options.get("--allowed-hosts", "*").split(","):
        yield Finding(pod.name, path, "MLflow checks no host names", "list them with --allowed-hosts")
    if not options.get("--artifacts-destination"):
        yield Finding(pod.name, path, "artifacts would lie in the pod", "add --artifacts-destination=s3://…")
