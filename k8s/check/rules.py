"""All rules over one set of documents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from k8s.check.documents import Document, Documents
from k8s.check.finding import Finding, named
from k8s.check.network import network_findings
from k8s.check.peers import peer_findings
from k8s.check.pods import pod_findings
from k8s.check.programs import program_findings
from k8s.check.queues import queue_findings
from k8s.check.ray import ray_findings
from k8s.check.references import reference_findings
from k8s.check.schemas import VERSIONS, schema_findings
from k8s.check.services import service_findings
from k8s.check.store import store_findings, store_notes

RULES = (
    pod_findings,
    ray_findings,
    reference_findings,
    queue_findings,
    network_findings,
    peer_findings,
    service_findings,
    program_findings,
    store_findings,
)


def check(documents: list[Document], crds: Path | None = None, versions: tuple[str, ...] = VERSIONS) -> list[Finding]:
    """Everything that is wrong with what is applied together. The rules see what a schema refuses as far as it can be read."""
    found = {f for document in documents for f in schema_findings(document, crds, versions)}
    whole = Documents(documents)
    for rule in RULES:
        try:
            found.update(rule(whole))
        except (TypeError, AttributeError, KeyError, ValueError, IndexError) as error:
            if not found:
                raise
            problem = f"could not be read to the end ({type(error).__name__}: {error})"
            found.add(Finding("all documents", rule.__name__, problem, "mend what the schemas refuse first"))
    return sorted(found)


def notes(documents: list[Document]) -> Iterator[str]:
    """What is yours to fill in before you apply: right in form, and nobody's yet."""
    text = str(documents)
    images = {c.spec.get("image") for p in Documents(documents).pods for c in p.containers}
    for image in sorted(i for i in images if i and i.endswith("0" * 64)):
        yield f"{image.partition('@')[0]} has the placeholder digest: put yours into the overlay's site"
    if "example-bucket" in text:
        yield "the object store is s3://example-bucket: put yours into settings.env"
    claims = Documents(documents).of("PersistentVolumeClaim")
    placeholders = sorted(named(d) for d in claims if (d.get("spec") or {}).get("storageClassName") == "shared")
    if placeholders:
        yield f"{', '.join(placeholders)}: the storage class is still called shared: put yours into the overlay's settings"
    yield from store_notes(Documents(documents))
    for policy in Documents(documents).of("NetworkPolicy"):
        peers = [peer for rule in policy["spec"].get("egress") or [] for peer in rule.get("to") or []]
        if any((peer.get("ipBlock") or {}).get("cidr") == "10.0.0.0/8" for peer in peers):
            name = policy["metadata"]["name"]
            yield f"NetworkPolicy/{name} lets out to all private addresses: narrow it to that of your Kubernetes API"
