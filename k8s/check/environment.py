"""What a container finds in its environment, as far as the manifests have it."""

from __future__ import annotations

from k8s.check.documents import Container, Document, Documents, Pod


def variables_of(pod: Pod, container: Container, documents: Documents) -> dict[str, str] | None:
    """Names and values, "" for one that is not in the manifests; None where a ConfigMap of them is not."""
    found: dict[str, str] = {}
    for source in container.spec.get("envFrom") or []:
        name = (source.get("configMapRef") or {}).get("name")
        if name is not None:
            document = documents.find("ConfigMap", name, pod.namespace)
            if document is None:
                return None
            found |= {source.get("prefix", "") + key: value for key, value in (document.get("data") or {}).items()}
    return found | {v["name"]: _value(v, pod, documents) for v in container.spec.get("env") or []}


def _value(variable: Document, pod: Pod, documents: Documents) -> str:
    reference = (variable.get("valueFrom") or {}).get("configMapKeyRef")
    if reference is None:
        return str(variable.get("value", ""))
    document = documents.find("ConfigMap", reference.get("name"), pod.namespace) or {}
    return str((document.get("data") or {}).get(reference.get("key"), ""))
