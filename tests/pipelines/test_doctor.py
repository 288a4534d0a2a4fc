"""`realign doctor`: what it finds on this machine, and what it says of one that is not fit."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from pipelines import doctor_disk
from pipelines.config import load_config
from pipelines.doctor import Finding, doctor_lines, examine, fit
from pipelines.doctor_disk import disk_findings
from pipelines.doctor_machine import limit_findings, package_findings, tool_findings
from pipelines.doctor_services import Services
from pipelines.machine import GIB, gpus
from tests.mlflow_server import ADMIN, PASSWORD, MlflowServer, create_user
from tests.pipelines.small import small_config, write_config

LOOKED_AT = {"packages", "kernels", "compiler", "machine", "gpu", "open files", "workspace", "disk speed", "leases"}


def doctor(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.cli", "doctor", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


def the(findings: Any, what: str) -> Finding:
    [found] = [one for one in findings if one.what == what]
    return found


@pytest.mark.multiproc
def test_a_fit_machine_is_found_fit_and_left_as_it_was(tmp_path: Path) -> None:
    done = doctor("--workspace", tmp_path / "new", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["fit"] is True
    assert {one["what"] for one in found["findings"]} >= LOOKED_AT | {"ray", "tracking", "tokens"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.multiproc
def test_what_is_wrong_keeps_nothing_else_from_being_looked_at(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "bad.yaml").write_text("name: x\nfinetunez: []\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
    done = doctor(tmp_path / "bad.yaml", "--workspace", tmp_path / "file" / "w", "--tracking-uri", uri)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr + done.stdout
    lines = done.stdout.splitlines()
    wrong = [line.split()[1] for line in lines if line.startswith("✗")]
    assert wrong == ["config", "workspace", "tracking"]
    assert "unknown key (did you mean 'finetunes'?)" in done.stdout
    assert f"no tracking server answers at {uri}" in done.stdout
    assert any(line.startswith("✓ ray ") for line in lines)
    assert lines[-1].startswith("3 wrong, ")


def test_packages_that_are_missing_or_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        metadata, "requires", lambda _: ["torch<1", "no-such-package>=2", "pytest", "x; extra == 'dev'"]
    )
    [found] = package_findings()
    assert found.grade == "wrong"
    assert f"torch is {metadata.version('torch')}, not <1; no-such-package is missing" in found.found
    assert "pip install" in found.remedy


def test_kernels_that_are_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from components.fusion.kernels import library

    monkeypatch.setenv("REALIGN_KERNELS", "0")
    library.cache_clear()
    try:
        assert the(tool_findings(), "kernels").grade == "note"
    finally:
        library.cache_clear()


def test_few_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))
    found = the(limit_findings(), "open files")
    assert (found.grade, found.remedy) == ("note", "ulimit -n 1024 before the run")


def test_a_disk_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    found = the(disk_findings(tmp_path), "leases")
    assert found.grade == "wrong"
    assert "Operation not supported" in found.found
    assert list(tmp_path.iterdir()) == []


def test_links_that_replace_do_not_hold_a_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", lambda *_: None)
    assert the(disk_findings(tmp_path), "leases").grade == "wrong"


def test_a_slow_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_disk, "_SAMPLE_BYTES", 1 << 20)
    monkeypatch.setattr(doctor_disk, "_SLOW_BYTES", 1 << 60)
    found = the(disk_findings(tmp_path), "disk speed")
    assert found.grade == "note"
    assert "MiB/s" in found.found


def test_tokens_are_asked_for_by_need_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path, finetunes=("zh",))
    config["evaluation"]["judge"] = {
        "kind": "rubric", "url": "http://127.0.0.1:9/v1", "model": "m", "key_variable": "JUDGE_KEY",
    }  # fmt: skip
    config["evaluation"]["sets"].append({"known": "advbench", "revision": "0" * 40, "split": "test"})
    services = Services(load_config(write_config(tmp_path, config)), tmp_path, "https://tracking.example")
    for name in ("HF_TOKEN", "JUDGE_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    unset = services.tokens()
    assert [one.grade for one in unset] == ["note"] * 3
    assert [one.found.split()[0] for one in unset] == ["HF_TOKEN", "JUDGE_KEY", "MLFLOW_TRACKING_TOKEN"]
    for name in ("HF_TOKEN", "JUDGE_KEY", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "hidden-value")
    found = services.tokens()
    assert [one.grade for one in found] == ["ok"] * 3
    assert "hidden-value" not in "\n".join(doctor_lines(found))


def test_a_check_that_breaks_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> list[Finding]:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(Services, "ray", lambda _: [])
    monkeypatch.setattr(doctor_disk, "_SAMPLE_BYTES", 1 << 20)
    monkeypatch.setattr("pipelines.doctor_machine.device_findings", lambda: broken(None))
    findings = examine(None, tmp_path, None)
    assert the(findings, "devices").found == "ZeroDivisionError: by zero"
    assert all(one.remedy for one in findings if one.grade == "wrong")
    assert the(findings, "tokens").grade == "ok"
    assert not fit(findings)


@pytest.mark.service
def test_a_server_that_lets_in_some_and_others_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient
    from mlflow.entities import ViewType
    from mlflow.server.auth.client import AuthServiceClient

    config = load_config(write_config(tmp_path, small_config(tmp_path, finetunes=("zh",))))
    server = MlflowServer(tmp_path, authenticated=True).start()
    client = MlflowClient(server.uri, server.uri)

    def log_in(user: str, password: str) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)

    def found(user: str, password: str, *, with_config: bool = True) -> Finding:
        log_in(user, password)
        [finding] = Services(config if with_config else None, tmp_path, server.uri).tracking()
        return finding

    try:
        create_user(server.uri, "reader")
        wrong = found("reader", "no password of his")
        assert (wrong.grade, "does not take" in wrong.found, "MLFLOW_TRACKING_PASSWORD" in wrong.remedy) == (
            "wrong", True, True,
        )  # fmt: skip
        mine = found(*ADMIN)
        assert (mine.grade, "lets this user write to the experiment small, its artifacts and" in mine.found) == (
            "ok",
            True,
        )
        # Nothing is left to see, and the run to come has its name.
        assert [one.name for one in client.search_experiments()] == ["Default"]
        assert client.search_registered_models() == []
        made = [
            one for one in client.search_experiments(view_type=ViewType.ALL) if one.name.startswith("realign-doctor")
        ]
        [run] = client.search_runs([made[0].experiment_id], run_view_type=ViewType.ALL)
        assert (len(made), run.info.lifecycle_stage) == (1, "deleted")
        assert len(list((tmp_path / "artifacts").rglob("realign-doctor.txt"))) == 1

        experiment = client.create_experiment("small")
        assert "the experiment small (403)" in found("reader", PASSWORD).found
        log_in(*ADMIN)
        AuthServiceClient(server.uri).grant_user_permission("reader", "experiment", experiment, "EDIT")
        writes = found("reader", PASSWORD)
        assert (writes.grade, "'realign doctor' stays in small, for" in writes.found) == ("ok", True), writes
        log_in(*ADMIN)
        assert [one.info.status for one in client.search_runs([experiment])] == ["KILLED"]
        log_in(*ADMIN)
        client.create_registered_model("small-zh")
        denied = found("reader", PASSWORD)
        assert (denied.grade, "the registered model small-zh (403)" in denied.found) == ("wrong", True)
        assert denied.remedy.startswith("have EDIT on it granted")
        assert "lets this user read" in found("reader", PASSWORD, with_config=False).found
        log_in(*ADMIN)
        AuthServiceClient(server.uri).grant_user_permission("reader", "registered_model", "small-zh", "EDIT")
        assert found("reader", PASSWORD).grade == "ok"
        assert client.get_registered_model("small-zh").tags == {}
        (artifacts := tmp_path / "artifacts").rename(tmp_path / "away")
        artifacts.touch()
        assert found(*ADMIN).grade == "wrong", "artifacts cannot be written"
    finally:
        server.kill()


def test_no_database_is_made(tmp_path: Path) -> None:
    [found] = Services(None, tmp_path, f"sqlite:///{tmp_path}/new.db").tracking()
    assert (found.grade, "new.db yet: a run makes it" in found.found) == ("ok", True)
    assert list(tmp_path.iterdir()) == []


def test_the_environment_names_the_server_unless_somebody_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:s3cret@tracking.example")
    services = Services(None, tmp_path, None)
    [found] = services.tracking()
    assert (found.grade, found.found) == (
        "wrong",
        "https://…@tracking.example: an address is shown and logged, so no name and no password may be in it",
    )
    assert found.remedy.startswith("set MLFLOW_TRACKING_USERNAME")
    assert "new.db" in Services(None, tmp_path, f"sqlite:///{tmp_path}/new.db").tracking()[0].found


_SMI = """#!/bin/sh
case "$1" in
-L) cat <<'END'
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
  MIG 1g.5gb      Device  0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)
  MIG 3g.20gb+me  Device  1: (UUID: MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d7-11ed-4a2b-8a5e-000000000000)
END
;;
*) printf '0, GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77, 1024\n1, GPU-5d5ba0d7-11ed-4a2b-8a5e-000000000000, 2048\n' ;;
esac
"""


@pytest.mark.parametrize(
    ("visible", "gib"),
    [
        (None, [1, 2]),
        ("1,0", [2, 1]),
        ("", []),
        ("1,-1,0", [2]),
        ("GPU-5d5ba0d7", [2]),
        ("GPU-5d5ba0d", []),
        ("MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb", [19]),
        ("MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f,MIG-cb", [4.75, 19]),
    ],
)
def test_gpus_that_the_environment_names(
    visible: str | None, gib: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CUDA reads it: indices, UUIDs, begins of them that fit one, and slices of GPUs."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(_SMI)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [free / GIB for free in gpus()] == gib


def test_the_version() -> None:
    for option, said in (("--version", f"realign {metadata.version('safety-realign')}\n"), ("--help", "--version")):
        done = subprocess.run(
            [sys.executable, "-m", "pipelines.cli", option], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert said in done.stdout
