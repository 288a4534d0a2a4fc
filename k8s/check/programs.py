"""What realign's processes need of Ray's pods: places to write to, an environment, a run config, one image, one workspace."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path, PurePosixPath

from components.errors import ConfigError
from k8s.check.documents import Container, Document, Documents, Pod, RayCluster, job_spec, place
from k8s.check.environment import variables_of
from k8s.check.finding import Finding, named
from k8s.check.ray import gpus
from k8s.check.room import room_findings
from pipelines.config import load_config

WORKSPACE = "/workspace"
URI = "MLFLOW_TRACKING_URI"
MANY = "ReadWriteMany"


def program_findings(documents: Documents) -> Iterator[Finding]:
    """All rules of this file."""
    for pod in documents.pods:
        if pod.role:
            yield from _places(pod)
            yield from _environment(pod, documents)
    for cluster in documents.clusters:
        yield from _workspace(cluster, documents)
    for document in documents.of("RayCluster", "RayJob", "RayCronJob"):
        yield from _images(document, documents)
    for document in documents.of("RayJob", "RayCronJob"):
        yield from _entrypoint(document, documents)


def _main(pod: Pod) -> Container:
    """Ray's container: the first one."""
    own = [c for c in pod.containers if c.path == f"{pod.path}.spec.containers[0]"]
    return own[0] if own else Container(f"{pod.path}.spec.containers[0]", {})


def _mount(container: Container, path: str) -> Document | None:
    """The innermost mount that a path lies in."""
    over = [
        m for m in container.spec.get("volumeMounts") or [] if PurePosixPath(path).is_relative_to(str(m["mountPath"]))
    ]
    return max(over, key=lambda m: len(str(m["mountPath"])), default=None)


def _volume(pod: Pod, mount: Document) -> Document | None:
    return next((v for v in pod.spec.get("volumes") or [] if v["name"] == mount["name"]), None)


def _writable(pod: Pod, container: Container, path: str) -> bool:
    """A mount of a volume that the pod does not have is another rule's."""
    mount = _mount(container, path)
    if mount is None:
        return (container.spec.get("securityContext") or {}).get("readOnlyRootFilesystem") is not True
    volume = _volume(pod, mount) or {}
    claim = volume.get("persistentVolumeClaim") or {}
    return not (mount.get("readOnly") or claim.get("readOnly") or {"configMap", "secret", "projected"} & set(volume))


def _places(pod: Pod) -> Iterator[Finding]:
    container = _main(pod)
    path = f"{container.path}.volumeMounts"
    if not _writable(pod, container, "/tmp"):
        yield Finding(pod.name, path, "nothing can be written to /tmp", "mount an emptyDir there")
    if pod.role == "submit":
        return
    mount = _mount(container, WORKSPACE)
    if mount is None:
        problem = f"nothing is mounted at {WORKSPACE}: what this pod makes no other one finds"
        yield Finding(pod.name, path, problem, "mount the claim realign-workspace there")
    elif not _writable(pod, container, WORKSPACE):
        yield Finding(pod.name, path, f"{WORKSPACE} is read-only, and stages write there", "let it be written")


def _environment(pod: Pod, documents: Documents) -> Iterator[Finding]:
    container = _main(pod)
    variables = variables_of(pod, container, documents)
    if variables is None:
        return
    path = f"{container.path}.env"
    if not variables.get("HOME"):
        yield Finding(pod.name, path, "no HOME: libraries keep files in that of the image", "set HOME to /tmp")
    for name in ("HOME", "HF_HOME"):
        where = variables.get(name)
        if where and not _writable(pod, container, where):
            yield Finding(pod.name, path, f"{name} is {where}, where nothing can be written", "choose another place")
    if pod.role != "submit" and not variables.get(URI):
        yield Finding(pod.name, path, f"no {URI}: nothing is published", "set it to the address of MLflow")


def _workspace(cluster: RayCluster, documents: Documents) -> Iterator[Finding]:
    """One claim for all pods, which nodes can share where there are several. Nodes with GPUs are."""
    claims: dict[str, str] = {}
    for pod in cluster.pods:
        mount = _mount(_main(pod), WORKSPACE)
        volume = _volume(pod, mount) if mount else None
        claim = ((volume or {}).get("persistentVolumeClaim") or {}).get("claimName")
        if claim:
            claims.setdefault(claim, pod.path)
        elif volume:
            problem = f"{WORKSPACE} is no claim: what this pod makes no other one finds"
            yield Finding(pod.name, f"{pod.path}.spec.volumes", problem, "use the claim realign-workspace")
    if len(claims) > 1:
        problem = f"{WORKSPACE} is {' here and '.join(claims)} there: pods find nothing of each other"
        yield Finding(named(cluster.owner), cluster.path, problem, "use one claim")
    allowed = {MANY} if any(gpus(g) for g in cluster.spec.get("workerGroupSpecs") or []) else {MANY, "ReadWriteOnce"}
    for document in documents.of("PersistentVolumeClaim"):
        modes = document["spec"].get("accessModes") or []
        own = document["metadata"]["name"] in claims and place(document) == place(cluster.owner)
        if own and not allowed & set(modes):
            problem = f"{', '.join(modes) or 'nothing'}: pods of several nodes write to the workspace"
            yield Finding(named(document), "spec.accessModes", problem, f"ask for {MANY}")


def _images(document: Document, documents: Documents) -> Iterator[Finding]:
    """Ray refuses nodes of another version, and a stage is the same code wherever it runs."""
    pods = [pod for pod in documents.pods if pod.owner is document]
    heads = [_main(pod).spec.get("image") for pod in pods if pod.role == "head"]
    for pod in pods if heads else []:
        image = _main(pod).spec.get("image")
        if image != heads[0]:
            problem = f"another image than the head's: {image}"
            yield Finding(pod.name, f"{_main(pod).path}.image", problem, "give both the same, by the overlay's site")


def _entrypoint(document: Document, documents: Documents) -> Iterator[Finding]:
    """`realign run CONFIG --workspace FOLDER`, as the head sees both."""
    path, spec = job_spec(document) or ("", {})
    heads = [p for p in documents.pods if p.owner is document and p.role == "head"]
    path = f"{path}.entrypoint"
    try:
        words = shlex.split(str(spec.get("entrypoint") or ""))
    except ValueError as error:
        yield Finding(named(document), path, f"no shell can read it: {error}", "mend its quotes")
        return
    if not heads or words[:1] != ["realign"]:
        return
    for option, folder in pairwise(words):
        if option == "--workspace" and not PurePosixPath(folder).is_relative_to(WORKSPACE):
            problem = f"{folder} is not within {WORKSPACE}, which all nodes share"
            yield Finding(named(document), path, problem, f"use a folder in {WORKSPACE}")
    for word in words:
        if PurePosixPath(word).suffix in {".yaml", ".yml"}:
            yield from _config(document, path, word, words[1], heads[0], documents)


def _config(
    document: Document, path: str, file: str, command: str, head: Pod, documents: Documents
) -> Iterator[Finding]:
    container = _main(head)
    mount = _mount(container, file)
    if mount is None:
        yield Finding(named(document), path, f"nothing is mounted where {file} lies", "mount realign-config there")
        return
    volume = _volume(head, mount) or {}
    source = volume.get("configMap")
    config = documents.find("ConfigMap", source["name"], head.namespace) if source else None
    if source is None or config is None:
        return  # a file of another volume, or a ConfigMap that another rule misses
    key = mount.get("subPath") or str(PurePosixPath(file).relative_to(mount["mountPath"]))
    if source.get("items"):
        key = next((item["key"] for item in source["items"] if item["path"] == key), key)
    texts = config.get("data") or {}
    if key not in texts:
        problem = f"{named(config)}, mounted at {mount['mountPath']}, has no {key}"
        yield Finding(named(document), path, problem, f"it has: {', '.join(sorted(texts)) or 'nothing'}")
        return
    path = f"data.{key}"
    try:
        run = load_config(Path(file), far=config["data"][key])
    except ConfigError as error:
        for line in str(error).splitlines():
            yield Finding(named(config), path, line, "mend the run config")
        return
    told = (variables_of(head, container, documents) or {}).get(URI)
    if run.tracking.uri and told and run.tracking.uri.rstrip("/") != told.rstrip("/"):
        problem = f"tracking.uri is {run.tracking.uri}, the pods' {URI} {told}"
        yield Finding(named(config), path, problem, "name one server in both")
    if command in ("run", "sweep"):
        cluster = next(one for one in documents.clusters if one.owner is document)
        yield from room_findings(named(config), path, run, command, cluster)
