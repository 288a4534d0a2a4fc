"""Train a mask: prepare the data once, step, checkpoint, evaluate, write the artifact. Resumable to the bit."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from components.checkpoints.loading import load_causal_lm, load_tokenizer
from components.checkpoints.source import TensorSource
from components.errors import DataError
from components.mapped import QUICK, return_freed_memory
from components.masks.artifact import MaskArtifact, write_artifact
from components.masks.data import PreferenceData, load_prompts
from components.masks.engine import TorchEngine
from components.masks.loading import base_model, build_masked_model, checkpointed_layers, weights_dtype
from components.masks.loop import TrainingRun, lines
from components.masks.pairs import answered, open_pairs
from components.masks.preferences import encode_prompt
from components.masks.prepare import prepare
from components.masks.reference_cache import ReferenceCache
from components.masks.rooms import room_for
from components.masks.settings import MaskSettings
from components.masks.state import SavedState
from components.masks.zero import ZeroSettings
from components.storage import Progress


@dataclass(frozen=True)
class MaskResult:
    """What training leaves. `metrics` depends on inputs and settings only; `cost` on the machine."""

    artifact: MaskArtifact
    metrics: dict[str, Any]
    cost: dict[str, Any]
    """`seconds` of each phase; `tokens_per_second` of prompts and answers through the steps, over all ranks, null where no step
    was left; `peak_memory_bytes` of the rank with most: its GPU's, or its process's since that began."""


EngineMaker = Callable[[Path, TensorSource, TensorSource, MaskSettings], TorchEngine]
"""(model directory, aligned, finetune, settings) -> an engine at the mask's start."""


def one_process(zero: ZeroSettings) -> EngineMaker:
    """Makes the engine of a process that has the whole model to itself: of ZeRO, only what saves memory in one."""

    def make(model_dir: Path, aligned: TensorSource, finetune: TensorSource, settings: MaskSettings) -> TorchEngine:
        return_freed_memory(QUICK)
        model = base_model(partial(load_causal_lm, dtype=weights_dtype(settings)), model_dir, aligned)
        layers = checkpointed_layers(model) if zero.activation_checkpointing else []
        masked = build_masked_model(
            model=model,
            aligned=aligned,
            finetune=finetune,
            settings=settings,
            where=model_dir,
            room=room_for(zero.offload, "cpu", zero.offload_dir),
        )
        return TorchEngine(masked, accumulate=zero.accumulate, layers=layers)

    return make


def train_mask(
    *,
    settings: MaskSettings,
    aligned_dir: Path,
    aligned: TensorSource,
    finetune: TensorSource,
    tokenizer_dir: Path | None = None,
    preferences: PreferenceData | Path,
    preferences_dev: PreferenceData | Path | None = None,
    anchors: Sequence[Path] = (),
    state_dir: Path,
    out_dir: Path,
    checkpoint_seconds: float = 30.0,
    checkpoint_steps: int = 0,
    progress: Progress | None = None,
    keep_going: Callable[[], None] | None = None,
    make_engine: EngineMaker | None = None,
    cache: ReferenceCache | None = None,
) -> MaskResult:
    """Train the mask of one finetune and write `mask.safetensors`, `mask.json` and `metrics.jsonl` into `out_dir`.

    `aligned_dir` gives the architecture, `tokenizer_dir` tokenizer and chat template (those that the fused model will be
    asked with: the finetune's; by default the aligned model's); weights come from the two sources. `state_dir` belongs to
    this run alone: a run that finds a checkpoint there goes on from it, and its artifact has the same bytes as an unbroken
    run's (on another number of ranks: the same up to rounding). `keep_going` is called before every step and may raise to
    stop. `cache` changes no byte. The caller sets torch's threads. With an engine of several ranks every rank calls this,
    with the same arguments; the first writes. A SIGTERM to any process whose main thread
    this is ends all ranks after the step, with the state saved. Raises
    DataError, CheckpointError, ConfigError, TrainingError, Preempted.
    """
    clock = _Clock()
    if settings.anchor_weight > 0 and not anchors:
        raise DataError("mask.anchor_weight is above 0 but there is no anchor file; give one, or set the weight to 0")
    tokenizer = load_tokenizer(tokenizer_dir or aligned_dir)
    opened = [open_pairs(data, tokenizer, settings) for data in (preferences, preferences_dev)]
    used = anchors if settings.anchor_weight > 0 else ()
    prompts = [encode_prompt(tokenizer, p.prompt) for path in used for p in load_prompts(path)]
    engine = (make_engine or one_process(ZeroSettings()))(aligned_dir, aligned, finetune, settings)
    first = engine.ranks.rank == 0
    report = progress if progress and first else _say_nothing
    clock.lap("load")
    report({"phase": "prepare", "pairs": len(opened[0].pairs or opened[0].prompts), "anchors": len(prompts)})
    pairs, dev = answered(opened, engine.masked, tokenizer, settings.pair_new_tokens, engine.forwards)
    dropped = pairs.counts("pairs") | dev.counts("pairs_dev")
    data = prepare(engine, tokenizer, pairs.pairs, dev.pairs, prompts, dropped, cache)
    clock.lap("prepare")
    run = TrainingRun(engine, data, settings, state_dir)
    run.train(
        checkpoint_seconds=checkpoint_seconds,
        checkpoint_steps=checkpoint_steps,
        report=report,
        keep_going=keep_going or (lambda: None),
    )
    clock.lap("steps")
    report({"phase": "evaluate"})
    kept = run.kept()
    final = run.evaluate()
    clock.lap("evaluate")
    unchanged = _unchanged(engine)
    if first:
        _write(run, kept, final, unchanged, out_dir)
    engine.ranks.barrier()
    clock.lap("write")
    artifact = MaskArtifact.open(out_dir)
    cost = {
        "seconds": clock.seconds,
        "tokens_per_second": run.tokens / run.stepping if run.tokens else None,
        "peak_memory_bytes": max(engine.ranks.gather(_peak_memory(next(engine.masked.model.parameters()).device))),
    }
    return MaskResult(artifact, artifact.figures(), cost)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _say_nothing(_event: dict[str, Any]) -> None: ...


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self._last = now - self._last, now


def _unchanged(engine: TorchEngine) -> dict[str, int]:
    """Per tensor, elements that are equal in both models, over all ranks."""
    mine = engine.masked.unchanged()
    return dict(zip(mine, engine.masked.all_sum(torch.tensor(list(mine.values()))).tolist(), strict=True))


def _write(
    run: TrainingRun, kept: int, final: dict[str, dict[str, float]], unchanged: dict[str, int], out_dir: Path
) -> None:
    """The artifact, from the state of the step that is kept, which holds every rank's logits."""
    masked = run.engine.masked
    shapes = {s.name: s.home.shape for s in masked.slices}
    metrics = {
        "steps": len(run.history),
        "kept_step": kept,
        "data": run.data.counts,
        "tokens_sha256": run.data.fingerprint(),
        "final": {k: v for k, v in run.history[-1].items() if k != "eval"},
        "evaluation": final,
        "delta_zero_share": sum(unchanged.values()) / masked.numel,
    }
    with SavedState(run.directory(kept)) as saved:
        write_artifact(
            out_dir,
            shapes=shapes,
            shards=(
                (name, at, at + values.numel(), values)
                for name in shapes
                for at, values in saved.pieces(f"logits/{name}")
            ),
            settings=run.settings,
            unmasked=masked.unmasked_numel(),
            statistics={s.name: {"delta_zero_share": unchanged[s.name] / max(s.numel, 1)} for s in masked.slices},
            extra={"metrics": metrics},
        )
    (out_dir / "metrics.jsonl").write_text("".join(lines(run.history)), encoding="utf-8")
