"""What a run can be given: memory, disk, processors and their speed, of this machine or of a cluster that is described."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from components.errors import ConfigError
from components.limits import available_cpus, available_memory
from pipelines.sections import ExecutionSection

GIB = 2**30
BYTES_PER_FLOP = 1 / 150
"""Memory traffic beside arithmetic on a GPU (an A100: 2 TB/s beside 312 TFLOP/s)."""
MASK_BYTES = 200
"""Memory traffic of the mask's arithmetic on a GPU, for a weight and step: two samplings, the fused weight, Adam."""


class Cluster(BaseModel):
    """Nodes that are all alike. Bytes are those of one node; `disk` is the workspace's, `offload_disk` that of
    execution.mask.offload_dir (None: the same)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    nodes: int = 1
    cpus: int
    """CPUs that stages share on the node of the driver."""
    memory: int
    disk: int
    offload_disk: int | None = None
    gpus: int = 0
    """Of one node."""
    gpu_memory: int = 0
    """Of one GPU."""


class Rates(BaseModel):
    """Speeds: of a CPU thread in arithmetic, memory traffic, SHA-256 and the mask's arithmetic (a weight and step), and of a
    GPU in arithmetic, where it was given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    flops: float
    bytes: float
    hashed: float
    mask_seconds: float
    gpu_flops: float | None = None


def this_machine(workspace: Path, execution: ExecutionSection) -> Cluster:
    """What is free here now, and on the disks where files are or will be; of the CPUs, those that stages are to share."""
    found = gpus()
    return Cluster(
        cpus=execution.workers or available_cpus(),
        memory=available_memory(),
        disk=_free(workspace),
        offload_disk=_free(execution.mask.offload_dir) if execution.mask.offload_dir else None,
        gpus=len(found),
        gpu_memory=min(found, default=0),
    )


def described(workspace: Path, execution: ExecutionSection, given: Mapping[str, float | None]) -> Cluster:
    """This machine, but for what is told (fields of Cluster; memory and disk in GiB). Raises ConfigError for GPUs whose memory
    is not known."""
    here, told = this_machine(workspace, execution), {k: v for k, v in given.items() if v is not None}
    scaled = {k: int(v * GIB) if k in ("memory", "disk", "gpu_memory") else int(v) for k, v in told.items()}
    if scaled.get("gpus") and not scaled.get("gpu_memory", here.gpu_memory):
        raise ConfigError("--gpus: say how large they are, with --gpu-memory GIB")
    if scaled.get("gpus") and "cpus" not in scaled and execution.workers is None:
        # A node with GPUs has CPUs for their ranks; how many this one has says nothing.
        scaled["cpus"] = max(here.cpus, 8 * scaled["gpus"])
    return here.model_copy(update={**scaled, **({"offload_disk": None} if "disk" in scaled else {})})


def _free(path: Path) -> int:
    """Bytes free where a directory is or will be."""
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def gpus() -> list[int]:
    """Free bytes of each GPU that this process may use. By the driver's own tool: asking through torch would open a context and
    keep half a GiB of each. Of a slice of a GPU (MIG), which the tool tells nothing more of, what its profile names, nearly."""
    told = _nvidia_smi("--query-gpu=index,uuid,memory.free", "--format=csv,noheader,nounits")
    rows = [[cell.strip() for cell in line.split(",")] for line in told.splitlines() if line.count(",") == 2]
    whole = [(index, uuid, int(free) * 2**20) for index, uuid, free in rows if free.isdigit()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [free for _, _, free in whole]
    if "MIG-" in visible:
        whole += [("", uuid, int(_MIG_SHARE * int(gib) * GIB)) for gib, uuid in _MIG.findall(_nvidia_smi("-L"))]
    found = []
    for wanted in visible.split(","):
        free = _free_of(wanted.strip(), whole)
        if free is None:
            break  # as CUDA does: what follows one that is not there is not seen
        found.append(free)
    return found


_MIG = re.compile(r"MIG \S*?(\d+)gb\S*\s+Device\s+\d+: \(UUID: (MIG-[^)]+)\)")
_MIG_SHARE = 0.95
"""Of the GB in a profile's name, what a slice has in GiB at least: `1g.5gb` has 4.75."""


def _free_of(wanted: str, there: Sequence[tuple[str, str, int]]) -> int | None:
    """Free bytes of what CUDA_VISIBLE_DEVICES names: an index, or the begin of one UUID."""
    if wanted.isdigit():
        return next((free for index, _, free in there if index == wanted), None)
    fits = [free for _, uuid, free in there if wanted.startswith(("GPU-", "MIG-")) and uuid.startswith(wanted)]
    return fits[0] if len(fits) == 1 else None


def _nvidia_smi(*arguments: str) -> str:
    """What it says; nothing where there is none, or where it fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    try:
        return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def measure(gpu_flops: float | None = None) -> Rates:
    """About half a second of work on one thread of this machine."""
    import hashlib

    import torch

    from components.masks.concrete import concrete_sample, interpolate_into, logistic_noise
    from components.masks.slices import PIECE

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a, b, out = (torch.full((512, 512), 0.5) for _ in range(3))
        matmul = _best(lambda: torch.mm(a, b, out=out))
        wide, other = torch.zeros(1 << 22), torch.ones(1 << 22)
        stream = _best(lambda: wide.copy_(other))
        raw = bytes(1 << 22)
        hashed = _best(lambda: hashlib.sha256(raw))
        logits, place = torch.zeros(PIECE), torch.zeros(PIECE)

        def mask() -> None:
            """Once forward; the gradient and Adam take about twice that again."""
            noise = logistic_noise(seed=0, step=0, segments=[("w", 0, PIECE)])
            interpolate_into(place, logits, place, concrete_sample(logits, noise, 1.0))

        masked = _best(mask)
    finally:
        torch.set_num_threads(threads)
    return Rates(
        flops=2 * 512**3 / matmul,
        bytes=2 * wide.nbytes / stream,
        hashed=len(raw) / hashed,
        mask_seconds=3 * masked / PIECE,
        gpu_flops=gpu_flops,
    )


def _best(work: Callable[[], object], seconds: float = 0.1) -> float:
    """The shortest of the runs that fit in so many seconds: what the machine can do when nobody else asks it to."""
    found: list[float] = []
    began = time.perf_counter()
    while not found or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)
