"""The Dockerfile and what belongs to it, without a container engine: its checks are run as they stand there."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

TOP = Path(__file__).parents[2]
IMAGE = TOP / "k8s/image"
DIGEST = "sha256:" + "0123456789abcdef" * 4


class Step(NamedTuple):
    """An instruction of the Dockerfile and the rest of its line."""

    name: str
    rest: str


def _steps() -> list[Step]:
    lines = [line for line in (IMAGE / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [Step(*line.strip().split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


STEPS = _steps()


def _of(name: str) -> list[str]:
    return [step.rest for step in STEPS if step.name == name]


def _run(having: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the one RUN step that has this text, as sh does in a build."""
    (script,) = [rest for rest in _of("RUN") if having in rest]
    return subprocess.run(["sh", "-c", script], env={"PATH": os.environ["PATH"], **env}, capture_output=True, text=True)


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"image_{name}", IMAGE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _pins(path: Path) -> dict[str, str]:
    return dict(line.split("==") for line in path.read_text().splitlines() if "==" in line)


@pytest.mark.parametrize(
    "base",
    [
        "",
        "rayproject/ray:2.60.0-py311-cpu",
        f"rayproject/ray@{DIGEST[:-1]}",
        f"{DIGEST}",
        f"rayproject/ray@{DIGEST}:new",
    ],
)
def test_a_base_that_may_move_is_refused_and_the_message_says_how_to_find_its_digest(base: str) -> None:
    done = _run("@sha256:", BASE=base)
    assert done.returncode == 1
    assert f"BASE={base} has no digest" in done.stderr
    ray = _pins(TOP / "constraints.txt")["ray"]
    assert f"crane digest rayproject/ray:{ray}-py311-cpu" in done.stderr
    assert "imagetools inspect" in done.stderr


def test_a_base_by_digest_is_taken_and_there_is_none_by_default() -> None:
    assert _run("@sha256:", BASE=f"rayproject/ray@{DIGEST}").returncode == 0
    assert STEPS[0] == Step("ARG", "BASE")
    assert not [rest for rest in _of("ARG") if rest.startswith("BASE=")]


def test_every_stage_stands_on_that_base() -> None:
    stages: set[str] = set()
    for rest in _of("FROM"):
        image, *named = rest.split(" AS ")
        assert image == "${BASE}" or image in stages, f"FROM {rest}"
        stages.update(named)
    assert {rest.split()[0].removeprefix("--from=") for rest in _of("COPY") if "--from=" in rest} <= stages
    assert not re.search(r":latest\b", (IMAGE / "Dockerfile").read_text())


@pytest.mark.parametrize(
    ("variant", "cuda", "taken"),
    [
        ("cpu", "", True),
        ("cpu", "12.8.1", True),  # CPU groups may run on a CUDA base
        ("cu130", "13.0.2", True),
        ("cu132", "13.0.2", True),
        ("cu130", "12.8.1", False),
        ("cu130", "", False),
        ("cuda", "13.0.2", False),
        ("", "13.0.2", False),
    ],
)
def test_a_cuda_variant_needs_a_base_of_its_major_version(variant: str, cuda: str, taken: bool) -> None:
    done = _run("CUDA_VERSION", VARIANT=variant, **({"CUDA_VERSION": cuda} if cuda else {}))
    assert (done.returncode == 0) is taken
    assert taken or f"VARIANT={variant}" in done.stderr


def test_it_ends_as_a_user_without_rights_and_leaves_no_setuid_bits() -> None:
    last = max(number for number, step in enumerate(STEPS) if step.name == "FROM")
    users = [step.rest for step in STEPS[last:] if step.name == "USER"]
    assert users == ["1000"]  # a number: runAsNonRoot cannot judge a name
    (strip,) = [rest for rest in _of("RUN") if "apt-get install" in rest]
    assert "-perm /6000 -exec chmod a-s" in strip


def test_whatever_is_installed_is_pinned_and_no_cache_stays() -> None:
    for run in (rest for rest in _of("RUN") if "pip install" in rest):
        assert "-c constraints.txt -c build-constraints.txt" in run or "--no-index --no-deps" in run
        assert "--no-cache-dir" in run or "PIP_NO_CACHE_DIR=1" in " ".join(_of("ENV"))
    (installs,) = [rest for rest in _of("RUN") if "-m venv" in rest]
    steps = [one.strip() for one in installs.split(";")]
    assert [one for one in steps if one.startswith("/opt/realign/bin/python -m pip") and "check" not in one] == []
    assert sum("$install " in one for one in steps if not one.startswith("install=")) == 4
    for run in (rest for rest in _of("RUN") if "apt-get" in rest):
        assert "rm -rf /var/lib/apt/lists/*" in run
    pinned = _pins(IMAGE / "build-constraints.txt")
    (asked,) = tomllib.loads((TOP / "pyproject.toml").read_text())["build-system"]["requires"]
    assert asked.startswith("setuptools>=")
    assert int(pinned["setuptools"].split(".")[0]) >= int(asked.removeprefix("setuptools>="))


def test_labels_come_from_arguments_and_the_health_check_is_there() -> None:
    (labels,) = _of("LABEL")
    told = dict(part.split("=", 1) for part in shlex.split(labels))
    prefix = "org.opencontainers.image."
    for key, value in {
        "version": "$VERSION",
        "revision": "$REVISION",
        "source": "$SOURCE",
        "base.name": "$BASE",
    }.items():
        assert told[prefix + key] == value
        assert value[1:] in _of("ARG")
    licence = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["license"]
    assert told[prefix + "licenses"] == licence
    (health,) = _of("HEALTHCHECK")
    assert "/opt/realign/share/healthcheck.py" in health
    (files,) = [rest for rest in _of("COPY") if rest.endswith(" /opt/realign/share/")]
    assert {"k8s/image/healthcheck.py", "k8s/image/verify.py", "constraints.txt"} <= set(files.split())


def test_deepspeeds_operation_is_compiled_into_its_package_and_the_rest_may_be_compiled_in_tmp() -> None:
    found = importlib.util.find_spec("deepspeed")
    assert found is not None
    assert found.submodule_search_locations is not None
    source = Path(found.submodule_search_locations[0]) / "ops/op_builder/cpu/comm.py"
    (builder,) = [
        one
        for one in ast.parse(source.read_text()).body
        if isinstance(one, ast.ClassDef) and one.name == "ShareMemCommBuilder"
    ]
    (switch,) = [
        ast.literal_eval(one.value)
        for one in builder.body
        if isinstance(one, ast.Assign) and ast.unparse(one.targets[0]) == "BUILD_VAR"
    ]
    (installs,) = [rest for rest in _of("RUN") if "-m venv" in rest]
    assert re.search(rf"DS_ACCELERATOR=cpu {switch}=1 \$install -r requirements.txt", installs)
    assert installs.index("$install --no-deps --index-url") < installs.index(f"{switch}=1")
    (env,) = [rest for rest in _of("ENV") if "TORCH_EXTENSIONS_DIR" in rest]
    assert "TORCH_EXTENSIONS_DIR=/tmp/" in env
    assert "HOME=/tmp" in env


def _let_in(path: str) -> bool:
    """Whether .dockerignore lets a file into the build: the last line that matches it or a folder above it decides."""
    kept = True
    for line in (TOP / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = re.escape(line.lstrip("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        above = ["/".join(path.split("/")[:depth]) for depth in range(1, path.count("/") + 2)]
        if any(re.fullmatch(pattern, one) for one in above):
            kept = line.startswith("!")
    return kept


def test_what_is_copied_exists_and_is_let_into_the_build() -> None:
    sources = [one for rest in _of("COPY") if "--from=" not in rest for one in rest.split()[:-1]]
    assert len(sources) > 8
    for source in sources:
        assert (TOP / source).exists(), source
        files = list((TOP / source).rglob("*.py")) if (TOP / source).is_dir() else [TOP / source]
        assert files
        for file in files:
            assert _let_in(file.relative_to(TOP).as_posix()), file
    assert _let_in("components/reporting/style.html.j2")
    assert _let_in("components/py.typed")


@pytest.mark.parametrize(
    "path",
    [
        ".git/config", ".git", ".venv/bin/python", ".env", "runs/demo/summary.json", "shared/notes.md", "pip.conf",
        "components/.env", "components/tracking/prod.env", "ray_jobs/id.key", "pipelines/tls/server.pem",
        "components/fusion/_kernels.cpython-311-x86_64-linux-gnu.so", "components/__pycache__/deltas.cpython-311.pyc",
        "k8s/base/storage.yaml", "k8s/image/.secret", "tests/conftest.py", "realign.yaml",
    ],
)  # fmt: skip
def test_nothing_else_gets_into_a_build(path: str) -> None:
    assert not _let_in(path)


def test_what_is_installed_is_held_to_the_constraints(tmp_path: Path) -> None:
    verify = _module("verify")
    given = tmp_path / "constraints.txt"
    given.write_text((TOP / "constraints.txt").read_text())
    assert [line for line in verify.unpinned(given) if line.startswith(("torch ", "ray ", "pyyaml "))] == []
    ray = version("ray")
    given.write_text(given.read_text().replace(f"ray=={ray}", "ray==1.0").replace("PyYAML==", "NotYAML=="))
    found = list(verify.unpinned(given))
    assert f"ray {ray} is installed, constraints.txt has 1.0" in found
    assert f"pyyaml {version('PyYAML')} is installed, and constraints.txt does not have it" in found


def test_torch_is_held_to_the_variant() -> None:
    import torch

    built = "cpu" if torch.version.cuda is None else "cu" + "".join(torch.version.cuda.split(".")[:2])
    verify = _module("verify")
    assert list(verify.other_torch(built)) == []
    assert list(verify.other_torch("cu118")) == [
        f"torch {torch.__version__} is built for {built}, not cu118: look at TORCH_INDEX"
    ]


def test_requirements_are_those_of_the_project(capsys: pytest.CaptureFixture[str]) -> None:
    _module("requirements").main(str(TOP / "pyproject.toml"))
    printed = capsys.readouterr().out.split("\n")
    assert "torch==2.13.0" in printed
    assert "ray[default,tune,train]>=2.60,<3" in printed


@pytest.fixture
def agent() -> Iterator[tuple[str, list[int]]]:
    """An agent of Ray's stand-in: its address, and the status that it answers with next."""
    answers = [200]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answers[0] if self.path == "/api/healthz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/api/healthz", answers
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_health_check_asks_rays_agent_where_a_raylet_runs(
    tmp_path: Path, agent: tuple[str, list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    address, answers = agent
    check = _module("healthcheck").main
    (tmp_path / "7").mkdir()
    (tmp_path / "7/comm").write_text("python\n")
    (tmp_path / "8").mkdir()  # has ended: no comm
    nobody = "http://127.0.0.1:9/api/healthz"
    assert check(tmp_path, nobody) == 0  # nothing to ask
    (tmp_path / "7/comm").write_text("raylet\n")
    assert check(tmp_path, address) == 0
    assert check(tmp_path, nobody) == 1
    answers[0] = 503
    assert check(tmp_path, address) == 1
    assert "503" in capsys.readouterr().err
