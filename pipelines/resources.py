"""`realign plan`: what each stage of a run takes, before anything is spent, and how the driver would have them side by side.

Figures are estimates. Memory of mask training is made from headers and settings (components/masks/memory.py) and held to what
was measured (benchmarks/RESULTS.md); times are operations over a measured or given speed, and rough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from components.masks.memory import RankMemory
from pipelines.config import RunConfig
from pipelines.graph import Node, expand
from pipelines.inputs import Models, trainings
from pipelines.machine import Cluster, Rates
from pipelines.needs import NEEDS, Sizes, StageNeed
from pipelines.placement import Proposal, need, on_gpu, propose, remedy, side_by_side, size, too_few


@dataclass
class Plan:
    """What `realign plan` says."""

    cluster: Cluster
    rates: Rates
    stages: list[StageNeed]
    memory: dict[str, RankMemory]
    """Of each training, by its stage's id: one rank's, with everything that it is made of."""
    proposal: Proposal | None
    """The least costly way to spread mask training that fits."""
    problems: list[str]
    notes: list[str]
    host: int = 0
    """The most that stages side by side take of a node's memory."""
    disk: int = 0
    """What stays on the disk, and the most that is there beside it."""
    scratch: int = 0
    seconds: float | None = 0.0


def plan(config: RunConfig, models: Models, cluster: Cluster, rates: Rates) -> Plan:
    """Everything at once; raises only what keeps the whole run from starting."""
    wanted = trainings(config, models, tokenize=True)
    sizes = Sizes(config, models, cluster, rates, wanted)
    nodes = _possible(sizes)
    stages = [replace(NEEDS[n.step.stage](n, sizes), id=n.id, stage=n.step.stage) for n in nodes]
    found = Plan(cluster, rates, stages, sizes.memory, None, [], [])
    found.problems = [f"{name}: {error}" for name, error in {**models.errors, **models.untrained}.items()]
    _schedule(nodes, found)
    _judge_training(found, sizes)
    _judge_others(found)
    return found


def _possible(s: Sizes) -> list[Node]:
    """Stages, but for those of models that cannot be read, of masks that cannot be estimated, and what stands on such."""
    lost, found = set[str](), list[Node]()
    for node in expand(s.config):
        if node.step.kind != "stage":
            continue
        names = {member.name for member in s.config.members(node.finetune)} if node.finetune else set[str]()
        untrained = node.step.stage == "train_mask" and node.id not in s.trainings
        stands = not node.joins and any(parent in lost for _, parent in node.parents)
        if untrained or stands or not names.isdisjoint(s.models.errors):
            lost.add(node.id)
        else:
            found.append(node)
    return found


def _schedule(nodes: Sequence[Node], found: Plan) -> None:
    """Walk the graph as the driver does: what is ready starts while CPUs and GPUs are left. Fills in the totals."""
    wanted = {need.id: need for need in found.stages}
    cpus, gpus = found.cluster.nodes * found.cluster.cpus, found.cluster.nodes * found.cluster.gpus
    waiting, running, done = list(nodes), dict[str, float](), set[str]()
    now = 0.0
    while waiting or running:
        for node in list(waiting):
            one = wanted[node.id]
            taken = [wanted[name] for name in running]
            # What asks for more than there is would wait for ever; here it has all there is, and the plan says so.
            free = cpus - sum(min(t.cpus, cpus) for t in taken), gpus - sum(min(t.gpus, gpus) for t in taken)
            ready = all(parent in done or parent not in wanted for _, parent in node.parents)
            if ready and min(one.cpus, cpus) <= free[0] and min(one.gpus, gpus) <= free[1]:
                running[node.id] = now + (one.seconds if one.seconds is not None else 1.0)
                waiting.remove(node)
        assert running, "the graph has a cycle"
        taken = [wanted[name] for name in running]
        found.host = max(found.host, sum(t.host for t in taken))
        found.scratch = max(found.scratch, sum(t.scratch for t in taken))
        now = min(running.values())
        for name in [name for name, end in running.items() if end == now]:
            done.add(name)
            del running[name]
    found.disk = sum(need.disk for need in found.stages)
    found.seconds = None if any(need.seconds is None for need in found.stages) else now


def _judge_training(found: Plan, s: Sizes) -> None:
    """What of mask training does not fit, and what would."""
    if not s.trainings:
        return
    tasks, execution = list(s.trainings.values()), s.execution
    found.proposal = propose(tasks, execution, s.cluster, threads=s.threads)
    together = side_by_side(execution, s.cluster, threads=s.threads, trainings=len(tasks))
    if together == 0:
        found.problems.append(too_few(s.config.execution, s.cluster))
    beside = f" with {together} side by side" if together > 1 else ""
    short: dict[str, list[tuple[int, int, str]]] = {}
    for training in tasks:
        for what, needed, there in need(training, execution, s.cluster, max(together, 1)).over():
            short.setdefault(what, []).append((needed, there, training.label))
    for what, all_short in short.items():
        needed, there, name = max(all_short)
        others = f" (and {len(all_short) - 1} more)" if len(all_short) > 1 else ""
        found.problems.append(
            f"train_mask of {name}{others}: {size(needed)} of {what}{beside}, {size(there)} free, "
            f"{size(needed - there)} too little"
        )
    if found.proposal is None:
        found.notes.append(remedy(None, tasks[0], execution))
    if on_gpu(execution) and s.rates.gpu_flops is None:
        found.notes.append("the GPUs' speed is not known: give --tflops, what one sustains, for times")


def _judge_others(found: Plan) -> None:
    cluster = found.cluster
    for one in found.stages:
        if one.stage != "train_mask" and one.host > cluster.memory:
            found.problems.append(
                f"{one.id}: {size(one.host)} of host memory (the model in fp32 on the CPU), {size(cluster.memory)} free"
            )
    alone = max((one.host for one in found.stages), default=0)
    if alone <= cluster.memory < found.host:
        found.problems.append(
            f"stages side by side: {size(found.host)} of host memory, {size(cluster.memory)} free; "
            "lower execution.workers"
        )
    if found.disk + found.scratch > cluster.disk:
        found.problems.append(
            f"disk: {size(found.disk)} of results and {size(found.scratch)} beside them, {size(cluster.disk)} free; "
            "free some space or choose another workspace"
        )
