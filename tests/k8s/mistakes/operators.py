"""What KubeRay and Kueue refuse and no schema says."""

from __future__ import annotations

from tests.k8s.mistakes.places import Mistake, cluster, cron, drop, group, job, rename, same_group_name, worker
from tests.k8s.rendered import one

MISTAKES = (
    Mistake(
        "a job without entrypoint",
        lambda d: job(d).pop("entrypoint"),
        (r"^RayJob/realign-run spec.entrypoint: .*nothing to run",),
    ),
    Mistake(
        "min above max",
        lambda d: group(d, 0).update(minReplicas=9),
        (r"^RayCluster/realign spec.workerGroupSpecs\[0\].minReplicas: minReplicas 9 is above maxReplicas 8",),
    ),
    Mistake(
        "groups of one name",
        same_group_name,
        (
            r"^RayCluster/realign spec.workerGroupSpecs\[1\].groupName: two groups",
            r"^RayCluster/realign spec.workerGroupSpecs\[2\].groupName: two groups",
        ),
    ),
    Mistake(
        "a TTL without shutdown",
        lambda d: job(d).update(shutdownAfterJobFinishes=False),
        (
            r"^RayJob/realign-run spec.ttlSecondsAfterFinished: .*without shutdown",
            r"^RayJob/realign-run spec.shutdownAfterJobFinishes: the cluster stays",
            r"^RayJob/realign-run spec.shutdownAfterJobFinishes: Kueue refuses",
        ),
    ),
    Mistake(
        "deletion rules beside shutdown",
        lambda d: cron(d)["jobTemplate"].update(shutdownAfterJobFinishes=True),
        (r"^RayCronJob/realign-weekly spec.jobTemplate.deletionStrategy: deletion rules exclude",),
    ),
    Mistake(
        "a job that goes before its cluster",
        lambda d: cron(d)["jobTemplate"]["deletionStrategy"]["deletionRules"][1]["condition"].update(ttlSeconds=5),
        (r"^RayCronJob/realign-weekly .*deletionRules: .*SUCCEEDED.*DeleteSelf after 5 s comes before",),
    ),
    Mistake(
        "autoscaling that Kueue refuses",
        lambda d: one(d, "RayJob", "realign-run")["metadata"].pop("annotations"),
        (r"^RayJob/realign-run metadata.annotations.*Kueue refuses an autoscaling cluster",),
    ),
    Mistake(
        "a queue that is not there",
        lambda d: one(d, "RayJob", "realign-run")["metadata"]["labels"].update({"kueue.x-k8s.io/queue-name": "gpus"}),
        (r"^RayJob/realign-run .*there is no LocalQueue gpus",),
    ),
    Mistake(
        "a queue without its cluster queue",
        lambda d: rename(d, "ClusterQueue", "realign", "others"),
        (r"^LocalQueue/realign spec.clusterQueue: there is no ClusterQueue realign",),
    ),
    Mistake(
        "a flavour that is not there",
        lambda d: drop(d, "ResourceFlavor", "realign-gpu"),
        (r"^ClusterQueue/realign .*there is no ResourceFlavor realign-gpu",),
    ),
    Mistake(
        "a pod that no quota has room for",
        lambda d: one(d, "ClusterQueue", "realign")["spec"]["resourceGroups"][0]["flavors"][0]["resources"][2].update(
            nominalQuota="4"
        ),
        (
            r"^RayJob/realign-run spec.rayClusterSpec.workerGroupSpecs\[1\].template: no flavour of ClusterQueue realign",
        ),
    ),
    Mistake(
        "GPU groups that would be given the CPUs' flavour",
        lambda d: one(d, "ClusterQueue", "realign")["spec"]["resourceGroups"][0]["flavors"].reverse(),
        (
            r"^RayJob/realign-run spec.rayClusterSpec.workerGroupSpecs\[1\].template: while it is empty .* realign-cpu",
            r"^RayJob/realign-run spec.rayClusterSpec.workerGroupSpecs\[2\].template: while it is empty .* realign-cpu",
        ),
    ),
    Mistake(
        "a flavour whose nodes the CPU pods may not have",
        lambda d: one(d, "ResourceFlavor", "realign-cpu").update(
            spec={"nodeTaints": [{"key": "pool", "value": "batch", "effect": "NoSchedule"}]}
        ),
        (
            r"^RayJob/realign-run spec.rayClusterSpec.headGroupSpec.template: no flavour",
            r"^RayJob/realign-run spec.rayClusterSpec.workerGroupSpecs\[0\].template: no flavour",
            r"^RayJob/realign-run spec.submitterPodTemplate: no flavour",
        ),
    ),
    Mistake(
        "GPUs that stand idle",
        lambda d: group(d, 2).update(minReplicas=1, replicas=1),
        (r"^RayCluster/realign spec.workerGroupSpecs\[2\].minReplicas: 1 workers with GPUs stand",),
    ),
    Mistake(
        "an old version of Kueue's API",
        lambda d: one(d, "LocalQueue", "realign").update(apiVersion="kueue.x-k8s.io/v1beta1"),
        (r"^LocalQueue/realign apiVersion: kueue.x-k8s.io/v1beta1 is on its way out",),
    ),
    Mistake(
        "RDMA that the queue does not cover",
        lambda d: (
            [f["resources"].pop() for f in one(d, "ClusterQueue", "realign")["spec"]["resourceGroups"][0]["flavors"]]
            and one(d, "ClusterQueue", "realign")["spec"]["resourceGroups"][0]["coveredResources"].pop()
        ),
        (r"^RayJob/realign-run spec.rayClusterSpec.workerGroupSpecs\[1\].template: no flavour",),
        "gpu-rdma",
    ),
    Mistake(
        "a RayCluster's name too long",
        lambda d: rename(d, "RayCluster", "realign", "r" * 54),
        (
            r"^RayCluster/r+ metadata.name: the name has 54 characters, RayCluster may have 53",
            r"^PodDisruptionBudget/realign-head spec.selector: selects no pod",
            r"^RayCluster/r+ spec.headGroupSpec.template: no PodDisruptionBudget",
        ),
    ),
    Mistake(
        "a RayJob's name too long",
        lambda d: rename(d, "RayJob", "realign-run", "r" * 48),
        (r"^RayJob/r+ metadata.name: the name has 48 characters, RayJob may have 47",),
    ),
    Mistake(
        "a RayCronJob's name too long",
        lambda d: rename(d, "RayCronJob", "realign-weekly", "r" * 37),
        (r"^RayCronJob/r+ metadata.name: the name has 37 characters, RayCronJob may have 36",),
    ),
    Mistake(
        "no cron schedule",
        lambda d: cron(d).update(schedule="every saturday"),
        (r"^RayCronJob/realign-weekly spec.schedule: 'every saturday' is no cron schedule",),
    ),
    Mistake(
        "missing token",
        lambda d: cluster(d).pop("authOptions"),
        (r"^RayCluster/realign spec.authOptions.mode: Ray runs any code",),
    ),
    Mistake(
        "token switched off in one pod",
        lambda d: worker(d, 0)["containers"][0]["env"].append({"name": "RAY_AUTH_MODE", "value": "disabled"}),
        (r"^RayCluster/realign spec.workerGroupSpecs\[0\].*switches token authentication off",),
    ),
    Mistake(
        "a Ray too old for tokens",
        lambda d: job(d)["rayClusterSpec"].update(rayVersion="2.44.1"),
        (r"^RayJob/realign-run spec.rayClusterSpec.rayVersion: .*2.52",),
    ),
    Mistake(
        "the old autoscaler",
        lambda d: cluster(d)["autoscalerOptions"].pop("version"),
        (r"^RayCluster/realign spec.autoscalerOptions.version: not the autoscaler v2",),
    ),
    Mistake(
        "an autoscaler that may not ask",
        lambda d: cluster(d)["autoscalerOptions"]["volumeMounts"].pop(),
        (r"^RayCluster/realign spec.autoscalerOptions.volumeMounts: the autoscaler has no token",),
    ),
    Mistake(
        "tasks on the head",
        lambda d: cluster(d)["headGroupSpec"]["rayStartParams"].pop("num-cpus"),
        (r"^RayCluster/realign spec.headGroupSpec.rayStartParams.num-cpus: tasks would run on the head",),
    ),
    Mistake(
        "workers that restart in place",
        lambda d: worker(d, 2).update(restartPolicy="Always"),
        (r"^RayCluster/realign spec.workerGroupSpecs\[2\].template.spec.restartPolicy: .*restarts in place",),
    ),
    Mistake(
        "a job without deadline",
        lambda d: job(d).pop("activeDeadlineSeconds"),
        (r"^RayJob/realign-run spec.activeDeadlineSeconds: a job that hangs",),
    ),
    Mistake(
        "the operator's own submitter",
        lambda d: job(d).pop("submitterPodTemplate"),
        (r"^RayJob/realign-run spec.submitterPodTemplate: .*restricted pod security",),
    ),
    Mistake(
        "no name that a Service may have",
        lambda d: rename(d, "RayJob", "realign-run", "1st-run"),
        (r"^RayJob/1st-run metadata.name: no DNS-1035 label",),
    ),
    Mistake(
        "a job with two clusters",
        lambda d: cron(d)["jobTemplate"].update(clusterSelector={"ray.io/cluster": "realign"}),
        (r"^RayCronJob/realign-weekly spec.jobTemplate.rayClusterSpec: a cluster of its own or",),
    ),
    Mistake(
        "a deletion rule twice",
        lambda d: cron(d)["jobTemplate"]["deletionStrategy"]["deletionRules"].append(
            {"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 90}}
        ),
        (r"^RayCronJob/realign-weekly .*deletionRules\[6\]: the same policy and condition",),
    ),
    Mistake(
        "workers deleted under the autoscaler",
        lambda d: cron(d)["jobTemplate"]["deletionStrategy"]["deletionRules"].append(
            {"policy": "DeleteWorkers", "condition": {"jobStatus": "FAILED", "ttlSeconds": 0}}
        ),
        (r"^RayCronJob/realign-weekly .*deletionRules\[6\].policy: DeleteWorkers is refused",),
    ),
    Mistake(
        "a group that Kueue takes for the head",
        lambda d: job(d)["rayClusterSpec"]["workerGroupSpecs"][0].update(groupName="head"),
        (r"^RayJob/realign-run spec.rayClusterSpec.workerGroupSpecs\[0\].groupName: Kueue keeps the name",),
    ),
    Mistake(
        "a group that Kueue counts one pod of",
        lambda d: job(d)["rayClusterSpec"]["workerGroupSpecs"][1].pop("replicas"),
        (r"^RayJob/realign-run spec.rayClusterSpec.workerGroupSpecs\[1\].replicas: Kueue counts one pod",),
    ),
    Mistake(
        "a schedule that no queue sees",
        lambda d: one(d, "RayCronJob", "realign-weekly")["metadata"]["labels"].update(
            {"kueue.x-k8s.io/queue-name": "realign"}
        ),
        (r"^RayCronJob/realign-weekly metadata.labels.*do not inherit its labels",),
    ),
    Mistake(
        "a time zone in the schedule",
        lambda d: cron(d).update(schedule="TZ=UTC 0 2 * * 6"),
        (r"^RayCronJob/realign-weekly spec.schedule: a time zone in the schedule",),
    ),
    Mistake(
        "a token that nobody knows",
        lambda d: cluster(d)["authOptions"].pop("secretName"),
        (r"^RayCluster/realign spec.authOptions.secretName: the operator would make a token",),
    ),
    Mistake(
        "a job that keeps its state in the standing cluster's Redis",
        lambda d: job(d)["rayClusterSpec"].update(gcsFaultToleranceOptions=cluster(d)["gcsFaultToleranceOptions"]),
        (r"^RayJob/realign-run spec.rayClusterSpec.gcsFaultToleranceOptions: a job's own cluster",),
    ),
    Mistake(
        "a group without bound",
        lambda d: group(d, 0).pop("maxReplicas"),
        (r"^RayCluster/realign spec.workerGroupSpecs\[0\].maxReplicas: nothing bounds",),
    ),
    Mistake(
        "a cluster that does not scale",
        lambda d: job(d)["rayClusterSpec"].update(enableInTreeAutoscaling=False),
        (r"^RayJob/realign-run spec.rayClusterSpec.enableInTreeAutoscaling: groups stay",),
    ),
    Mistake(
        "replicas beyond the bounds",
        lambda d: group(d, 0).update(replicas=9),
        (r"^RayCluster/realign spec.workerGroupSpecs\[0\].replicas: replicas 9 is not between",),
    ),
    Mistake(
        "a flavour that lacks a covered resource",
        lambda d: one(d, "ClusterQueue", "realign")["spec"]["resourceGroups"][0]["flavors"][1]["resources"].pop(),
        (
            r"^ClusterQueue/realign spec.resourceGroups\[0\].flavors\[1\].resources: gives \['cpu', 'memory'\], .* covers",
        ),
    ),
    Mistake(
        "GPUs that nothing is meant for",
        lambda d: group(d, 2)["rayStartParams"].pop("resources"),
        (r"^RayCluster/realign spec.workerGroupSpecs\[2\].rayStartParams.resources: 1 GPUs, and nothing says whether",),
    ),
    Mistake(
        "fewer trainings than GPUs",
        lambda d: group(d, 1)["rayStartParams"].update(resources='"{\\"realign_train\\": 4}"'),
        (r"^RayCluster/realign spec.workerGroupSpecs\[1\].rayStartParams.resources: 8 GPUs, and .*: 4.* says",),
    ),
    Mistake(
        "trainings and evaluations on the same GPUs",
        lambda d: group(d, 1)["rayStartParams"].update(resources='"{\\"realign_train\\": 8, \\"realign_eval\\": 8}"'),
        (
            r"^RayCluster/realign spec.workerGroupSpecs\[1\].rayStartParams.resources: 8 GPUs, and .*realign_eval.* says",
        ),
    ),
    Mistake(
        "resources that the autoscaler cannot read",
        lambda d: group(d, 1)["rayStartParams"].update(resources='{"realign_train": 8}'),
        (r"^RayCluster/realign spec.workerGroupSpecs\[1\].rayStartParams.resources: the autoscaler cannot read",),
    ),
    Mistake(
        "groups without a worker",
        lambda d: [g.update(maxReplicas=0) for g in cluster(d)["workerGroupSpecs"]],
        (r"^RayCluster/realign spec.workerGroupSpecs: no group may have a worker",),
    ),
    Mistake(
        "more CPUs than the pod has",
        lambda d: group(d, 0)["rayStartParams"].update({"num-cpus": "64"}),
        (r"^RayCluster/realign spec.workerGroupSpecs\[0\].rayStartParams.num-cpus: Ray is told of 64, the pod has 8",),
    ),
    Mistake(
        "tasks on the head, more than it has",
        lambda d: cluster(d)["headGroupSpec"]["rayStartParams"].update({"num-cpus": "64"}),
        (
            r"^RayCluster/realign spec.headGroupSpec.rayStartParams.num-cpus: Ray is told of 64, the pod has 4",
            r"^RayCluster/realign spec.headGroupSpec.rayStartParams.num-cpus: tasks would run on the head",
        ),
    ),
    Mistake(
        "a queued job that does not wait",
        lambda d: job(d).update(suspend=False),
        (r"^RayJob/realign-run spec.suspend: it starts before its queue lets it",),
    ),
    Mistake(
        "a run that the next one overtakes",
        lambda d: cron(d).update(schedule="0 * * * *"),
        (r"^RayCronJob/realign-weekly spec.schedule: starts again after 1:00:00, while a run may take 4 days",),
    ),
    Mistake(
        "tries that the next run overtakes",
        lambda d: cron(d)["jobTemplate"].update(backoffLimit=3),
        (r"^RayCronJob/realign-weekly spec.schedule: starts again after 7 days.* may take 8 days.*\(4 tries\)",),
    ),
)
