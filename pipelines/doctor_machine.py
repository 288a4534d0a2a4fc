"""`realign doctor`: packages, compilers, processors, GPUs and the limits of this machine."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

from components.limits import available_cpus, available_memory
from pipelines.doctor import Finding
from pipelines.machine import GIB, gpus

_DISTRIBUTION = "safety-realign"
_FILES_WANTED = 4096
"""Open files that Ray and a checkpoint of many shards take together."""
_SHM_SHARE = 0.1
"""Of the memory: what Ray's object store and data loaders want of /dev/shm at least."""


def package_findings() -> list[Finding]:
    """Installed packages beside what this version asks for."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in metadata.requires(_DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        return [Finding("wrong", "packages", f"{_DISTRIBUTION} is not installed", "pip install -e .")]
    bad = []
    needed = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    for one in needed:
        there = _version(one.name)
        if there is None:
            bad.append(f"{one.name} is missing")
        elif not one.specifier.contains(there, prereleases=True):
            bad.append(f"{one.name} is {there}, not {one.specifier}")
    shown = ", ".join(f"{name} {_version(name)}" for name in ("torch", "transformers", "ray", "deepspeed", "mlflow"))
    python = f"Python {platform.python_version()}, {_DISTRIBUTION} {_version(_DISTRIBUTION)}"
    if bad:
        remedy = "pip install -e . -c constraints.txt in the environment of this command"
        return [Finding("wrong", "packages", f"{python}: {'; '.join(bad)}", remedy)]
    return [Finding("ok", "packages", f"{python}, {shown}; all {len(needed)} as asked for")]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def tool_findings() -> list[Finding]:
    """The compiled kernels, and what DeepSpeed's own operations are compiled with."""
    from components.fusion.kernels import library

    found = []
    if library() is not None:
        found.append(Finding("ok", "kernels", "compiled: merges are made in one pass"))
    elif os.environ.get("REALIGN_KERNELS") == "0":
        found.append(Finding("note", "kernels", "switched off by REALIGN_KERNELS=0: merges take longer", "unset it"))
    else:
        remedy = "install a C compiler (Debian: gcc) and run pip install -e . again"
        found.append(Finding("note", "kernels", "not compiled: merges give the same bytes and take longer", remedy))
    missing = [name for name in ("g++", "ninja") if shutil.which(name) is None and not _beside_python(name)]
    if missing:
        remedy = (
            f"install {' and '.join(missing)} if masks are to be trained by several processes (execution.mask.ranks)"
        )
        found.append(Finding("note", "compiler", f"no {', no '.join(missing)}: DeepSpeed cannot build its ops", remedy))
    else:
        found.append(Finding("ok", "compiler", "g++ and ninja are there for DeepSpeed's operations"))
    return found


def _beside_python(name: str) -> bool:
    return (Path(sys.executable).parent / name).exists()


def device_findings() -> list[Finding]:
    """Processors, memory, GPUs, and whether torch can use them."""
    free = available_memory()
    grade: tuple[str, str] = ("ok", "")
    if free < 2 * GIB:
        grade = ("note", "end other work: testbed runs want 2 GiB; `realign plan CONFIG` says what a run takes")
    found = [Finding(grade[0], "machine", f"{available_cpus()} CPUs, {free / GIB:.1f} GiB of memory free", grade[1])]  # type: ignore[arg-type]
    cards = gpus()
    if not cards:
        return [
            *found,
            Finding("ok", "gpu", "none: everything runs on CPUs; to train masks of models of 7B and more takes GPUs"),
        ]
    import torch

    named = f"{len(cards)} GPUs, {min(cards) / GIB:.0f} GiB free on the fullest"
    if not torch.cuda.is_available():
        remedy = "install a CUDA build of torch that this driver can run, and look at CUDA_VISIBLE_DEVICES"
        return [*found, Finding("wrong", "gpu", f"{named}, which torch {torch.__version__} cannot use", remedy)]
    what = f"{named}, {torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}"
    if not torch.cuda.is_bf16_supported():
        return [*found, Finding("note", "gpu", f"{what}, without bf16", "set dtype: float32 or float16")]
    return [*found, Finding("ok", "gpu", what)]


def limit_findings() -> list[Finding]:
    """Limits on open files and shared memory."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = []
    if soft < _FILES_WANTED:
        remedy = f"ulimit -n {min(hard, 65536) if hard > 0 else 65536} before the run"
        found.append(Finding("note", "open files", f"at most {soft}, Ray and shards want {_FILES_WANTED}", remedy))
    else:
        found.append(Finding("ok", "open files", f"at most {soft}"))
    shm = Path("/dev/shm")
    if shm.is_dir():
        size, memory = shutil.disk_usage(shm).total, _memory()
        text = f"/dev/shm has {size / GIB:.1f} GiB"
        if size < _SHM_SHARE * memory:
            remedy = "in a container give it room: --shm-size, or a memory emptyDir at /dev/shm"
            found.append(Finding("note", "shared memory", f"{text}, little beside {memory / GIB:.0f} GiB", remedy))
        else:
            found.append(Finding("ok", "shared memory", text))
    return found


def _memory() -> int:
    text = Path("/proc/meminfo").read_text()
    match = re.search(r"MemTotal:\s+(\d+) kB", text)
    return 1024 * int(match[1]) if match else 0
