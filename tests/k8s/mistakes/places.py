"""What a mistake is, and where in rendered documents it is planted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.k8s.rendered import one

Documents = list[dict[str, Any]]


@dataclass(frozen=True)
class Mistake:
    """What is planted, and what is said of it: every finding matches one of `said`, and every one of `said` a finding."""

    name: str
    plant: Callable[[Documents], object]
    said: tuple[str, ...]
    overlay: str = "gpu"
    by_schema: bool = False
    """Found by a CRD's schema alone."""


def cluster(of: Documents) -> Any:
    return one(of, "RayCluster", "realign")["spec"]


def job(of: Documents) -> Any:
    return one(of, "RayJob", "realign-run")["spec"]


def cron(of: Documents) -> Any:
    return one(of, "RayCronJob", "realign-weekly")["spec"]


def head(of: Documents) -> Any:
    return cluster(of)["headGroupSpec"]["template"]["spec"]


def group(of: Documents, index: int) -> Any:
    return cluster(of)["workerGroupSpecs"][index]


def worker(of: Documents, index: int) -> Any:
    return group(of, index)["template"]["spec"]


def mlflow(of: Documents) -> Any:
    return one(of, "Deployment", "mlflow")["spec"]["template"]["spec"]["containers"][0]


def policy(of: Documents, name: str) -> Any:
    return one(of, "NetworkPolicy", name)["spec"]


def drop(of: Documents, kind: str, name: str) -> None:
    of.remove(one(of, kind, name))


def rename(of: Documents, kind: str, name: str, new: str) -> None:
    one(of, kind, name)["metadata"]["name"] = new


def same_group_name(of: Documents) -> None:
    group(of, 2)["groupName"] = "gpu-train"
