"""NetworkPolicies that let too many in, or cut what must work."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from k8s.check.network import KFP
from tests.k8s.mistakes.places import Documents, Mistake, drop, policy
from tests.k8s.rendered import one


def _submits(peer: dict[str, Any]) -> Callable[[Documents], object]:
    """One more who may submit jobs."""
    return lambda d: policy(d, "ray-jobs")["ingress"][0]["from"].append(peer)


def _sends(cidr: str, *ports: dict[str, Any]) -> Callable[[Documents], object]:
    return lambda d: policy(d, "ray")["egress"].append({"to": [{"ipBlock": {"cidr": cidr}}], "ports": list(ports)})


def _store(url: str) -> Callable[[Documents], object]:
    """An object store that is not public, which the shipped policies let nobody reach."""
    return lambda d: one(d, "ConfigMap", "realign-settings")["data"].update(AWS_ENDPOINT_URL_S3=url)


def _stored_by_ray_alone(of: Documents) -> None:
    _store("http://10.1.2.3:9000")(of)
    _sends("10.1.2.3/32", {"port": 9000})(of)


def _cut(url: str, who: str = "mlflow, ray-head, ray-worker") -> tuple[str, ...]:
    told = rf"data.AWS_ENDPOINT_URL_S3: {re.escape(url)} is no public HTTPS address, and no NetworkPolicy lets {who} reach it"
    return (rf"^ConfigMap/realign-settings {told}; let NetworkPolicy/mlflow and NetworkPolicy/ray send there on",)


NOBODY_SUBMITS = (r"^NetworkPolicy/ray-jobs spec.ingress\[0\].from\[4\]: .* on 8265 is nobody",)
NOBODY_IS_SENT = (r"^NetworkPolicy/ray spec.egress\[3\].to\[0\]: .* is nobody",)
OPEN = {"ports": [{"port": 8265, "protocol": "TCP"}]}

MISTAKES = (
    Mistake(
        "open Ray port",
        lambda d: policy(d, "ray-jobs")["ingress"].append(OPEN),
        (
            r"^NetworkPolicy/ray-jobs spec.ingress\[1\]: lets .*a pod without labels, another namespace.* reach ray-head:8265",
            r"^NetworkPolicy/ray-jobs spec.ingress\[1\]: is for everybody",
        ),
    ),
    Mistake(
        "Ray open to a whole namespace",
        lambda d: policy(d, "ray-jobs")["ingress"][0]["from"].append(
            {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "default"}}}
        ),
        (
            r"^NetworkPolicy/ray-jobs spec.ingress\[0\]: lets another namespace reach ray-head:8265",
            r"^NetworkPolicy/ray-jobs spec.ingress\[0\].from\[4\]: .* on 8265 is nobody",
        ),
    ),
    Mistake(
        "Ray's client port beside its jobs",
        lambda d: policy(d, "ray-jobs")["ingress"][0]["ports"].append({"port": 10001, "protocol": "TCP"}),
        (r"^NetworkPolicy/ray-jobs spec.ingress\[0\]: lets kubeflow step, .*, ray-submit reach ray-head:10001",),
    ),
    Mistake(
        "a range of ports that hides Ray's",
        lambda d: policy(d, "ray-jobs")["ingress"][0].update(ports=[{"port": 6000, "endPort": 9000}]),
        (r"^NetworkPolicy/ray-jobs spec.ingress\[0\]: lets .* reach ray-head:6379, ray-head:8080",),
    ),
    Mistake(
        "an address block that holds the cluster",
        lambda d: policy(d, "ray-jobs")["ingress"][0]["from"].append({"ipBlock": {"cidr": "10.0.0.0/8"}}),
        (
            r"^NetworkPolicy/ray-jobs spec.ingress\[0\]: lets .*the cluster's nodes reach ray-head:8265",
            r"^NetworkPolicy/ray-jobs spec.ingress\[0\].from\[4\]: .*10.0.0.0/8.* is nobody",
        ),
    ),
    Mistake(
        "pods that the deny does not reach",
        lambda d: policy(d, "default-deny").update(podSelector={"matchLabels": {"app": "x"}}),
        (
            r"^NetworkPolicy/default-deny spec.podSelector: selects no pod",
            r"^StatefulSet/\S+ no NetworkPolicy for egress|^NetworkPolicy/|^RayJob/|^RayCronJob/|^Deployment/",
        ),
    ),
    Mistake(
        "a database open to the namespace",
        lambda d: policy(d, "mlflow-postgres")["ingress"][0].update({"from": [{"podSelector": {}}]}),
        (
            r"^NetworkPolicy/mlflow-postgres spec.ingress\[0\]: lets a pod without .*ray-worker.* reach mlflow-postgres:5432",
            r"^NetworkPolicy/mlflow-postgres spec.ingress\[0\].from\[0\]: .* is nobody",
        ),
    ),
    Mistake(
        "workers that send anywhere",
        lambda d: policy(d, "ray")["egress"].append({}),
        (
            r"^NetworkPolicy/ray spec.egress\[3\]: lets .* reach .*object store:25.*the cloud's metadata",
            r"^NetworkPolicy/ray spec.egress\[3\]: is for everybody",
        ),
    ),
    Mistake(
        "the cloud's metadata",
        lambda d: policy(d, "mlflow")["egress"][1]["to"][0]["ipBlock"]["except"].remove("169.254.0.0/16"),
        (
            r"^NetworkPolicy/mlflow spec.egress\[1\]: lets mlflow reach the cloud's metadata:443",
            r"^NetworkPolicy/mlflow spec.egress\[1\].to\[0\]: .* on 443 is nobody",
        ),
    ),
    Mistake(
        "MLflow cut off from Ray",
        lambda d: drop(d, "NetworkPolicy", "mlflow"),
        (
            r"^Namespace/realign networkpolicies: ray-(head|worker) cannot reach mlflow on 5000",
            r"^Namespace/realign networkpolicies: mlflow cannot reach mlflow-postgres on 5432",
            r"^Namespace/realign networkpolicies: mlflow cannot reach object store on 443",
            r"^Namespace/realign networkpolicies: kubeflow step here cannot reach mlflow on 5000",
        ),
    ),
    Mistake(
        "nobody can ask for names",
        lambda d: drop(d, "NetworkPolicy", "dns"),
        (r"^\S+/\S+ networkpolicies: cannot ask for names",),
    ),
    Mistake(
        "a policy with a misspelt label",
        lambda d: policy(d, "redis")["podSelector"]["matchLabels"].update({"app.kubernetes.io/component": "rediss"}),
        (
            r"^NetworkPolicy/redis spec.podSelector: selects no pod",
            r"^Namespace/realign networkpolicies: ray-head cannot reach redis on 6379",
        ),
    ),
    Mistake("jobs from some addresses", _submits({"ipBlock": {"cidr": "198.51.100.0/24"}}), NOBODY_SUBMITS),
    Mistake("jobs from a team", _submits({"namespaceSelector": {"matchLabels": {"team": "b"}}}), NOBODY_SUBMITS),
    Mistake("jobs from a role", _submits({"podSelector": {"matchLabels": {"role": "x"}}}), NOBODY_SUBMITS),
    Mistake(
        "jobs from Kubeflow's steps of any namespace",
        _submits({"namespaceSelector": {}, "podSelector": {"matchLabels": KFP}}),
        NOBODY_SUBMITS,
    ),
    Mistake("every port of some addresses", _sends("8.8.8.0/24"), NOBODY_IS_SENT),
    Mistake("a port that no store has", _sends("8.8.8.0/24", {"port": 443, "endPort": 445}), NOBODY_IS_SENT),
    Mistake("a private address of the workers", _sends("10.1.2.3/32", {"port": 443}), NOBODY_IS_SENT),
    *(
        Mistake(f"a store that is cut off at {url}", _store(url), _cut(url))
        for url in ("https://s3.example.com:9000", "http://s3.example.com")
    ),
    *(
        # The autoscaler's way to the Kubernetes API is open to the head, for all private addresses as shipped.
        Mistake(f"a store that is cut off at {url}", _store(url), _cut(url, "mlflow, (ray-head, )?ray-worker"))
        for url in (
            "https://10.1.2.3",
            "https://s3.corp.local",
            "http://minio.minio.svc:9000",
            "https://minio-0.minio.minio.svc.cluster.local:9000",
            "http://minio:9000",
        )
    ),
    Mistake(
        "a store that Ray alone reaches",
        _stored_by_ray_alone,
        (
            r"^ConfigMap/realign-settings .* lets mlflow reach it; let NetworkPolicy/mlflow send there on port 9000, and",
            *NOBODY_IS_SENT,
        ),
    ),
    Mistake("all addresses of IPv6", _sends("::/0", {"port": 443}), NOBODY_IS_SENT),
)
