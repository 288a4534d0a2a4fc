"""Pods that are well-formed and in which no run can work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml

from tests.k8s.mistakes.places import Documents, Mistake, cluster, cron, job, worker
from tests.k8s.rendered import one

OTHER = f"ghcr.io/example/realign@sha256:{'1' * 64}"


def _unmount(pod: Any, path: str) -> None:
    container = pod["containers"][0]
    container["volumeMounts"] = [m for m in container["volumeMounts"] if m["mountPath"] != path]


def _clusters(of: Documents) -> tuple[Any, ...]:
    return cluster(of), job(of)["rayClusterSpec"], cron(of)["jobTemplate"]["rayClusterSpec"]


def _everywhere(path: str) -> Callable[[Documents], object]:
    def plant(of: Documents) -> None:
        for spec in _clusters(of):
            for each in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
                _unmount(each["template"]["spec"], path)

    return plant


def _setting(name: str, value: str | None) -> Callable[[Documents], object]:
    def plant(of: Documents) -> None:
        data = one(of, "ConfigMap", "realign-settings")["data"]
        data.pop(name)
        if value is not None:
            data[name] = value

    return plant


def _run_config(change: Callable[[str], str]) -> Callable[[Documents], object]:
    def plant(of: Documents) -> None:
        data = one(of, "ConfigMap", "realign-config")["data"]
        data["realign.yaml"] = change(data["realign.yaml"])

    return plant


def _execution(**changes: Any) -> Callable[[Documents], object]:
    """A run config with other words in its section `execution`."""

    def change(text: str) -> str:
        config = yaml.safe_load(text)
        for key, value in changes.items():
            execution = config.setdefault("execution", {})
            execution[key] = {**execution.get(key, {}), **value} if isinstance(value, dict) else value
        return yaml.safe_dump(config)

    return _run_config(change)


_JUDGED = "evaluation:\n  judge: {kind: guard, format: wildguard, model: /workspace/guard}"


def _few_gpus(of: Documents) -> None:
    """One node of four GPUs for trainings."""
    for spec in _clusters(of):
        group = spec["workerGroupSpecs"][1]
        group["maxReplicas"] = 1
        group["rayStartParams"]["resources"] = '"{\\"realign_train\\": 4}"'
        for side in group["template"]["spec"]["containers"][0]["resources"].values():
            side["nvidia.com/gpu"] = "4"


def _entrypoint(text: str) -> Callable[[Documents], object]:
    return lambda d: job(d).update(entrypoint=text)


def _read_only(of: Documents) -> None:
    mounts = worker(of, 1)["containers"][0]["volumeMounts"]
    next(m for m in mounts if m["mountPath"] == "/workspace")["readOnly"] = True


def _mode(*modes: str) -> Callable[[Documents], object]:
    return lambda d: one(d, "PersistentVolumeClaim", "realign-workspace")["spec"].update(accessModes=list(modes))


def _short(what: str) -> tuple[str, ...]:
    """Said of both clusters that runs have of their own."""
    start = r"^ConfigMap/realign-config data.realign.yaml: execution\."
    return tuple(start + what.replace("WHOSE", whose) for whose in ("RayJob/realign-run", "RayCronJob/realign-weekly"))


RAY = r"^Ray(Cluster|Job|CronJob)/\S+ "

MISTAKES = (
    Mistake(
        "no workspace",
        _everywhere("/workspace"),
        (RAY + r".*volumeMounts: nothing is mounted at /workspace", RAY + r".*env: HF_HOME is /workspace/"),
    ),
    Mistake(
        "no workspace in a worker",
        lambda d: _unmount(worker(d, 0), "/workspace"),
        (
            r"^RayCluster/realign spec.workerGroupSpecs\[0\].*volumeMounts: nothing is mounted at /workspace",
            r"^RayCluster/realign spec.workerGroupSpecs\[0\].*env: HF_HOME is /workspace/",
        ),
    ),
    Mistake(
        "a workspace that is read-only",
        _read_only,
        (
            r"^RayCluster/realign spec.workerGroupSpecs\[1\].*volumeMounts: /workspace is read-only",
            r"^RayCluster/realign spec.workerGroupSpecs\[1\].*env: HF_HOME is /workspace/",
        ),
    ),
    Mistake(
        "a workspace of the pod's own",
        lambda d: worker(d, 0)["volumes"].__setitem__(0, {"name": "workspace", "emptyDir": {"sizeLimit": "1Gi"}}),
        (r"^RayCluster/realign spec.workerGroupSpecs\[0\].*volumes: /workspace is no claim",),
    ),
    Mistake(
        "two workspaces",
        lambda d: worker(d, 0)["volumes"][0]["persistentVolumeClaim"].update(claimName="realign-models"),
        (
            r"^RayCluster/realign spec: /workspace is realign-workspace here and realign-models there",
            r"^PersistentVolumeClaim/realign-models spec.accessModes: ReadOnlyMany: pods of several nodes",
        ),
    ),
    Mistake(
        "a workspace of one node",
        _mode("ReadWriteOnce"),
        (r"^PersistentVolumeClaim/realign-workspace spec.accessModes: ReadWriteOnce: pods of several nodes",),
    ),
    Mistake(
        "a workspace of one pod",
        _mode("ReadWriteOncePod"),
        (r"^PersistentVolumeClaim/realign-workspace spec.accessModes: ReadWriteOncePod: pods",),
        overlay="local",
    ),
    Mistake(
        "no /tmp",
        lambda d: _unmount(worker(d, 0), "/tmp"),
        (
            r"^RayCluster/realign spec.workerGroupSpecs\[0\].*volumeMounts: nothing can be written to /tmp",
            r"^RayCluster/realign spec.workerGroupSpecs\[0\].*env: HOME is /tmp, where nothing",
        ),
    ),
    Mistake(
        "no /tmp for the submitter",
        lambda d: _unmount(job(d)["submitterPodTemplate"]["spec"], "/tmp"),
        (
            r"^RayJob/realign-run spec.submitterPodTemplate.*volumeMounts: nothing can be written to /tmp",
            r"^RayJob/realign-run spec.submitterPodTemplate.*env: HOME is /tmp, where nothing",
        ),
    ),
    Mistake("no HOME", _setting("HOME", None), (RAY + r".*env: no HOME",)),
    Mistake(
        "a cache among the models", _setting("HF_HOME", "/models/hf"), (RAY + r".*env: HF_HOME is /models/hf, where",)
    ),
    Mistake("nowhere to publish", _setting("MLFLOW_TRACKING_URI", None), (RAY + r".*env: no MLFLOW_TRACKING_URI",)),
    Mistake(
        "no run config",
        _everywhere("/etc/realign"),
        (r"^Ray(Job|CronJob)/\S+ .*entrypoint: nothing is mounted where /etc/realign/realign.yaml lies",),
    ),
    Mistake(
        "a run config under another name",
        _entrypoint("realign run /etc/realign/other.yaml --workspace /workspace/run"),
        (r"^RayJob/realign-run spec.entrypoint: ConfigMap/realign-config.* has no other.yaml; it has: realign.yaml",),
    ),
    Mistake(
        "results where nobody finds them",
        _entrypoint("realign run /etc/realign/realign.yaml --workspace /elsewhere/run"),
        (r"^RayJob/realign-run spec.entrypoint: /elsewhere/run is not within /workspace",),
    ),
    Mistake(
        "a command that no shell reads",
        _entrypoint("realign run '/etc/realign/realign.yaml"),
        (r"^RayJob/realign-run spec.entrypoint: no shell can read it: No closing quotation",),
    ),
    Mistake(
        "a run config that is none",
        _run_config(lambda _: "nonsense: 1\n"),
        (r"^ConfigMap/realign-config data.realign.yaml: /etc/realign/realign.yaml:1: ",),
    ),
    Mistake(
        "a run that publishes elsewhere",
        _run_config(lambda text: text.replace("mlflow.realign.svc", "mlflow.other.svc")),
        (r"^ConfigMap/realign-config data.realign.yaml: tracking.uri is http://mlflow.other.svc:5000, the pods'",),
    ),
    Mistake(
        "more ranks than the groups have GPUs",
        _few_gpus,
        _short(
            r"mask\.ranks: 8 ranks, each with 1 CPU, 1 GPU, 1 realign_train; the groups of WHOSE hold at most 4 "
            r"\(gpu-train: 4 on each of 1\); ask for less, or"
        ),
    ),
    Mistake(
        "ranks of a group that is not there",
        _execution(mask={"resource": "realign_trian"}),
        _short(
            r"mask\.resource: no node of the groups of WHOSE has realign_trian \(.*gpu-train: 2 with .* 8 realign_train"
        ),
    ),
    Mistake(
        "actors of a group that is not there",
        _execution(evaluation={"resource": "realign_evil"}),
        _short(r"evaluation\.resource: no node of the groups of WHOSE has realign_evil \("),
    ),
    Mistake(
        "more actors than the groups have GPUs",
        _execution(evaluation={"actors": 9}),
        _short(
            r"evaluation\.actors: 9 actors, each with .*; the groups of WHOSE hold at most 8 \(gpu-eval: 1 on each of 8\)"
        ),
    ),
    Mistake(
        "actors with more GPUs than a node",
        _execution(evaluation={"actors": 1, "devices": 2}),
        _short(
            r"evaluation\.actors: 1 actor, each with 1 CPU, 2 GPU, 1 realign_eval; the groups of WHOSE hold at most 0"
        ),
    ),
    Mistake(
        "more threads than a node has CPUs",
        _execution(threads=65),
        _short(r"threads: a stage asks for 65 CPUs, a node of the groups of WHOSE has at most 64"),
    ),
    Mistake(
        "actors of the CPU that no node holds",
        _execution(threads=2, evaluation={"actors": 3}),
        _short(r"evaluation\.actors: 3 actors, each with 2 CPU; the groups of WHOSE hold at most [12] \(cpu: 1 on"),
        overlay="local",
    ),
    Mistake(
        "a judge's GPU where there is none",
        _run_config(lambda text: f"{text}\nexecution: {{judge: {{device: cuda}}}}".replace("evaluation:", _JUDGED)),
        _short(r"judge\.device: 1 judging stage, each with 1 CPU, 1 GPU; the groups of WHOSE hold at most 0"),
        overlay="local",
    ),
    Mistake(
        "a worker of another version",
        lambda d: worker(d, 1)["containers"][0].update(image=OTHER),
        (r"^RayCluster/realign spec.workerGroupSpecs\[1\].*image: another image than the head's",),
    ),
    Mistake(
        "a submitter of another version",
        lambda d: job(d)["submitterPodTemplate"]["spec"]["containers"][0].update(image=OTHER),
        (r"^RayJob/realign-run spec.submitterPodTemplate.*image: another image than the head's",),
    ),
)
