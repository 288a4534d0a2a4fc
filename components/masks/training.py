"""Train a mask: prepare the data once, step, checkpoint, evaluate, write the artifact. Resumable to the bit."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from components.checkpoints.loading import load_causal_lm, load_tokenizer
from components.checkpoints.source import TensorSource
from components.errors import DataError, StorageError
from components.mapped import return_freed_memory
from components.masks.artifact import MaskArtifact, write_artifact
from components.masks.engine import Batch, TorchEngine
from components.masks.loading import build_masked_model, checkpointed_layers, weights_dtype
from components.masks.preferences import (
    Pair,
    Schedule,
    encode_pairs,
    encode_prompt,
    load_preferences,
    load_prompts,
)
from components.masks.prepare import Prepared, prepare
from components.masks.rooms import room_for
from components.masks.settings import MaskSettings
from components.masks.state import SavedState
from components.masks.zero import ZeroSettings

DENSITY_EVERY = 10
"""Steps between density measurements in metrics.jsonl."""

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class MaskResult:
    """What training leaves. `metrics` depends on inputs and settings only; `seconds` on the machine."""

    artifact: MaskArtifact
    metrics: dict[str, Any]
    seconds: dict[str, float]


EngineMaker = Callable[[Path, TensorSource, TensorSource, MaskSettings], TorchEngine]
"""(model directory, aligned, finetune, settings) -> an engine at the mask's start."""


def one_process(zero: ZeroSettings) -> EngineMaker:
    """Makes the engine of a process that has the whole model to itself: of ZeRO, only what saves memory in one."""

    def make(model_dir: Path, aligned: TensorSource, finetune: TensorSource, settings: MaskSettings) -> TorchEngine:
        return_freed_memory()
        model = load_causal_lm(model_dir, dtype=weights_dtype(settings))
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
    preferences: Path,
    preferences_dev: Path | None = None,
    anchors: Sequence[Path] = (),
    state_dir: Path,
    out_dir: Path,
    checkpoint_seconds: float = 30.0,
    progress: Progress | None = None,
    keep_going: Callable[[], None] | None = None,
    make_engine: EngineMaker | None = None,
) -> MaskResult:
    """Train the mask of one finetune and write `mask.safetensors`, `mask.json` and `metrics.jsonl` into `out_dir`.

    `aligned_dir` gives the architecture, `tokenizer_dir` tokenizer and chat template (those that the fused model will be
    asked with: the finetune's; by default the aligned model's); weights come from the two sources. `state_dir` belongs to
    this run alone: a run that finds a checkpoint there goes on from it, and its artifact has the same bytes as an unbroken
    run's (on another number of ranks: the same up to rounding). `keep_going` is called before every step and may raise to
    stop. The caller sets torch's threads. With an engine of several ranks every rank calls this, with the same arguments;
    the first writes. Raises DataError, CheckpointError, ConfigError, TrainingError.
    """
    clock = _Clock()
    if settings.anchor_weight > 0 and not anchors:
        raise DataError("mask.anchor_weight is above 0 but there is no anchor file; give one, or set the weight to 0")
    tokenizer = load_tokenizer(tokenizer_dir or aligned_dir)
    rows = load_preferences(preferences)
    pairs, too_long = encode_pairs(tokenizer, rows, settings.max_length, preferences)
    dev_pairs, dev_too_long = list[Pair](), 0
    if preferences_dev is not None:
        held_out = load_preferences(preferences_dev)
        dev_pairs, dev_too_long = encode_pairs(tokenizer, held_out, settings.max_length, preferences_dev)
    used = anchors if settings.anchor_weight > 0 else ()
    prompts = [encode_prompt(tokenizer, p.prompt) for path in used for p in load_prompts(path)]
    engine = (make_engine or one_process(ZeroSettings()))(aligned_dir, aligned, finetune, settings)
    first = engine.ranks.rank == 0
    report = progress if progress and first else _say_nothing
    clock.lap("load")
    report({"phase": "prepare", "pairs": len(pairs), "anchors": len(prompts)})
    dropped = {"pairs_too_long": too_long, "pairs_dev_too_long": dev_too_long}
    data = prepare(engine, tokenizer, pairs, dev_pairs, prompts, dropped)
    clock.lap("prepare")
    run = _Run(engine, data, settings, state_dir)
    run.train(checkpoint_seconds=checkpoint_seconds, report=report, keep_going=keep_going or (lambda: None))
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
    return MaskResult(artifact, artifact.figures(), clock.seconds)


def _say_nothing(_event: dict[str, Any]) -> None: ...


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self._last = now - self._last, now


class _Run:
    """The loop over steps and its resumable state: `step-N/` directories, the one that counts named in LATEST.json."""

    def __init__(self, engine: TorchEngine, data: Prepared, settings: MaskSettings, state_dir: Path) -> None:
        self.engine, self.data, self.settings, self.state_dir = engine, data, settings, state_dir
        seed = settings.seed
        self._pairs = Schedule(data.train_size, settings.batch_size, seed=seed, what="pairs")
        self._anchors = (
            Schedule(data.anchors_size, settings.anchor_batch_size, seed=seed, what="anchors") if data.anchors else None
        )
        self.history: list[dict[str, Any]] = []
        self._identity = hashlib.sha256((settings.fingerprint() + data.fingerprint()).encode()).hexdigest()

    def batch(self, step: int) -> Batch:
        """What step `step` looks at."""
        anchors = () if self._anchors is None else tuple(self.data.anchors[i] for i in self._anchors.batch(step))
        return Batch(step, tuple(self.data.train[i] for i in self._pairs.batch(step)), anchors)

    def train(self, *, checkpoint_seconds: float, report: Progress, keep_going: Callable[[], None]) -> None:
        """Run the steps that are left."""
        first = self._resume(report)
        if first:
            report({"phase": "resume", "step": first, "steps": self.settings.steps})
        saved = time.monotonic()
        for step in range(first, self.settings.steps):
            if self._stalled():
                break
            keep_going()
            metrics: dict[str, Any] = {"step": step, "temperature": self.settings.temperature(step)}
            metrics["learning_rate"] = self.settings.rate(step)
            metrics |= self.engine.step(self.batch(step))
            done, every = step + 1, self.settings.eval_every
            if done % DENSITY_EVERY == 0 or done == self.settings.steps:
                metrics |= self.engine.density()
            if every and done % every == 0 and (done < self.settings.steps or self.settings.keep_best):
                metrics["eval"] = self.evaluate()
            self.history.append(metrics)
            report({"phase": "train", "steps": self.settings.steps, **metrics})
            wanted = self.settings.keep_best and self._best() == done
            if (
                wanted
                or self._stalled()
                or done == self.settings.steps
                or self._agreed(self._due(saved, checkpoint_seconds))
            ):
                keep_going()  # not a byte after the lease is lost
                self._save(done)
                saved = time.monotonic()

    def kept(self) -> int:
        """Steps of the mask that is kept: the engine holds it afterwards."""
        done = int(self.history[-1]["step"]) + 1
        best = self._best() if self.settings.keep_best else None
        if best is None or best == done:
            return done
        self.engine.load(self.directory(best))
        return best

    def _evaluations(self) -> list[tuple[float, int]]:
        """(loss of the binary mask on dev, or on train where there is no dev, steps done) of every evaluation so far."""
        found = [(row["eval"], row["step"] + 1) for row in self.history if "eval" in row]
        return [(e.get("dev_binary", e.get("train_binary"))["loss"], done) for e, done in found]

    def _best(self) -> int | None:
        return min(self._evaluations(), default=(0.0, None))[1]

    def _stalled(self) -> bool:
        patience, evaluations = self.settings.patience, [done for _, done in self._evaluations()]
        best = self._best()
        return bool(patience and best is not None and len(evaluations) - 1 - evaluations.index(best) >= patience)

    @staticmethod
    def _due(saved: float, every: float) -> bool:
        return time.monotonic() - saved >= every

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Train and dev metrics with the soft and with the binary mask: {"train_soft": {…}, …}."""
        most = self.settings.eval_pairs
        sets = {
            "train": (list(self.data.train.values())[:most], list(self.data.anchors.values())[:most]),
            "dev": (self.data.dev[:most], self.data.anchors_dev[:most]),
        }
        return {
            f"{name}_{weights}": self.engine.evaluate(Batch(-1, tuple(pairs), tuple(anchors)), weights)
            for weights in ("soft", "binary")
            for name, (pairs, anchors) in sets.items()
            if pairs
        }

    def directory(self, done: int) -> Path:
        """Where the state after so many steps lies."""
        return self.state_dir / f"step-{done:08d}"

    def _agreed(self, mine: bool) -> bool:
        """The first rank's word: clocks differ."""
        ranks = self.engine.ranks
        return bool(ranks.all_sum(torch.tensor(int(mine and ranks.rank == 0))))

    def _save(self, done: int) -> None:
        """A checkpoint counts from the moment LATEST.json names it; what it replaces is removed afterwards."""
        target, ranks = self.directory(done), self.engine.ranks
        if ranks.rank == 0:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
        ranks.barrier()
        self.engine.save(target)
        ranks.barrier()
        if ranks.rank == 0:
            (target / "metrics.jsonl").write_text("".join(_lines(self.history)), encoding="utf-8")
            latest = self.state_dir / "LATEST.json.new"
            latest.write_text(json.dumps({"step": done, "identity": self._identity}), encoding="utf-8")
            latest.replace(self.state_dir / "LATEST.json")
            best = self._best() if self.settings.keep_best else None
            for old in self.state_dir.glob("step-*"):
                if old not in (target, best and self.directory(best)):
                    shutil.rmtree(old, ignore_errors=True)
        ranks.barrier()

    def _resume(self, report: Progress) -> int:
        """Steps that are done. State that does not fit (another machine's finetune answered an anchor differently) or
        cannot be read is worth less than the run: it starts anew, on every rank if it must on one."""
        if not any(self.engine.ranks.gather((self.state_dir / "LATEST.json").exists())):
            return 0
        step, why = 0, ""
        try:
            step = self._load()
        except (StorageError, OSError, ValueError, KeyError, TypeError) as error:
            why = str(error)
        reasons = [reason for reason in self.engine.ranks.gather(why) if reason]
        if not reasons:
            return step
        self.engine.restart()
        self.history = []
        report({"phase": "restart", "why": reasons[0]})
        return 0

    def _load(self) -> int:
        latest = json.loads((self.state_dir / "LATEST.json").read_text(encoding="utf-8"))
        if latest["identity"] != self._identity:
            raise StorageError("the training state is of other settings or data")
        directory = self.directory(latest["step"])
        text = (directory / "metrics.jsonl").read_text(encoding="utf-8")
        self.history = [json.loads(line) for line in text.splitlines()]
        self.engine.load(directory)
        return int(latest["step"])


def _lines(history: Sequence[dict[str, Any]]) -> Iterator[str]:
    return (json.dumps(row) + "\n" for row in history)


def _unchanged(engine: TorchEngine) -> dict[str, int]:
    """Per tensor, elements that are equal in both models, over all ranks."""
    mine = engine.masked.unchanged()
    return dict(zip(mine, engine.masked.all_sum(torch.tensor(list(mine.values()))).tolist(), strict=True))


def _write(run: _Run, kept: int, final: dict[str, dict[str, float]], unchanged: dict[str, int], out_dir: Path) -> None:
    """The artifact, from the state of the step that is kept, which holds every rank's logits."""
    masked = run.engine.masked
    shapes = {s.name: s.home.shape for s in masked.slices}
    metrics = {
        "steps": len(run.history),
        "kept_step": kept,
        "data": run.data.counts,
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
    (out_dir / "metrics.jsonl").write_text("".join(_lines(run.history)), encoding="utf-8")
