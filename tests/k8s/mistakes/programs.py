"""Pods that are well-formed and in which no run can work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.k8s.mistakes.places import Documents, Mistake, cluster, cron, job, worker
from tests.k8s.rendered import one

OTHER = f"ghcr.io/example/realign@sha256:{'1' * 64}"


def _unmount(pod: Any, path: str) -> None:
    container = pod["containers"][0]
    container["volumeMounts"] = [m for m in container["volumeMounts"] if m["mountPath"] != path]


def _everywhere(path: str) -> Callable[[Documents], object]:
    def plant(of: Documents) -> None:
        for spec in (cluster(of), job(of)["rayClusterSpec"], cron(of)["jobTemplate"]["rayClusterSpec"]):
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


def _entrypoint(text: str) -> Callable[[Documents], object]:
    return lambda d: job(d).update(entrypoint=text)


def _read_only(of: Documents) -> None:
    mounts = worker(of, 1)["containers"][0]["volumeMounts"]
    next(m for m in mounts if m["mountPath"] == "/workspace")["readOnly"] = True


def _mode(*modes: str) -> Callable[[Documents], object]:
    return lambda d: one(d, "PersistentVolumeClaim", "realign-workspace")["spec"].update(accessModes=list(modes))


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
