"""What one rank of a mask's training holds, byte by byte, before anything is trained: from headers and settings alone.

N elements of a weight, W ranks, n = ⌈N/W⌉ of them on a rank (all N where nothing is spread), d bytes an element of the fused
weights (4, or 2 in bfloat16). What is kept from step to step is exact (tests hold it to an engine's tensors); activations
are those of a Llama layer; what allocators, libraries and collectives take beside that is a constant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from components.checkpoints.adapters import LoraSource
from components.checkpoints.dimensions import Dimensions
from components.checkpoints.factors import FactorSource
from components.checkpoints.safetensors import SafetensorsSource
from components.checkpoints.source import TensorSource
from components.masks.concrete import BLOCK
from components.masks.loading import chosen_names
from components.masks.masked_model import REMEMBER
from components.masks.objective import EVALUATE_BATCH, GENERATE_BATCH, SCORE_BATCH
from components.masks.settings import MaskSettings
from components.masks.slices import SMALL
from components.masks.zero import MaskExecution, Offload

Place = Literal["device", "host", "disk"]
Moment = Literal["forward", "backward", "answering", "scoring"]
"""When most is held: as a step's backward begins (activations are whole) or ends (gradients are), while the finetune answers
anchor prompts, and while references, anchors and evaluations are scored."""
MOMENTS: tuple[Moment, ...] = ("forward", "backward", "answering", "scoring")
STEP: tuple[Moment, ...] = ("forward", "backward")

GIB = 2**30
PROCESS_HOST = int(0.8 * GIB)
"""A Python process that has imported torch, transformers and deepspeed, resident (measured)."""
PROCESS_DEVICE = GIB
"""A CUDA context, and NCCL's buffers (assumed)."""
STATE_BYTES = 12
"""Of a masked weight: its logit and Adam's two moments, fp32."""


@dataclass(frozen=True)
class Stored:
    """How a weight lies in a source: mapped from a file, or computed when it is read (and then held in memory)."""

    itemsize: int
    mapped: bool
    factored: bool = False
    """Of a LoRA finetune, as factors that take less room: large pieces are computed when the CPU works on them."""


@dataclass(frozen=True)
class Weight:
    """One tensor of the model (tied ones once), in both models."""

    name: str
    numel: int
    masked: bool
    aligned: Stored
    finetuned: Stored
    units: int | None = None
    """Logits of the whole tensor, which every rank has, where elements share them; None: one for each element."""

    @property
    def logits(self) -> int:
        """Of the whole tensor."""
        return self.numel if self.units is None else self.units


@dataclass(frozen=True)
class Lengths:
    """Tokens of the preference rows (prompt and response) and of their responses."""

    longest: int
    mean: float
    longest_response: int
    mean_response: float
    prompt: int
    """Longest anchor prompt; 0: there are no anchors."""
    anchors: int = 0
    """Anchor prompts."""

    def tokens(self, rows: int, *, padded: bool) -> int:
        """Of the largest of many batches of so many rows; `padded`: all to the longest."""
        return rows * self.longest if padded else _largest(rows, self.mean, self.longest)

    def responses(self, rows: int) -> int:
        """Scored tokens of the largest of many batches."""
        return _largest(rows, self.mean_response, self.longest_response)


def _largest(rows: int, mean: float, longest: int) -> int:
    """A sum's spread grows as √rows; one row may be the longest."""
    return math.ceil(min(rows * longest, rows * mean + math.sqrt(rows) * (longest - mean)))


@dataclass(frozen=True)
class Item:
    """Bytes of one kind on one rank, where they are, and when."""

    what: str
    place: Place
    nbytes: int
    moments: tuple[Moment, ...] = MOMENTS


@dataclass(frozen=True)
class RankMemory:
    """Everything that the rank with most holds. On a CPU the device's share is the host's."""

    items: tuple[Item, ...]

    def at(self, moment: Moment, place: Place) -> int:
        """Bytes in one place at one moment."""
        return sum(item.nbytes for item in self.items if item.place == place and moment in item.moments)

    def peak(self, place: Place, moments: Sequence[Moment] = MOMENTS) -> int:
        """The most that is ever there."""
        return max(self.at(moment, place) for moment in moments)

    def worst(self, place: Place) -> list[Item]:
        """What the peak consists of, largest first."""
        moment = max(MOMENTS, key=lambda m: self.at(m, place))
        found = [i for i in self.items if i.place == place and moment in i.moments and i.nbytes]
        return sorted(found, key=lambda i: -i.nbytes)


def weights_of(aligned: TensorSource, finetune: TensorSource, settings: MaskSettings) -> list[Weight]:
    """Every tensor, from headers. Raises ConfigError for patterns that match nothing."""
    names = sorted(aligned.names())
    masked, aliases = chosen_names(names, settings), finetune.aliases()
    found = []
    for name in names:
        spec = aligned.spec(name)
        units = None if settings.granularity == "element" else spec.numel // settings.unit(spec.shape)
        stored = (_stored(aligned, name), _stored(finetune, aliases.get(name, name)))
        found.append(Weight(name, spec.numel, name in masked, *stored, units))
    return found


def _stored(source: TensorSource, name: str) -> Stored:
    spec = source.spec(name)
    if not isinstance(source, LoraSource):
        return Stored(spec.dtype.itemsize, isinstance(source, SafetensorsSource | FactorSource))
    pair = source.pairs().get(name)
    factored = pair is not None and pair.rank * sum(spec.shape) < spec.numel
    return Stored(spec.dtype.itemsize, name not in source.adapted(), factored)


class _Rank:
    """The sizes that all items are made from."""

    def __init__(self, weights: Sequence[Weight], settings: MaskSettings, execution: MaskExecution) -> None:
        self.weights, self.settings, self.execution = weights, settings, execution
        self.world = execution.ranks
        self.stage = execution.stage if execution.spread else 0
        self.d = 4 if settings.dtype == "float32" else 2
        self.numel = sum(w.numel for w in weights)
        self.masked = sum(w.numel for w in weights if w.masked)
        self.here = sum(self.own(w) for w in weights if w.masked)
        self.logits = sum(self.own(w) if w.units is None else w.units for w in weights if w.masked)
        self.largest = max(w.numel for w in weights)
        runs = groupby((w for w in weights if w.masked), key=lambda w: w.units is None and self.own(w) < SMALL)
        groups = [list(run) for small, run in runs if small]
        self.packed = sum(self.own(w) for group in groups if len(group) > 1 for w in group)

    def own(self, w: Weight) -> int:
        """Elements of a weight whose mask is this rank's."""
        return -(-w.numel // self.world) if self.stage else w.numel

    @property
    def on_gpu(self) -> bool:
        return self.execution.device == "cuda"

    @property
    def device(self) -> Place:
        return "device" if self.on_gpu else "host"

    @property
    def state(self) -> Place:
        """Where logits and what goes with them live."""
        return self._place(self.execution.offload)

    @property
    def partitions(self) -> Place:
        """Where this rank's weights and gradients live under ZeRO-3."""
        return self._place(self.execution.offload_weights)

    def _place(self, offload: Offload) -> Place:
        places: dict[Offload, Place] = {"none": self.device, "cpu": "host", "nvme": "disk"}
        return places[offload]


def rank_memory(
    weights: Sequence[Weight],
    dimensions: Dimensions,
    lengths: Lengths,
    settings: MaskSettings,
    execution: MaskExecution,
) -> RankMemory:
    """What the rank with most holds."""
    rank = _Rank(weights, settings, execution)
    items = [*_process(rank), *_kept(rank), *_gradients(rank), *_passes(rank, dimensions, lengths)]
    return RankMemory(tuple(item for item in items if item.nbytes))


def kept_memory(weights: Sequence[Weight], settings: MaskSettings, execution: MaskExecution) -> RankMemory:
    """Only what is kept from step to step: the tensors of an engine that stands still."""
    return RankMemory(tuple(item for item in _kept(_Rank(weights, settings, execution)) if item.nbytes))


def training_disk(weights: Sequence[Weight], settings: MaskSettings) -> int:
    """Bytes of resumable state, over all ranks: the one that counts, its successor while that is written, and the best one. All
    of it is gone when the mask is published."""
    masked = sum(w.logits for w in weights if w.masked)
    return STATE_BYTES * masked * (3 if settings.keep_best else 2)


def artifact_disk(weights: Sequence[Weight], settings: MaskSettings) -> int:
    """Bytes of a mask: bf16 logits, or packed bits."""
    masked = [w.logits for w in weights if w.masked]
    return sum(-(-n // 8) for n in masked) if settings.storage == "bits" else 2 * sum(masked)


def _process(rank: _Rank) -> Iterator[Item]:
    yield Item("the process and its libraries", "host", PROCESS_HOST)
    if rank.on_gpu:
        yield Item("CUDA context and NCCL", "device", PROCESS_DEVICE)


def _kept(rank: _Rank) -> Iterator[Item]:
    yield Item("logits", rank.state, 4 * rank.logits)
    yield Item("Adam's moments", rank.state, 8 * rank.logits)
    both = [(rank.own(w), stored) for w in rank.weights for stored in (w.aligned, w.finetuned)]
    on_cpu = rank.state != "device"
    both = [(n, s) for n, s in both if not (s.factored and on_cpu and n >= SMALL)]
    if rank.state == "device":
        yield Item("stored models, as stored", "device", sum(n * s.itemsize for n, s in both))
    else:  # mapped pages are let go of piece by piece
        yield Item("finetune, computed when read", rank.state, sum(n * s.itemsize for n, s in both if not s.mapped))
    # Packs of small tensors are copies in fp32, which file-backed places do not take.
    copies: Place = "host" if rank.state == "disk" else rank.state
    yield Item("small tensors, packed", copies, 8 * rank.packed)
    if rank.stage == 0:
        yield Item("fused weights", rank.device, rank.d * rank.numel)
    else:
        # Every run is as long as the first: the last ones are padded.
        whole = sum(rank.world * rank.own(w) for w in rank.weights)
        sharded = rank.stage == 3
        yield Item(
            "fused weights, this rank's" if sharded else "fused weights",
            rank.partitions if sharded else rank.device,
            rank.d * (whole // rank.world if sharded else whole),
        )
        yield Item("small tensors' weights, packed", rank.device, rank.d * rank.packed)


def _gradients(rank: _Rank) -> Iterator[Item]:
    """fp32, on their way from the model to the logits."""
    early: tuple[Moment, ...] = STEP if rank.execution.accumulate > 1 else ("backward",)
    arrives = rank.partitions if rank.stage == 3 else rank.device
    wanted = _memory(rank)
    if rank.on_gpu and (arrives == "device") != (wanted == "device"):
        yield Item("gradients, copied to the logits", wanted, 4 * rank.here, ("backward",))
    yield Item("gradients of small tensors, packed", wanted, 4 * rank.packed, ("backward",))
    if rank.stage == 0 or (rank.stage == 1 and rank.d == 4):
        yield Item("gradients", rank.device, 4 * rank.masked, early)
        if rank.d < 4:
            yield Item("a gradient as it comes", rank.device, rank.d * rank.largest, STEP)
    else:
        # A place off the device is set aside once and kept.
        kept = MOMENTS if arrives != rank.device else early
        yield Item("gradients, this rank's", arrives, 4 * rank.here, kept)
        yield Item("a gradient as it comes", rank.device, rank.d * rank.largest, STEP)
    if rank.stage == 3:
        # gloo gathers into a copy of its own.
        copies = 1 if rank.on_gpu else 2
        yield Item("a gathered layer", rank.device, copies * rank.d * rank.largest)
        if rank.partitions == "disk":
            yield Item("a layer's partition, as read from its file", "host", rank.d * -(-rank.largest // rank.world))


def _passes(rank: _Rank, dims: Dimensions, lengths: Lengths) -> Iterator[Item]:
    """Activations, output logits and what the mask's arithmetic works on."""
    settings, parts = rank.settings, rank.world * rank.execution.accumulate
    pairs = 2 * -(-settings.batch_size // parts)
    anchors = -(-settings.anchor_batch_size // parts) if lengths.prompt else 0
    answer = settings.anchor_new_tokens
    tokens = lengths.tokens(pairs, padded=rank.world > 1) + anchors * (lengths.prompt + answer)
    layer, entry = layer_bytes(dims, rank.d), dims.hidden * rank.d
    if rank.execution.activation_checkpointing:
        yield Item("activations, layers' inputs", rank.device, tokens * dims.layers * entry, ("forward",))
        yield Item("activations, one layer's", rank.device, tokens * layer, ("forward",))
    else:
        yield Item("activations", rank.device, tokens * dims.layers * layer, ("forward",))
    yield Item("a layer's own gradients", rank.device, tokens * backward_bytes(dims, rank.d), ("forward",))
    scored = dims.vocabulary * (12 * lengths.responses(pairs) + 20 * anchors * answer)
    yield Item("output logits", rank.device, scored, ("forward",))
    if lengths.prompt:
        full = dims.vocabulary <= max(settings.anchor_full_vocabulary, settings.anchor_top_k)
        kept = 4 * dims.vocabulary if full else 12 * settings.anchor_top_k
        used = min(lengths.anchors, settings.steps * settings.anchor_batch_size + settings.eval_pairs)
        yield Item("anchors' distributions", rank.device, used * answer * kept)
        cache = GENERATE_BATCH * (lengths.prompt + answer) * dims.cached(rank.d)
        yield Item("keys and values of anchors' answers", rank.device, cache, ("answering",))
        prompts = GENERATE_BATCH * lengths.prompt * backward_bytes(dims, rank.d)
        yield Item("a layer's activations of anchor prompts", rank.device, prompts, ("answering",))
    rows = max(SCORE_BATCH, 2 * EVALUATE_BATCH)
    logits = 12 * dims.vocabulary * (rows * lengths.longest_response + (EVALUATE_BATCH * answer if anchors else 0))
    yield Item("output logits of scored rows", rank.device, logits, ("scoring",))
    passing = rows * lengths.longest * backward_bytes(dims, rank.d)
    yield Item("a layer's activations of scored rows", rank.device, passing, ("scoring",))
    if rank.here <= REMEMBER and settings.stochastic:
        yield Item("samples, kept for the gradient", _memory(rank), 4 * rank.here, STEP)
    piece = min((256 if rank.state == "device" else 2) * BLOCK, max(rank.own(w) for w in rank.weights))
    yield Item("the mask's arithmetic", _memory(rank), 32 * piece, ("backward",))


def _memory(rank: _Rank) -> Place:
    """Where logits are worked on."""
    return "host" if rank.state == "disk" else rank.state


def layer_bytes(dims: Dimensions, d: int) -> int:
    """Bytes that a token leaves in one layer for its backward. Two norms: fp32 input and output (8 bytes an element, in either
    type); two residual sums; queries, keys, values and the attention's output, rotated and as it is; the feed-forward part's
    gate, its activation, the other branch and their product."""
    return 16 * dims.hidden + d * (2 * dims.hidden + 2 * dims.queries + 2 * dims.keys + 4 * dims.inner)


def backward_bytes(dims: Dimensions, d: int) -> int:
    """Bytes of a token that one layer works on at a time beside what it keeps: three of the feed-forward's width, two of the
    residual's."""
    return d * (3 * dims.inner + 2 * dims.hidden)
