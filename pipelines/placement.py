"""Whether mask training fits a cluster, and which way of spreading it would: estimates of components/masks/memory.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from components.checkpoints.dimensions import Dimensions
from components.errors import ConfigError
from components.masks.memory import Lengths, RankMemory, Weight, rank_memory, training_disk
from components.masks.settings import MaskSettings
from components.masks.zero import MaskExecution, Offload
from pipelines.machine import GIB, Cluster
from pipelines.sections import ExecutionSection

MARGIN = 1.5
"""A run is refused when the estimate is more than this times what there is: activations are estimated for one kind of layer."""
Device = Literal["cpu", "cuda"]
_STAGE = {0: 0.10, 1: 0.05, 2: 0.06, 3: 0.25}
_OFFLOAD: dict[Offload, float] = {"none": 0.0, "cpu": 0.5, "nvme": 2.0}
_OFFLOAD_WEIGHTS: dict[Offload, float] = {"none": 0.0, "cpu": 0.4, "nvme": 2.5}
"""Time that a choice adds to a step's, as a share of it. Assumed: nothing but the order of proposals hangs on it."""
_CHECKPOINTING = 1 / 3
"""One more forward beside a forward and a backward twice as dear."""
_PART, _RANK = 0.05, 0.02
"""What doubling `accumulate` and each rank more add."""


@dataclass(frozen=True)
class Training:
    """One mask that a run trains."""

    label: str
    """Whose it is, as messages say it: a finetune's or merge's name, or `the control paper of <name>`."""
    weights: Sequence[Weight]
    dimensions: Dimensions
    lengths: Lengths
    settings: MaskSettings

    def memory(self, execution: MaskExecution) -> RankMemory:
        """Of the rank with most."""
        return rank_memory(self.weights, self.dimensions, self.lengths, self.settings, execution)


@dataclass(frozen=True)
class Need:
    """What trainings side by side take of a cluster, in bytes, beside what there is."""

    device: int
    host: int
    state: int
    """Resumable state on the workspace's disk."""
    offload: int
    """Files for nvme."""
    side_by_side: int
    cluster: Cluster

    @property
    def disk(self) -> int:
        """All of it, while it runs."""
        return self.state + self.offload

    def over_memory(self, margin: float = 1.0) -> list[tuple[str, int, int]]:
        """(what, needed, there is) of memory that does not fit."""
        there = {
            "GPU memory": (self.device, self.cluster.gpu_memory),
            "host memory": (self.host, self.cluster.memory),
        }
        return [(what, need, has) for what, (need, has) in there.items() if need > margin * has]

    def over(self) -> list[tuple[str, int, int]]:
        """The same with disks."""
        disk, apart = self.cluster.disk, self.cluster.offload_disk
        if apart is None:
            disks = {"disk": (self.disk, disk)}
        else:
            disks = {"disk": (self.state, disk), "disk at execution.mask.offload_dir": (self.offload, apart)}
        return self.over_memory() + [(what, need, has) for what, (need, has) in disks.items() if need > has]


def on_gpu(execution: MaskExecution) -> bool:
    """Whether ranks take GPUs."""
    return execution.device == "cuda"


def side_by_side(execution: MaskExecution, cluster: Cluster, *, threads: int, trainings: int) -> int:
    """How many trainings the driver lets run at once; 0: there are too few CPUs or GPUs for one."""
    slots = cluster.nodes * cluster.cpus // (execution.ranks * min(threads, cluster.cpus))
    if on_gpu(execution):
        slots = min(slots, cluster.nodes * cluster.gpus // execution.ranks)
    return min(trainings, slots)


def need(training: Training, execution: MaskExecution, cluster: Cluster, together: int) -> Need:
    """What `together` trainings like this one take. A node has as many ranks as are left to it when all are spread evenly."""
    memory = training.memory(execution)
    ranks = execution.ranks * together
    return Need(
        device=memory.peak("device"),
        host=math.ceil(ranks / cluster.nodes) * memory.peak("host"),
        state=together * training_disk(training.weights, training.settings),
        offload=ranks * memory.peak("disk"),
        side_by_side=together,
        cluster=cluster,
    )


def cost(execution: MaskExecution) -> float:
    """Device time of a step, where one process with nothing spread takes 1."""
    alone = execution.ranks == 1
    return (
        1.0
        + (0.0 if alone else _STAGE[execution.stage])
        + _OFFLOAD[execution.offload]
        + _OFFLOAD_WEIGHTS[execution.offload_weights]
        + (_CHECKPOINTING if execution.activation_checkpointing else 0.0)
        + _PART * math.log2(execution.accumulate)
        + _RANK * (execution.ranks - 1)
    )


@dataclass(frozen=True)
class Proposal:
    """Settings that fit; `workers` where fewer trainings must run side by side than would, or one's ranks need more CPUs."""

    execution: MaskExecution
    workers: int | None
    need: Need

    def changes(self, configured: MaskExecution) -> dict[str, Any]:
        """What of `execution` to write otherwise."""
        new, old = self.execution.model_dump(mode="json"), configured.model_dump(mode="json")
        mask = {key: value for key, value in new.items() if old[key] != value}
        return {**({"mask": mask} if mask else {}), **({"workers": self.workers} if self.workers else {})}


def propose(
    trainings: Sequence[Training], configured: MaskExecution, cluster: Cluster, *, threads: int
) -> Proposal | None:
    """The least costly settings with which the largest training fits beside as many others as would run; None: none does."""
    devices: tuple[Device, ...] = ("cuda", "cpu") if cluster.gpus else ("cpu",)
    found = [one for device in devices for one in _candidates(configured, device, cluster, threads, trainings)]

    def usual(execution: MaskExecution) -> int:
        return side_by_side(execution, cluster, threads=threads, trainings=len(trainings))

    # A CPU takes many times a GPU's time, whatever is spread how; 0 side by side: GPUs whose ranks lack CPUs.
    found.sort(key=lambda c: (devices.index(c[1].device), usual(c[1]) == 0, c[0], c[1].ranks))
    largest = max(trainings, key=lambda t: sum(w.numel for w in t.weights))
    for _, execution, together in found:
        needed = need(largest, execution, cluster, together)
        if not needed.over():
            workers = together * execution.ranks * threads if together != usual(execution) else None
            return Proposal(execution, workers, needed)
    return None


def _candidates(
    configured: MaskExecution, device: Device, cluster: Cluster, threads: int, trainings: Sequence[Training]
) -> Iterator[tuple[float, MaskExecution, int]]:
    """(cost of all trainings, settings, how many side by side)."""
    batch, gpu = trainings[0].settings.batch_size, device == "cuda"
    most = cluster.nodes * (cluster.gpus if gpu else cluster.cpus // threads)
    for ranks in _doublings(1, max(most, 1)):
        for stage in (1, 2, 3) if ranks > 1 or gpu else (configured.stage,):
            for offload in ("none", "cpu", "nvme") if gpu else ("none", "nvme"):
                for weights in ("none", "cpu", "nvme") if gpu else ("none", "nvme"):
                    if weights != "none" and (stage != 3 or (ranks == 1 and not gpu)):
                        continue
                    for accumulate in _doublings(1, -(-batch // ranks)):
                        for checkpointing in (False, True):
                            execution = configured.model_copy(
                                update={
                                    "ranks": ranks,
                                    "stage": stage,
                                    "offload": offload,
                                    "offload_weights": weights,
                                    "accumulate": accumulate,
                                    "activation_checkpointing": checkpointing,
                                    "device": device,
                                }
                            )
                            usual = side_by_side(execution, cluster, threads=threads, trainings=len(trainings))
                            for together in {1, usual} - {0}:
                                idle = max(usual, 1) / together
                                yield cost(execution) * idle, execution, together


def _doublings(first: int, most: int) -> Iterator[int]:
    while first <= most:
        yield first
        first *= 2


def require_fit(
    trainings: Sequence[Training], execution: ExecutionSection, cluster: Cluster, *, refuse: bool = True
) -> bool:
    """Whether all may well fit. Raises ConfigError, if it is to `refuse`, when one clearly does not: what it needs, what there
    is, what would fit. Memory alone refuses: state of an interrupted training may be on the disk already."""
    configured, threads = execution.mask, execution.threads
    together = side_by_side(configured, cluster, threads=threads, trainings=len(trainings))
    largest = max(trainings, key=lambda t: sum(t.memory(configured).peak(place) for place in ("device", "host")))
    over = need(largest, configured, cluster, max(together, 1)).over_memory(MARGIN)
    if together and not over:
        return True
    if not refuse:
        return False
    if not together:
        raise ConfigError(too_few(execution, cluster))
    what_fits = remedy(propose(trainings, configured, cluster, threads=threads), largest, configured)
    raise ConfigError(f"mask training of {largest.label} does not fit: {_told(over, together)}; {what_fits}")


def too_few(execution: ExecutionSection, cluster: Cluster) -> str:
    """What to change when ranks would wait for ever."""
    mask = execution.mask
    gpus = f" and {mask.ranks} GPUs" if on_gpu(mask) else ""
    there = f" and {cluster.nodes * cluster.gpus} GPUs" if on_gpu(mask) else ""
    return (
        f"execution.mask.ranks: {mask.ranks} ranks of {execution.threads} threads need {mask.ranks * execution.threads} "
        f"CPUs{gpus}, and there are {cluster.nodes * cluster.cpus}{there}: they would wait for ever; take fewer ranks or "
        "raise execution.workers"
    )


def _told(over: list[tuple[str, int, int]], together: int) -> str:
    beside = f" for {together} side by side" if together > 1 else ""
    return ", ".join(
        f"it takes about {size(needed)} of {what}{beside} and {size(there)} are free" for what, needed, there in over
    )


def size(nbytes: float) -> str:
    """As people read it."""
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB / 10 else f"{nbytes / 2**20:.1f} MiB"


def remedy(proposal: Proposal | None, training: Training, configured: MaskExecution) -> str:
    """What to write into the config, in a sentence."""
    if proposal is not None:
        return f"this would fit: {flow(proposal.changes(configured))}"
    narrower = "" if training.settings.dtype == "bfloat16" else ", set mask.settings.dtype to bfloat16"
    return f"no execution.mask fits: give it more memory or more GPUs{narrower}, or shorten mask.settings.max_length"


def flow(changes: dict[str, Any]) -> str:
    """Changes as YAML of one line, under `execution`."""
    import yaml

    text = yaml.safe_dump({"execution": changes}, default_flow_style=True, sort_keys=False, width=10**6)
    return text.strip().removeprefix("{").removesuffix("}")
