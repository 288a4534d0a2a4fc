"""What documents say of each other: everything that is named is there, and every selector finds somebody."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from k8s.check.documents import Document, Documents, Pod, RayCluster, place, selects
from k8s.check.finding import Finding, named
from k8s.check.pods import selected

SECRETS: dict[str, frozenset[str]] = {
    "realign-ray-token": frozenset({"auth_token"}),
    "realign-mlflow": frozenset({"username", "password", "flask-secret-key"}),
    "mlflow-postgres": frozenset({"password"}),
    "realign-redis": frozenset({"password"}),
    "realign-object-store": frozenset({"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}),
}
"""What you make by the commands in k8s/README.md, with its keys."""
CLUSTERS_OWN = {"kube-root-ca.crt"}
"""ConfigMaps that Kubernetes puts into every namespace."""
OUTSIDE = ({"pipelines.kubeflow.org/v2_component": "true"},)
"""Labels of pods that others make in the namespace."""
_SECRET_NAME = re.compile(r"PASSWORD|PASSWD|TOKEN|SECRET|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE_KEY", re.IGNORECASE)
_IN_URL = re.compile(r"://[^/\s:@]*:[^/\s@$]+@")


def reference_findings(documents: Documents) -> Iterator[Finding]:
    """All rules of this file."""
    for key, count in Counter((d["apiVersion"], named(d), place(d)) for d in documents.all).items():
        if count > 1:
            yield Finding(key[1], "metadata.name", f"defined {count} times", "keep one")
    for pod in documents.pods:
        yield from _named_by(pod, documents)
        yield from _plain_secrets(pod)
    for document in documents.all:
        yield from _kept_secrets(document)
        yield from _selectors(document, documents)
    for cluster in documents.clusters:
        yield from _of_cluster(cluster, documents)
        head = next(cluster.pods)
        budgets = [b["spec"] for b in documents.of("PodDisruptionBudget") if place(b) == head.namespace]
        if not any(selects(budget.get("selector"), head.labels) for budget in budgets):
            remedy = "add one with minAvailable: 1 that selects it"
            yield Finding(head.name, head.path, "no PodDisruptionBudget keeps the head, and the jobs on it", remedy)


def _of_cluster(cluster: RayCluster, documents: Documents) -> Iterator[Finding]:
    who, here = named(cluster.owner), place(cluster.owner)
    token = (cluster.spec.get("authOptions") or {}).get("secretName")
    if token:
        yield from _secret(who, f"{cluster.path}.authOptions.secretName", token, "auth_token", documents, here)
    redis = cluster.spec.get("gcsFaultToleranceOptions") or {}
    path = f"{cluster.path}.gcsFaultToleranceOptions"
    password = ((redis.get("redisPassword") or {}).get("valueFrom") or {}).get("secretKeyRef") or {}
    if password:
        yield from _secret(who, f"{path}.redisPassword", password["name"], password["key"], documents, here)
    if redis:
        yield from _redis(who, f"{path}.redisAddress", str(redis.get("redisAddress", "")), documents, here)


def _redis(who: str, path: str, address: str, documents: Documents, here: str) -> Iterator[Finding]:
    found = re.match(r"^(?:rediss?://)?([^:/]+)(?::(\d+))?", address)
    host, port = found.groups() if found else ("", None)
    services = [d for d in documents.of("Service") if place(d) == here and d["metadata"]["name"] == host.split(".")[0]]
    if not services:
        yield Finding(who, path, f"no Service answers at {address}", "name the Service of Redis")
        return
    there = [p["port"] for p in services[0]["spec"].get("ports") or []]
    if int(port or 6379) not in there:
        problem = f"{named(services[0])} has no port {port or 6379}"
        yield Finding(who, path, problem, f"name one of its ports: {', '.join(str(p) for p in there)}")


def _named_by(pod: Pod, documents: Documents) -> Iterator[Finding]:
    account = pod.spec.get("serviceAccountName")
    if account and account not in documents.names("ServiceAccount", pod.namespace):
        path = f"{pod.path}.spec.serviceAccountName"
        yield Finding(pod.name, path, f"there is no ServiceAccount {account}", "define it, or mend the name")
    for index, volume in enumerate(pod.spec.get("volumes") or []):
        yield from _volume(pod, f"{pod.path}.spec.volumes[{index}]", volume, documents)
    for container in pod.containers:
        for index, source in enumerate(container.spec.get("envFrom") or []):
            path = f"{container.path}.envFrom[{index}]"
            if "configMapRef" in source:
                yield from _config(pod, path, source["configMapRef"], documents)
            if "secretRef" in source and not source["secretRef"].get("optional"):
                yield from _secret(pod.name, path, source["secretRef"]["name"], None, documents, pod.namespace)
        for index, variable in enumerate(container.spec.get("env") or []):
            source = variable.get("valueFrom") or {}
            path = f"{container.path}.env[{index}]"
            if "configMapKeyRef" in source:
                yield from _config(pod, path, source["configMapKeyRef"], documents)
            if "secretKeyRef" in source and not source["secretKeyRef"].get("optional"):
                key = source["secretKeyRef"]
                yield from _secret(pod.name, path, key["name"], key["key"], documents, pod.namespace)


def _volume(pod: Pod, path: str, volume: Document, documents: Documents) -> Iterator[Finding]:
    claim = (volume.get("persistentVolumeClaim") or {}).get("claimName")
    if claim and claim not in documents.names("PersistentVolumeClaim", pod.namespace):
        yield Finding(pod.name, path, f"there is no PersistentVolumeClaim {claim}", "define it, or mend the name")
    sources = [volume, *((volume.get("projected") or {}).get("sources") or [])]
    for source in sources:
        if "configMap" in source:
            yield from _config(pod, path, source["configMap"], documents)
        if "secret" in source and not source["secret"].get("optional"):
            name = source["secret"].get("secretName") or source["secret"].get("name")
            yield from _secret(pod.name, path, name, None, documents, pod.namespace)


def _config(pod: Pod, path: str, reference: Document, documents: Documents) -> Iterator[Finding]:
    name, key = reference.get("name"), reference.get("key")
    if name in CLUSTERS_OWN or reference.get("optional"):
        return
    found = documents.find("ConfigMap", name, pod.namespace)
    if found is None:
        yield Finding(pod.name, path, f"there is no ConfigMap {name}", "define it, or mend the name")
    elif key is not None and key not in (found.get("data") or {}):
        yield Finding(pod.name, path, f"the ConfigMap {name} has no key {key}", "add it, or mend the key")


def _secret(who: str, path: str, name: str, key: str | None, documents: Documents, namespace: str) -> Iterator[Finding]:
    made = SECRETS.get(name)
    if made is None and name not in documents.names("Secret", namespace) | documents.names("ExternalSecret", namespace):
        problem = f"there is no secret {name}, and k8s/README.md makes none"
        yield Finding(who, path, problem, f"known are: {', '.join(sorted(SECRETS))}")
    elif made is not None and key is not None and key not in made:
        yield Finding(who, path, f"the secret {name} has no key {key}", f"it has: {', '.join(sorted(made))}")


def _plain_secrets(pod: Pod) -> Iterator[Finding]:
    for container in pod.containers:
        for index, variable in enumerate(container.spec.get("env") or []):
            value = str(variable.get("value") or "")
            if value and (_SECRET_NAME.search(variable["name"]) or _IN_URL.search(value)):
                problem = f"{variable['name']} holds its value in plain sight"
                yield Finding(pod.name, f"{container.path}.env[{index}].value", problem, "use valueFrom.secretKeyRef")
        for field in ("command", "args"):
            for index, word in enumerate(container.spec.get(field) or []):
                if _IN_URL.search(str(word)):
                    problem = "a URL with its password"
                    yield Finding(pod.name, f"{container.path}.{field}[{index}]", problem, "take it from a secret")


def _kept_secrets(document: Document) -> Iterator[Finding]:
    if document["kind"] == "Secret" and (document.get("data") or document.get("stringData")):
        problem = "a secret's value lies in the manifests"
        yield Finding(named(document), "data", problem, "make it by command, as k8s/README.md says")
    for key, value in (document.get("data") or {}).items() if document["kind"] == "ConfigMap" else ():
        if (_SECRET_NAME.search(key) and "\n" not in str(value)) or _IN_URL.search(str(value)):
            yield Finding(
                named(document), f"data.{key}", "looks like a secret, in plain sight", "move it into a secret"
            )


def _selectors(document: Document, documents: Documents) -> Iterator[Finding]:
    kind, spec = document["kind"], document.get("spec") or {}
    here = place(document)
    if kind == "Service" and spec.get("selector"):
        yield from _service(document, selected({"matchLabels": spec["selector"]}, here, documents))
    if kind == "PodDisruptionBudget":
        yield from _budget(document, selected(spec.get("selector"), here, documents))
    if kind in {"Deployment", "StatefulSet"}:
        labels = ((spec.get("template") or {}).get("metadata") or {}).get("labels") or {}
        if not selects(spec.get("selector"), labels):
            yield Finding(named(document), "spec.selector", "does not match the template's labels", "make them equal")
    if kind == "StatefulSet" and spec.get("serviceName") not in documents.names("Service", here):
        problem = f"there is no Service {spec.get('serviceName')}"
        yield Finding(named(document), "spec.serviceName", problem, "define it, or mend the name")
    others = any(selects(spec.get("podSelector"), labels) for labels in OUTSIDE)
    if kind == "NetworkPolicy" and not others and not selected(spec.get("podSelector"), here, documents):
        yield Finding(named(document), "spec.podSelector", "selects no pod", "mend its labels")


def _service(service: Document, pods: list[Pod]) -> Iterator[Finding]:
    if not pods:
        yield Finding(named(service), "spec.selector", "selects no pod", "mend its labels")
        return
    for index, port in enumerate(service["spec"].get("ports") or []):
        wanted = port.get("targetPort", port["port"])
        for pod in pods:
            open_ports = [p for c in pod.containers for p in c.spec.get("ports") or []]
            if not any(wanted in (p.get("name"), p["containerPort"]) for p in open_ports):
                problem = f"{pod.name} has no port {wanted}"
                yield Finding(named(service), f"spec.ports[{index}].targetPort", problem, "name one of its ports")


def _budget(budget: Document, pods: list[Pod]) -> Iterator[Finding]:
    if not pods:
        yield Finding(named(budget), "spec.selector", "selects no pod: it protects nothing", "mend its labels")
    least = budget["spec"].get("minAvailable")
    if any(pod.role for pod in pods) and not isinstance(least, int):
        problem = "Kubernetes cannot count what a Ray cluster should have, and lets no pod go or all of them"
        yield Finding(named(budget), "spec.minAvailable", problem, "give minAvailable as a whole number")
