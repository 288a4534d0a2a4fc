"""What the API server refuses: unknown fields, wrong types, versions."""

from __future__ import annotations

from tests.k8s.mistakes.places import Mistake, cluster, group, job, mlflow, worker
from tests.k8s.rendered import one

MISTAKES = (
    Mistake(
        "unknown field of a core kind",
        lambda d: mlflow(d).update(imagePullpolicy="Always"),
        (
            r"^Deployment/mlflow spec.template.spec.containers\[0\]: .*'imagePullpolicy' was unexpected.*1\.34",
            r"^Deployment/mlflow spec.template.spec.containers\[0\]: .*'imagePullpolicy' was unexpected.*1\.37",
        ),
    ),
    Mistake(
        "unknown field of a RayCluster",
        lambda d: cluster(d).update(enableAutoscaling=True),
        (r"^RayCluster/realign spec: .*'enableAutoscaling' was unexpected",),
        by_schema=True,
    ),
    Mistake(
        "unknown field deep in a pod of a RayJob",
        lambda d: job(d)["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"].update(toleration=[]),
        (
            r"^RayJob/realign-run spec.rayClusterSpec.workerGroupSpecs\[0\].template.spec: .*'toleration' was unexpected",
        ),
        by_schema=True,
    ),
    Mistake(
        "wrong type in a RayCluster",
        lambda d: group(d, 0).update(maxReplicas=8.5),
        (r"^RayCluster/realign .*maxReplicas: 8.5 is not of type 'integer'",),
        by_schema=True,
    ),
    Mistake(
        "wrong type of a core kind",
        lambda d: one(d, "Deployment", "mlflow")["spec"].update(replicas="one"),
        (
            r"^Deployment/mlflow spec.replicas: 'one' is not of type .*1\.34",
            r"^Deployment/mlflow spec.replicas: .*1\.37",
        ),
    ),
    Mistake(
        "a value that is no choice",
        lambda d: cluster(d)["autoscalerOptions"].update(upscalingMode="Fast"),
        (r"^RayCluster/realign spec.autoscalerOptions.upscalingMode: 'Fast' is not one of",),
        by_schema=True,
    ),
    Mistake(
        "a Kueue version that nobody serves",
        lambda d: one(d, "LocalQueue", "realign").update(apiVersion="kueue.x-k8s.io/v1"),
        (r"^LocalQueue/realign apiVersion: no CRD .* serves kueue.x-k8s.io/v1 LocalQueue",),
        by_schema=True,
    ),
    Mistake(
        "a core version that is gone",
        lambda d: one(d, "PodDisruptionBudget", "realign-head").update(apiVersion="policy/v1beta1"),
        (
            r"^PodDisruptionBudget/realign-head apiVersion: Kubernetes 1\.34 knows no",
            r"^PodDisruptionBudget/realign-head apiVersion: Kubernetes 1\.37 knows no",
        ),
    ),
    Mistake(
        "a variable twice",
        lambda d: worker(d, 0)["containers"][0]["env"].append({"name": "DS_ACCELERATOR", "value": "cuda"}),
        (r"^RayCluster/realign spec.workerGroupSpecs\[0\].*containers\[0\].env: name DS_ACCELERATOR is there twice",),
        by_schema=True,
    ),
    Mistake(
        "a quota that is no quantity",
        lambda d: one(d, "ClusterQueue", "realign")["spec"]["resourceGroups"][0]["flavors"][0]["resources"][2].update(
            nominalQuota="many"
        ),
        (r"^ClusterQueue/realign .*nominalQuota: 'many' ", r"^all documents queue_findings: could not be read"),
        by_schema=True,
    ),
    Mistake(
        "misspelt metadata",
        lambda d: one(d, "RayCluster", "realign")["metadata"].update(label={"a": "b"}),
        (r"^RayCluster/realign metadata: .*'label' was unexpected",),
        by_schema=True,
    ),
)
