"""What KubeRay's and Kueue's own checks refuse and no schema says, and what this project asks of Ray.

Names and rules: KubeRay 1.7, ray-operator/controllers/ray/utils/validation.go; Kueue 0.19, pkg/controller/jobs/ray*.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from itertools import pairwise
from math import ceil

from k8s.check.documents import Document, Documents, RayCluster, job_spec
from k8s.check.finding import Finding, named
from k8s.check.pods import GPU
from k8s.check.quantities import amount
from pipelines.cron import shortest

LONGEST = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 36}
DNS_1035 = re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$")
QUEUE = "kueue.x-k8s.io/queue-name"
ELASTIC = "kueue.x-k8s.io/elastic-job"
ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
USES = ("realign_train", "realign_eval")
"""Resources of Ray that ranks and actors ask for, where a cluster has them."""


def ray_findings(documents: Documents) -> Iterator[Finding]:
    """All rules of this file."""
    for document in documents.of(*LONGEST):
        name, longest = document["metadata"]["name"], LONGEST[document["kind"]]
        if len(name) > longest:
            problem = f"the name has {len(name)} characters, {document['kind']} may have {longest}"
            yield Finding(named(document), "metadata.name", problem, "shorten it")
        if not DNS_1035.match(name):
            yield Finding(named(document), "metadata.name", "no DNS-1035 label", "a-z, 0-9 and -, a letter first")
    for document in documents.of("RayJob", "RayCronJob"):
        yield from _job(document)
        yield from _queued(document)
    for document in documents.of("RayCronJob"):
        yield from _schedule(document)
    for cluster in documents.clusters:
        yield from _cluster(cluster)
        yield from _auth(cluster)
        yield from _groups(cluster)
        yield from _head(cluster)


def _job(document: Document) -> Iterator[Finding]:
    path, spec = job_spec(document) or ("", {})

    def wrong(field: str, problem: str, remedy: str) -> Finding:
        return Finding(named(document), f"{path}.{field}", problem, remedy)

    if not str(spec.get("entrypoint") or "").strip():
        yield wrong("entrypoint", "the job says nothing to run", "give a command")
    if bool(spec.get("rayClusterSpec")) == bool(spec.get("clusterSelector")):
        yield wrong("rayClusterSpec", "a cluster of its own or a clusterSelector: exactly one", "give one of them")
    shutdown, ttl = spec.get("shutdownAfterJobFinishes", False), spec.get("ttlSecondsAfterFinished", 0)
    rules = (spec.get("deletionStrategy") or {}).get("deletionRules") or []
    if ttl and not shutdown:
        yield wrong(
            "ttlSecondsAfterFinished", "a TTL does nothing without shutdownAfterJobFinishes", "set that to true"
        )
    if rules and shutdown:
        yield wrong("deletionStrategy", "deletion rules exclude shutdownAfterJobFinishes", "keep one of the two")
    if not rules and not shutdown:
        remedy = "set shutdownAfterJobFinishes, or deletionRules"
        yield wrong("shutdownAfterJobFinishes", "the cluster stays after the job, with its GPUs", remedy)
    if not spec.get("activeDeadlineSeconds"):
        yield wrong("activeDeadlineSeconds", "a job that hangs holds its GPUs for ever", "set a deadline")
    if spec.get("submissionMode", "K8sJobMode") == "K8sJobMode" and not spec.get("submitterPodTemplate"):
        problem = "the operator's own submitter pod breaks restricted pod security and is never made"
        yield wrong("submitterPodTemplate", problem, "give one")
    yield from _deletion(document, f"{path}.deletionStrategy.deletionRules", rules, spec)


def _deletion(document: Document, path: str, rules: list[Document], spec: Document) -> Iterator[Finding]:
    by_condition: dict[str, dict[str, int]] = {}
    for index, rule in enumerate(rules):
        condition = dict(rule.get("condition") or {})
        ttl = condition.pop("ttlSeconds", 0)
        seen = by_condition.setdefault(str(condition), {})
        if rule.get("policy") in seen:
            yield Finding(named(document), f"{path}[{index}]", "the same policy and condition again", "remove one")
        seen[rule.get("policy", "")] = ttl
        if rule.get("policy") == "DeleteWorkers" and (spec.get("rayClusterSpec") or {}).get("enableInTreeAutoscaling"):
            problem = "DeleteWorkers is refused where the cluster scales by itself"
            yield Finding(named(document), f"{path}[{index}].policy", problem, "use DeleteCluster")
    for when, ttls in by_condition.items():
        for first, second in pairwise([p for p in ORDER if p in ttls]):
            if ttls[second] < ttls[first]:
                problem = f"{when}: {second} after {ttls[second]} s comes before {first} after {ttls[first]} s"
                yield Finding(named(document), path, problem, f"let {second} be the later one")


def _queued(document: Document) -> Iterator[Finding]:
    """What Kueue asks of a RayJob that it queues."""
    metadata = document["metadata"]
    if document["kind"] != "RayJob" or QUEUE not in (metadata.get("labels") or {}):
        return
    spec = document.get("spec") or {}
    cluster = spec.get("rayClusterSpec") or {}
    if not spec.get("shutdownAfterJobFinishes"):
        problem = "Kueue refuses a job whose cluster outlives it"
        yield Finding(named(document), "spec.shutdownAfterJobFinishes", problem, "set it to true")
    if not spec.get("suspend"):
        yield Finding(named(document), "spec.suspend", "it starts before its queue lets it", "set it to true")
    elastic = (metadata.get("annotations") or {}).get(ELASTIC) == "true"
    if cluster.get("enableInTreeAutoscaling") and not elastic:
        problem = "Kueue refuses an autoscaling cluster"
        yield Finding(named(document), f"metadata.annotations.{ELASTIC}", problem, 'set it to "true"')
    for index, group in enumerate(cluster.get("workerGroupSpecs") or []):
        if group.get("groupName") == "head":
            path = f"spec.rayClusterSpec.workerGroupSpecs[{index}].groupName"
            yield Finding(named(document), path, "Kueue keeps the name head for the head", "give another")
        if "replicas" not in group:
            path = f"spec.rayClusterSpec.workerGroupSpecs[{index}].replicas"
            yield Finding(named(document), path, "Kueue counts one pod where none is said", "set it, 0 for none")


def _schedule(document: Document) -> Iterator[Finding]:
    schedule = str((document.get("spec") or {}).get("schedule", ""))
    if "TZ" in schedule:
        yield Finding(named(document), "spec.schedule", "a time zone in the schedule is refused", "use spec.timeZone")
    else:
        yield from _overlap(document, schedule)
    if QUEUE in (document["metadata"].get("labels") or {}):
        problem = "the jobs of a RayCronJob do not inherit its labels, so no queue holds them"
        yield Finding(named(document), f"metadata.labels.{QUEUE}", problem, "remove it; maxReplicas bounds the runs")


def _overlap(document: Document, schedule: str) -> Iterator[Finding]:
    """All tries of a run must end before the next one begins: KubeRay starts it all the same."""
    spec = (job_spec(document) or ("", {}))[1]
    try:
        between = shortest(schedule)
    except ValueError:
        yield Finding(named(document), "spec.schedule", f"{schedule!r} is no cron schedule", "five fields, or @weekly")
        return
    tries = spec.get("backoffLimit", 0) + 1
    longest = timedelta(seconds=spec.get("activeDeadlineSeconds", 0) * tries)
    if longest >= between:
        problem = f"starts again after {between}, while a run may take {longest} ({tries} tries)"
        remedy = "start it less often, or lower activeDeadlineSeconds or backoffLimit"
        yield Finding(named(document), "spec.schedule", problem, remedy)


def _auth(cluster: RayCluster) -> Iterator[Finding]:
    options = cluster.spec.get("authOptions") or {}
    if options.get("mode") != "token":
        problem = "Ray runs any code for whoever reaches its ports: no token is asked for"
        yield Finding(named(cluster.owner), f"{cluster.path}.authOptions.mode", problem, "set mode: token")
    elif not options.get("secretName"):
        problem = "the operator would make a token that no step knows of"
        yield Finding(named(cluster.owner), f"{cluster.path}.authOptions.secretName", problem, "name realign-ray-token")
    version = re.match(r"^(\d+)\.(\d+)", str(cluster.spec.get("rayVersion", "")))
    if version is None or (int(version[1]), int(version[2])) < (2, 52):
        problem = "token authentication needs rayVersion 2.52 or newer"
        yield Finding(named(cluster.owner), f"{cluster.path}.rayVersion", problem, "say the version of the image")
    for pod in cluster.pods:
        for container in pod.containers:
            for index, variable in enumerate(container.spec.get("env") or []):
                if variable["name"] == "RAY_AUTH_MODE" and variable.get("value") != "token":
                    path = f"{container.path}.env[{index}]"
                    yield Finding(pod.name, path, "switches token authentication off in this pod", "remove it")


def _cluster(cluster: RayCluster) -> Iterator[Finding]:
    spec, path, name = cluster.spec, cluster.path, named(cluster.owner)
    options = spec.get("autoscalerOptions") or {}
    if not spec.get("enableInTreeAutoscaling"):
        problem = "groups stay as they are: no worker comes when a stage asks"
        yield Finding(name, f"{path}.enableInTreeAutoscaling", problem, "set it to true")
    elif options.get("version") != "v2":
        yield Finding(name, f"{path}.autoscalerOptions.version", "not the autoscaler v2", "set version: v2")
    fault_tolerance = spec.get("gcsFaultToleranceOptions")
    if fault_tolerance and not (fault_tolerance.get("redisPassword") or {}).get("valueFrom"):
        problem = "Redis without a password, or with one in plain sight"
        yield Finding(
            name, f"{path}.gcsFaultToleranceOptions.redisPassword", problem, "take it from the secret realign-redis"
        )
    if fault_tolerance and cluster.owner["kind"] != "RayCluster":
        problem = "a job's own cluster keeps its state in Redis, and Redis is the standing cluster's"
        yield Finding(
            name, f"{path}.gcsFaultToleranceOptions", problem, "remove it; the run goes on from its workspace"
        )


def _head(cluster: RayCluster) -> Iterator[Finding]:
    group = cluster.spec.get("headGroupSpec") or {}
    if (group.get("rayStartParams") or {}).get("num-cpus") != "0":
        path = f"{cluster.path}.headGroupSpec.rayStartParams.num-cpus"
        yield Finding(named(cluster.owner), path, "tasks would run on the head, beside the driver", 'set it to "0"')


def _groups(cluster: RayCluster) -> Iterator[Finding]:
    groups = cluster.spec.get("workerGroupSpecs") or []
    name = named(cluster.owner)
    counted = Counter(str(group.get("groupName")) for group in groups)
    for index, group in enumerate(groups):
        path = f"{cluster.path}.workerGroupSpecs[{index}]"
        if counted[str(group.get("groupName"))] > 1:
            yield Finding(name, f"{path}.groupName", f"two groups are called {group.get('groupName')}", "rename one")
        least, most, now = (
            group.get(k, d) for k, d in (("minReplicas", 0), ("maxReplicas", 2**31 - 1), ("replicas", 0))
        )
        if least > most:
            yield Finding(name, f"{path}.minReplicas", f"minReplicas {least} is above maxReplicas {most}", "lower it")
        elif not least <= now <= most:
            problem = f"replicas {now} is not between minReplicas {least} and maxReplicas {most}"
            yield Finding(name, f"{path}.replicas", problem, "set it between them")
        if least and gpus(group):
            problem = f"{least} workers with GPUs stand while nobody works"
            yield Finding(name, f"{path}.minReplicas", problem, "set it to 0: the autoscaler brings them")
        if "maxReplicas" not in group:
            yield Finding(name, f"{path}.maxReplicas", "nothing bounds the group", "set maxReplicas")
        yield from _use(name, path, group)
    if not any(group.get("maxReplicas", 1) for group in groups):
        problem = "no group may have a worker, and every stage waits for one"
        yield Finding(name, f"{cluster.path}.workerGroupSpecs", problem, "raise a group's maxReplicas")
    starts = [(f"{cluster.path}.headGroupSpec", cluster.spec.get("headGroupSpec") or {})]
    starts += [(f"{cluster.path}.workerGroupSpecs[{i}]", group) for i, group in enumerate(groups)]
    for path, group in starts:
        yield from _object_store(name, path, group)
        yield from _counts(name, path, group)


def gpus(group: Document) -> int:
    """GPUs of one node of a group."""
    return int(amount(limits(group).get(GPU, 0)))


def limits(group: Document) -> Document:
    """Of a group's Ray container, which is the first one."""
    containers = ((group.get("template") or {}).get("spec") or {}).get("containers") or [{}]
    return (containers[0].get("resources") or {}).get("limits") or {}


def _counts(name: str, path: str, group: Document) -> Iterator[Finding]:
    """Ray believes what it is told of CPUs and GPUs, and gives them away."""
    for said, resource in (("num-cpus", "cpu"), ("num-gpus", GPU)):
        told, limit = (group.get("rayStartParams") or {}).get(said), limits(group).get(resource, 0)
        if told is not None and amount(told) > ceil(amount(limit)):
            problem = f"Ray is told of {told}, the pod has {limit}"
            yield Finding(name, f"{path}.rayStartParams.{said}", problem, "remove it: Ray takes the pod's limit")


def _use(name: str, path: str, group: Document) -> Iterator[Finding]:
    """What tells groups with GPUs apart to Ray, in the form that KubeRay's autoscaler reads: a quoted JSON object."""
    said, whole = (group.get("rayStartParams") or {}).get("resources"), gpus(group)
    path = f"{path}.rayStartParams.resources"
    try:
        own = {} if said is None else dict(json.loads(json.loads(said)))
    except (TypeError, ValueError):
        yield Finding(name, path, f"the autoscaler cannot read {said!r}", f"write {_quoted({USES[0]: whole or 1})}")
        return
    uses = {key: own[key] for key in USES if key in own}
    if whole and (len(uses) != 1 or set(uses.values()) != {whole}):
        problem = f"{whole} GPUs, and {uses or 'nothing'} says whether trainings or evaluations take them"
        remedy = " or ".join(_quoted({use: whole}) for use in USES)
        yield Finding(name, path, problem, f"write {remedy}")


def _quoted(resources: dict[str, int]) -> str:
    return f"'{json.dumps(json.dumps(resources))}'"


def _object_store(name: str, path: str, group: Document) -> Iterator[Finding]:
    """Ray's object store lies in /dev/shm: more than that goes to the disk."""
    asked = (group.get("rayStartParams") or {}).get("object-store-memory")
    for volume in ((group.get("template") or {}).get("spec") or {}).get("volumes") or []:
        size = (volume.get("emptyDir") or {}).get("sizeLimit")
        if volume["name"] == "shm" and asked and size and amount(asked) > amount(size):
            problem = f"an object store of {asked} bytes does not fit /dev/shm of {size}"
            yield Finding(name, f"{path}.rayStartParams.object-store-memory", problem, "lower it, or enlarge /dev/shm")
