"""What each stage takes: memory, disk, processors and time, estimated from headers, data files and settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from components.checkpoints.adapters import LoraSource
from components.evaluation.judges.models import resident_bytes
from components.evaluation.prompts import load_prompt_set
from components.fusion.low_rank import export_sizes
from components.masks.memory import PROCESS_HOST, RankMemory, artifact_disk, backward_bytes
from components.masks.zero import MaskExecution
from pipelines.config import RunConfig
from pipelines.graph import Node
from pipelines.inputs import BYTES_A_TOKEN, TEMPLATE_TOKENS, Model, Models
from pipelines.machine import BYTES_PER_FLOP, MASK_BYTES, Cluster, Rates
from pipelines.placement import Training, need, on_gpu
from pipelines.specs import sets_asked


@dataclass(frozen=True)
class StageNeed:
    """One stage: bytes on the node that takes most, bytes of the workspace's disk that stay and that are only there meanwhile.
    `seconds`: None where the speed of what it runs on is not known."""

    id: str
    stage: str
    host: int
    seconds: float | None
    device: int = 0
    """Of each GPU."""
    disk: int = 0
    scratch: int = 0
    cpus: int = 1
    gpus: int = 0


@dataclass
class Sizes:
    """What the estimates of a stage look at."""

    config: RunConfig
    models: Models
    cluster: Cluster
    rates: Rates
    trainings: Mapping[str, Training]
    memory: dict[str, RankMemory] = field(default_factory=dict)

    @property
    def execution(self) -> MaskExecution:
        return self.config.execution.mask

    @cached_property
    def threads(self) -> int:
        return min(self.config.execution.threads, self.cluster.cpus)

    def streamed(self, nbytes: float) -> float:
        """Seconds for so much memory traffic; elementwise work is that."""
        return nbytes / self.rates.bytes

    def model(self, name: str | None) -> Model:
        """A finetune; of a merge or the aligned model (None), the aligned one, which is as large."""
        return self.models.finetunes.get(name or "", self.models.aligned)


def _load(node: Node, s: Sizes) -> StageNeed:
    model = s.model(node.finetune)
    stored = model.stored + model.under
    return StageNeed("", "", PROCESS_HOST, stored / s.rates.hashed + s.streamed(2 * stored))


def _statistics(node: Node, s: Sizes) -> StageNeed:
    """Deltas by blocks: a dozen passes in fp32 and fp64 over each finetune."""
    others = len(s.config.finetunes) if node.finetune is None else len(s.config.members(node.finetune))
    return StageNeed("", "", PROCESS_HOST, s.streamed(60.0 * s.models.aligned.numel * others))


def _merge(node: Node, s: Sizes) -> StageNeed:
    merge = s.config.merge_named(node.finetune)
    assert merge is not None
    tuned = s.config.fusion.tuned[merge.name].merge if node.step.variant == "tuned" else None
    passes = 60.0 * len(s.config.members(merge.name)) if (tuned or merge).method == "ties" else 0.0
    return StageNeed("", "", PROCESS_HOST, s.streamed(passes * s.models.aligned.numel))


def _train(node: Node, s: Sizes) -> StageNeed:
    training, execution = s.trainings[node.id], s.execution
    memory = s.memory[node.id] = training.memory(execution)
    ranks = execution.ranks
    taken = need(training, execution, s.cluster, 1)
    return StageNeed(
        "",
        "",
        host=taken.host,
        seconds=_training_seconds(training, s),
        device=memory.peak("device"),
        disk=artifact_disk(training.weights, training.settings),
        scratch=taken.disk if s.cluster.offload_disk is None else taken.state,
        cpus=ranks * s.threads,
        gpus=ranks if on_gpu(execution) else 0,
    )


def _training_seconds(training: Training, s: Sizes) -> float | None:
    """6 operations for a weight and token forward and backward (8 where layers are computed again), 2 for a forward alone:
    references, anchors' answers and evaluations (of two masks, on train and dev)."""
    settings, execution, lengths = training.settings, s.execution, training.lengths
    numel = sum(w.numel for w in training.weights)
    masked = sum(w.numel for w in training.weights if w.masked)
    anchor = lengths.prompt + settings.anchor_new_tokens if lengths.prompt else 0
    step = 2 * settings.batch_size * lengths.mean + settings.anchor_batch_size * anchor
    used = 2 * settings.batch_size * settings.steps * lengths.mean
    answered = min(lengths.anchors, settings.anchor_batch_size * settings.steps + settings.eval_pairs) * anchor
    rounds = 1 + (settings.steps // settings.eval_every if settings.eval_every else 0)
    evaluated = 4 * rounds * settings.eval_pairs * (2 * lengths.mean + anchor)
    trained = (8 if execution.activation_checkpointing else 6) * settings.steps * step
    operations = numel * (trained + 2 * (used + 2 * answered + evaluated))
    if on_gpu(execution):
        if s.rates.gpu_flops is None:
            return None
        speed, arithmetic = s.rates.gpu_flops, MASK_BYTES / (s.rates.gpu_flops * BYTES_PER_FLOP)
    else:
        speed, arithmetic = s.rates.flops * s.threads, s.rates.mask_seconds / s.threads
    shared = execution.ranks if execution.stage else 1
    return operations / (speed * execution.ranks) + settings.steps * masked * arithmetic / shared


def _fuse(node: Node, s: Sizes) -> StageNeed:
    aligned, finetune = s.models.aligned.checkpoint.source, s.model(node.finetune).checkpoint.source
    merged = s.config.merge_named(node.finetune) is not None
    written = 0
    for name in aligned.names():
        dtypes = aligned.spec(name).dtype, torch.float32 if merged else finetune.spec(name).dtype
        written += aligned.spec(name).numel * torch.promote_types(*dtypes).itemsize
    read = s.models.aligned.stored + s.model(node.finetune).stored
    return StageNeed("", "", PROCESS_HOST, s.streamed(4.0 * (read + written)), disk=written)


def _export_adapter(node: Node, s: Sizes) -> StageNeed:
    """Factoring in fp64, which takes twice fp32's time, after one pass over both models that compares what is not adapted."""
    source, adapter = s.model(node.finetune).checkpoint.source, s.config.fusion.adapter
    assert isinstance(source, LoraSource)
    assert adapter is not None
    sizes = export_sizes(source, adapter.rank)
    seconds = 2 * sizes.operations / (s.rates.flops * s.threads) + s.streamed(2.0 * s.models.aligned.stored)
    return StageNeed("", "", PROCESS_HOST + sizes.adapter + sizes.working, seconds, disk=sizes.adapter)


def _evaluate(node: Node, s: Sizes) -> StageNeed:
    """Loaded in fp32, as it is answered with on the CPU; every answer as long as it may be. Judges' memory, not their time."""
    model, (seconds, beside) = s.model(node.finetune), _answering(node, s, None)
    if node.step.stage == "search_scale":
        seconds = len(s.config.fusion.candidates) * (seconds + s.streamed(12.0 * model.parameters))
    host = PROCESS_HOST + model.wide + beside + _judging(s)
    return StageNeed("", "", host, seconds + s.streamed(2 * model.wide))


def _landscape(node: Node, s: Sizes) -> StageNeed:
    """Every actor with a judge of its own and the model twice, as it came and as it is moved; all points of the grids, though
    refinement may need fewer. A point's weights are made in fp64, a block at a time."""
    section, how, model = s.config.landscape, s.config.execution.landscape, s.model(node.finetune)
    assert section is not None
    seconds, beside = _answering(node, s, section.limit)
    points = sum(scan.directions * scan.points ** len(scan.axes) for scan in section.scans_of(node.step.variant))
    moved = s.streamed(32.0 * model.parameters)
    on_cpu = how.device == "cpu"
    gpus = 0 if on_cpu else how.actors * how.devices
    host = how.actors * (PROCESS_HOST + (2 * model.wide + beside if on_cpu else 0) + _judging(s))
    device = 0 if on_cpu else (2 * model.wide + beside) // how.devices
    return StageNeed(
        "",
        "",
        host=host,
        seconds=points * (seconds + moved) / how.actors if on_cpu else None,
        device=device,
        cpus=how.actors * s.threads,
        gpus=gpus,
    )


def _answering(node: Node, s: Sizes, limit: int | None) -> tuple[float, int]:
    """Seconds and bytes beside the model of answering the node's sets once, each cut to `limit` prompts."""
    dims, new, batch = s.models.dimensions, s.config.evaluation.max_new_tokens, s.config.execution.batch_size
    model, seconds, beside = s.model(node.finetune), 0.0, 0
    for chosen in sets_asked(node, s.config):
        texts = ["".join(m["content"] for m in p.messages) for p in load_prompt_set(chosen).prompts[:limit]]
        lengths = [TEMPLATE_TOKENS + len(text.encode()) // BYTES_A_TOKEN for text in texts]
        together, longest = min(batch, len(lengths)), max(lengths)
        held = (longest + new) * dims.cached(4) + 8 * dims.vocabulary + longest * backward_bytes(dims, 4)
        beside = max(beside, together * held)
        speed = s.rates.flops * s.threads
        batches = -(-len(lengths) // batch)
        # A batch's token takes its arithmetic, or reading all weights once, whichever is longer.
        token = max(2 * model.parameters * together / speed, s.streamed(model.wide))
        seconds += 2 * model.parameters * sum(lengths) / speed + batches * new * token
    return seconds, beside


def _judging(s: Sizes) -> int:
    """A judge may run where the host's memory is not used."""
    return resident_bytes(s.config.evaluation.judge) if s.config.execution.judge.device == "cpu" else 0


NEEDS: dict[str, Callable[[Node, Sizes], StageNeed]] = {
    "load": _load,
    "extract_delta": _statistics,
    "compare_deltas": _statistics,
    "merge": _merge,
    "train_mask": _train,
    "search_scale": _evaluate,
    "fuse": _fuse,
    "export_adapter": _export_adapter,
    "evaluate": _evaluate,
    "landscape": _landscape,
}
