"""Pods that are open, unbounded, mutable or not whole."""

from __future__ import annotations

from tests.k8s.mistakes.places import Mistake, cluster, group, head, mlflow, worker
from tests.k8s.rendered import one

MISTAKES = (
    Mistake(
        "missing volume",
        lambda d: worker(d, 0)["volumes"].pop(0),
        (r"^RayCluster/realign spec.workerGroupSpecs\[0\].*volumeMounts\[0\].name: mounts the volume workspace",),
    ),
    Mistake(
        "privileged pod",
        lambda d: mlflow(d)["securityContext"].update(privileged=True),
        (r"^Deployment/mlflow .*securityContext.privileged: the container is privileged",),
    ),
    Mistake(
        "privileged autoscaler",
        lambda d: cluster(d)["autoscalerOptions"]["securityContext"].update(privileged=True),
        (r"^RayCluster/realign spec.autoscalerOptions.securityContext.privileged: ",),
    ),
    Mistake(
        "root",
        lambda d: head(d)["securityContext"].update(runAsUser=0),
        (
            r"^RayCluster/realign .*headGroupSpec.*securityContext.runAsUser: the container runs as root",
            r"^RayCluster/realign spec.autoscalerOptions.securityContext.runAsUser: the container runs as root",
        ),
    ),
    Mistake(
        "no seccomp profile",
        lambda d: one(d, "StatefulSet", "mlflow-postgres")["spec"]["template"]["spec"]["securityContext"].pop(
            "seccompProfile"
        ),
        (r"^StatefulSet/mlflow-postgres .*securityContext.seccompProfile: no seccomp profile",),
    ),
    Mistake(
        "capabilities kept",
        lambda d: mlflow(d)["securityContext"]["capabilities"].clear(),
        (r"^Deployment/mlflow .*capabilities.drop: capabilities are not dropped",),
    ),
    Mistake(
        "capabilities added",
        lambda d: worker(d, 1)["containers"][0]["securityContext"]["capabilities"].update(add=["SYS_ADMIN"]),
        (r"^RayCluster/realign spec.workerGroupSpecs\[1\].*capabilities.add: capabilities are added: SYS_ADMIN",),
    ),
    Mistake(
        "escalation",
        lambda d: worker(d, 1)["containers"][0]["securityContext"].pop("allowPrivilegeEscalation"),
        (r"^RayCluster/realign spec.workerGroupSpecs\[1\].*allowPrivilegeEscalation: ",),
    ),
    Mistake(
        "the node's files",
        lambda d: worker(d, 0)["volumes"].append({"name": "node", "hostPath": {"path": "/"}}),
        (r"^RayCluster/realign spec.workerGroupSpecs\[0\].template.spec.volumes\[5\].hostPath: ",),
    ),
    Mistake(
        "the node's network",
        lambda d: worker(d, 1).update(hostNetwork=True),
        (r"^RayCluster/realign spec.workerGroupSpecs\[1\].template.spec.hostNetwork: ",),
    ),
    Mistake(
        "a namespace that lets all in",
        lambda d: one(d, "Namespace", "realign")["metadata"]["labels"].pop("pod-security.kubernetes.io/enforce"),
        (r"^Namespace/realign metadata.labels.*enforce: pod security enforce is None",),
    ),
    Mistake(
        "IPC_LOCK in a restricted namespace",
        lambda d: one(d, "Namespace", "realign")["metadata"]["labels"].update(
            {"pod-security.kubernetes.io/enforce": "restricted"}
        ),
        (r"^Namespace/realign .*adds IPC_LOCK, which restricted",),
        "gpu-rdma",
    ),
    Mistake(
        "a token for everybody",
        lambda d: worker(d, 0).pop("automountServiceAccountToken"),
        (r"^RayCluster/realign spec.workerGroupSpecs\[0\].*automountServiceAccountToken: every container",),
    ),
    Mistake(
        "mutable image tag",
        lambda d: mlflow(d).update(image="ghcr.io/mlflow/mlflow:v3.17.2-full"),
        (r"^Deployment/mlflow .*image: ghcr.io/mlflow/mlflow:v3.17.2-full can change",),
    ),
    Mistake(
        "no limits",
        lambda d: one(d, "StatefulSet", "realign-redis")["spec"]["template"]["spec"]["containers"][0]["resources"].pop(
            "limits"
        ),
        (r"^StatefulSet/realign-redis .*resources.limits: no cpu and no memory given",),
    ),
    Mistake(
        "GPUs without toleration",
        lambda d: worker(d, 1).pop("tolerations"),
        (r"^RayCluster/realign spec.workerGroupSpecs\[1\].template.spec.tolerations: asks for 8 GPUs",),
    ),
    Mistake(
        "GPUs requested and not limited",
        lambda d: worker(d, 2)["containers"][0]["resources"]["requests"].pop("nvidia.com/gpu"),
        (r"^RayCluster/realign spec.workerGroupSpecs\[2\].*nvidia.com/gpu: 0 requested, 1 as limit",),
    ),
    Mistake(
        "shared memory above the limit",
        lambda d: worker(d, 0)["volumes"][4]["emptyDir"].update(sizeLimit="64Gi"),
        (
            r"^RayCluster/realign spec.workerGroupSpecs\[0\].*sizeLimit: /dev/shm of 64Gi is not less than .* limit 48Gi",
        ),
    ),
    Mistake(
        "shared memory on the disk",
        lambda d: worker(d, 0)["volumes"][4]["emptyDir"].pop("medium"),
        (r"^RayCluster/realign spec.workerGroupSpecs\[0\].*/dev/shm is no bounded memory",),
    ),
    Mistake(
        "an object store larger than shared memory",
        lambda d: group(d, 0)["rayStartParams"].update({"object-store-memory": "9000000000"}),
        (r"^RayCluster/realign spec.workerGroupSpecs\[0\].*object-store-memory: .* does not fit /dev/shm of 8Gi",),
    ),
    Mistake(
        "nobody asks", lambda d: mlflow(d).pop("livenessProbe"), (r"^Deployment/mlflow .*livenessProbe: nobody asks",)
    ),
    Mistake(
        "the namespace's default account",
        lambda d: worker(d, 0).pop("serviceAccountName"),
        (
            r"^RayCluster/realign spec.workerGroupSpecs\[0\].*serviceAccountName: the pod runs as the namespace's default",
        ),
    ),
    Mistake(
        "files of the image that can be changed",
        lambda d: mlflow(d)["securityContext"].update(readOnlyRootFilesystem=False),
        (r"^Deployment/mlflow .*readOnlyRootFilesystem: the image's files",),
    ),
    Mistake(
        "a port of the node",
        lambda d: mlflow(d)["ports"][0].update(hostPort=5000),
        (r"^Deployment/mlflow .*ports\[0\].hostPort: opens a port of the node",),
    ),
    Mistake(
        "two volumes in one place",
        lambda d: mlflow(d)["volumeMounts"].append({"name": "auth", "mountPath": "/tmp"}),
        (r"^Deployment/mlflow .*volumeMounts\[2\].mountPath: /tmp is mounted twice",),
    ),
    Mistake(
        "no shared memory",
        lambda d: worker(d, 0)["containers"][0]["volumeMounts"].pop(3),
        (r"^RayCluster/realign spec.workerGroupSpecs\[0\].*nothing is mounted at /dev/shm",),
    ),
    Mistake(
        "GPUs on any node",
        lambda d: worker(d, 2).pop("nodeSelector"),
        (r"^RayCluster/realign spec.workerGroupSpecs\[2\].*nodeSelector: asks for GPUs and names no nodes",),
    ),
)
