"""Every overlay renders, has nothing wrong, and keeps to the names that the other parts know."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from k8s.check.documents import Documents, render
from k8s.check.references import SECRETS
from k8s.check.room import ray_resources
from k8s.check.rules import notes
from tests.k8s.rendered import CRDS, OVERLAYS, ROOT, documents, findings, needs_crds, needs_kubectl, one

pytestmark = needs_kubectl


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_is_wrong_with_an_overlay_and_its_run(overlay: str) -> None:
    assert findings(documents(overlay)) == []


@needs_crds
def test_every_custom_kind_has_a_schema() -> None:
    from k8s.check.schemas import strict_crds

    custom = {(d["apiVersion"], d["kind"]) for o in OVERLAYS for d in documents(o) if "ray.io" in d["apiVersion"]}
    custom |= {(d["apiVersion"], d["kind"]) for o in OVERLAYS for d in documents(o) if "kueue" in d["apiVersion"]}
    assert {kind for _, kind in custom} == {
        "RayCluster", "RayJob", "RayCronJob", "ResourceFlavor", "ClusterQueue", "LocalQueue",
    }  # fmt: skip
    assert custom <= set(strict_crds(CRDS))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_names_are_those_that_the_other_parts_know(overlay: str) -> None:
    all_of_it = Documents(documents(overlay))
    for kind, names in {
        "Namespace": {"realign"},
        "ServiceAccount": {"realign-ray", "realign-pipeline"},
        "RayCluster": {"realign"},
        "RayJob": {"realign-run"},
        "PersistentVolumeClaim": {"realign-workspace", "realign-models"},
        "ConfigMap": {"realign-config"},
        "Service": {"mlflow", "mlflow-postgres", "realign-redis"},
        "ClusterQueue": {"realign"},
        "LocalQueue": {"realign"},
    }.items():
        assert names <= all_of_it.names(kind), kind
    job = one(all_of_it.all, "RayJob", "realign-run")
    assert job["spec"]["entrypoint"] == "realign run /etc/realign/realign.yaml --workspace /workspace/run"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "realign"
    settings = one(all_of_it.all, "ConfigMap", "realign-settings")["data"]
    assert settings["MLFLOW_TRACKING_URI"] == "http://mlflow.realign.svc:5000"
    assert settings["RAY_AUTH_MODE"] == "token"
    for cluster in all_of_it.clusters:
        mounts = cluster.spec["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
        assert {"/workspace", "/models", "/etc/realign"} <= {m["mountPath"] for m in mounts}


def test_groups_start_from_zero_and_only_gpu_overlays_have_gpus() -> None:
    groups = {o: one(documents(o), "RayCluster", "realign")["spec"]["workerGroupSpecs"] for o in OVERLAYS}
    assert [g["groupName"] for g in groups["local"]] == ["cpu"]
    assert [g["groupName"] for g in groups["gpu"]] == ["cpu", "gpu-train", "gpu-eval"]
    assert {g["minReplicas"] for o in OVERLAYS for g in groups[o]} == {0}
    assert {g["replicas"] for o in OVERLAYS for g in groups[o]} == {0}
    pods = yaml.safe_dump([pod.spec for pod in Documents(documents("local")).pods])
    assert "nvidia" not in pods
    assert "nvidia.com/gpu" in yaml.safe_dump([pod.spec for pod in Documents(documents("gpu")).pods])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_autoscaler_sees_what_groups_without_nodes_are_for(overlay: str) -> None:
    pytest.importorskip("ray")
    from ray.autoscaler._private.kuberay.autoscaling_config import _get_ray_resources_from_group_spec

    groups = one(documents(overlay), "RayCluster", "realign")["spec"]["workerGroupSpecs"]
    seen = {g["groupName"]: _get_ray_resources_from_group_spec(g, is_head=False) for g in groups}
    uses = {name: {k: n for k, n in has.items() if k.startswith("realign_")} for name, has in seen.items()}
    expected = {"cpu": {}, "gpu-train": {"realign_train": 8}, "gpu-eval": {"realign_eval": 1}}
    assert uses == {name: expected[name] for name in seen}
    assert {name: has.get("GPU", 0) for name, has in seen.items()} == {n: sum(u.values()) for n, u in uses.items()}
    for group in groups:
        counted = {k: n for k, n in seen[group["groupName"]].items() if k != "memory"}
        assert ray_resources(group) == counted


def test_a_job_has_the_cluster_of_the_overlay_but_keeps_no_state_in_redis() -> None:
    for overlay in OVERLAYS:
        whole = documents(overlay)
        standing = one(whole, "RayCluster", "realign")["spec"]
        job = one(whole, "RayJob", "realign-run")["spec"]["rayClusterSpec"]
        cron = one(whole, "RayCronJob", "realign-weekly")["spec"]["jobTemplate"]["rayClusterSpec"]
        assert standing.pop("gcsFaultToleranceOptions")["redisAddress"] == "redis://realign-redis:6379"
        assert cron["headGroupSpec"]["template"]["metadata"]["labels"].pop("realign/run") == "realign-weekly"
        assert cron == standing
        assert job["headGroupSpec"]["template"]["metadata"]["labels"].pop("realign/run") == "realign-run"
        assert job == standing


def test_only_rdma_adds_ipc_lock_and_only_to_training() -> None:
    adding = {
        (overlay, container.path)
        for overlay in OVERLAYS
        for pod in Documents(documents(overlay)).pods
        for container in pod.containers
        if "add" in container.spec["securityContext"]["capabilities"]
    }
    assert {overlay for overlay, _ in adding} == {"gpu-rdma"}
    assert {path.partition("workerGroupSpecs")[2] for _, path in adding} == {"[1].template.spec.containers[0]"}
    level = "pod-security.kubernetes.io/enforce"
    assert one(documents("gpu-rdma"), "Namespace", "realign")["metadata"]["labels"][level] == "privileged"
    assert one(documents("gpu"), "Namespace", "realign")["metadata"]["labels"][level] == "restricted"


def test_nobody_is_given_rights() -> None:
    """KubeRay gives the autoscaler its own; nothing here needs more."""
    for overlay in OVERLAYS:
        assert not Documents(documents(overlay)).of(
            "Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding", "Secret"
        )


def test_the_readme_makes_every_secret_that_the_manifests_name() -> None:
    text = (ROOT / "k8s" / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"kubectl -n realign create secret generic (\S+) ([^\n]*)", text)
    made = {name: frozenset(re.findall(r"--from-literal=([A-Za-z_-]+)=", rest)) for name, rest in commands}
    assert made == SECRETS


def test_a_shipped_storage_class_is_yours_to_fill_in() -> None:
    for overlay in OVERLAYS:
        told = [note for note in notes(documents(overlay)) if "storage class" in note]
        claims = "PersistentVolumeClaim/realign-models, PersistentVolumeClaim/realign-workspace: "
        assert [note.startswith(claims) for note in told] == [True] * (overlay != "local")


def test_the_first_run_of_the_readme_fills_in_both_digests(tmp_path: Path) -> None:
    text = (ROOT / "k8s" / "README.md").read_text()
    walk = text[text.index("## The first run on") : text.index("## The first scheduled run")]
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    command = re.search(r"^sed .*?(?<!\\)$", walk, re.MULTILINE | re.DOTALL)
    assert command
    given = {"REGISTRY": "localhost:5000", "REALIGN": f"sha256:{'a' * 64}", "MLFLOW": f"sha256:{'b' * 64}"}
    subprocess.run(["bash", "-euc", command[0]], cwd=tmp_path, env=os.environ | given, check=True)
    local = tmp_path / "k8s" / "overlays" / "local"
    whole = [*render(local), *render(local / "run")]
    assert list(notes(whole)) == [n for n in notes(documents("local")) if "placeholder" not in n]
    images = {c.spec.get("image") for p in Documents(whole).pods for c in p.containers}
    assert {f"localhost:5000/realign@sha256:{'a' * 64}", f"ghcr.io/mlflow/mlflow@sha256:{'b' * 64}"} < images


@pytest.mark.parametrize("path", sorted((ROOT / "k8s").rglob("realign.yaml")), ids=lambda p: p.parent.name)
def test_shipped_run_configs_say_nothing_wrong(path) -> None:  # type: ignore[no-untyped-def]
    """All that a config lacks here is the files of the cluster's volumes."""
    from components.errors import ConfigError
    from pipelines.config import load_config

    with pytest.raises(ConfigError) as refused:
        load_config(path)
    for line in str(refused.value).splitlines():
        assert re.search(r": no (directory|file) /(models|workspace)/", line), line
