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
from components.masks.anchor import Anchor, answer, sequence_log_probs, teachers
from components.masks.artifact import MaskArtifact, write_artifact
from components.masks.engine import Batch, Engine, ScoredPair, TorchEngine
from components.masks.loading import build_masked_model
from components.masks.masked_model import MaskedModel
from components.masks.preferences import (
    Pair,
    Schedule,
    encode_pairs,
    encode_prompt,
    load_preferences,
    load_prompts,
)
from components.masks.settings import MaskSettings

DENSITY_EVERY = 10
"""Steps between density measurements in metrics.jsonl."""

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class MaskResult:
    """What training leaves. `metrics` depends on inputs and settings only; `seconds` on the machine."""

    artifact: MaskArtifact
    metrics: dict[str, Any]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Prepared:
    """Everything that steps and evaluations look at, tokenised, with reference and teacher values."""

    train: dict[int, ScoredPair]
    """By index among the usable training pairs; only those that some step takes."""
    train_size: int
    dev: list[ScoredPair]
    anchors: dict[int, Anchor]
    anchors_size: int
    anchors_dev: list[Anchor]
    counts: dict[str, int]

    def fingerprint(self) -> str:
        """SHA-256 of the tokens: what a resumed run must find again."""
        pairs = [*self.train.values(), *self.dev]
        rows = [r.tokens for p in pairs for r in (p.pair.chosen, p.pair.rejected)]
        rows += [a.row.tokens for a in [*self.anchors.values(), *self.anchors_dev]]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def train_mask(
    *,
    settings: MaskSettings,
    aligned_dir: Path,
    aligned: TensorSource,
    finetune: TensorSource,
    tokenizer_dir: Path | None = None,
    preferences: Path,
    preferences_dev: Path | None = None,
    anchor: Path | None = None,
    state_dir: Path,
    out_dir: Path,
    checkpoint_seconds: float = 30.0,
    progress: Progress | None = None,
    keep_going: Callable[[], None] | None = None,
) -> MaskResult:
    """Train the mask of one finetune and write `mask.safetensors`, `mask.json` and `metrics.jsonl` into `out_dir`.

    `aligned_dir` gives the architecture, `tokenizer_dir` tokenizer and chat template (those that the fused model will be
    asked with: the finetune's; by default the aligned model's); weights come from the two sources. `state_dir`
    belongs to this run alone: a run that finds a checkpoint there goes on from it, and its artifact has the same bytes
    as an unbroken run's. `keep_going` is called before every step and may raise to stop. The caller sets torch's
    threads. Raises DataError, CheckpointError, ConfigError, TrainingError."""
    clock = _Clock()
    if settings.anchor_weight > 0 and anchor is None:
        raise DataError(
            "mask.anchor_weight is above 0 but the finetune has no anchor file; give one, or set the weight to 0"
        )
    tokenizer = load_tokenizer(tokenizer_dir or aligned_dir)
    rows = load_preferences(preferences)
    pairs, too_long = encode_pairs(tokenizer, rows, settings.max_length, preferences)
    dev_pairs, dev_too_long = list[Pair](), 0
    if preferences_dev is not None:
        held_out = load_preferences(preferences_dev)
        dev_pairs, dev_too_long = encode_pairs(tokenizer, held_out, settings.max_length, preferences_dev)
    use_anchor = anchor if settings.anchor_weight > 0 else None
    prompts = [] if use_anchor is None else [encode_prompt(tokenizer, p.prompt) for p in load_prompts(use_anchor)]
    masked = build_masked_model(
        model=load_causal_lm(aligned_dir), aligned=aligned, finetune=finetune, settings=settings, where=aligned_dir
    )
    clock.lap("load")
    report = progress or (lambda _event: None)
    report({"phase": "prepare", "pairs": len(pairs), "anchors": len(prompts)})
    dropped = {"pairs_too_long": too_long, "pairs_dev_too_long": dev_too_long}
    data = _prepare(masked, tokenizer, pairs, dev_pairs, prompts, dropped)
    clock.lap("prepare")
    engine = TorchEngine(masked)
    run = _Run(engine, data, settings, state_dir)
    run.train(checkpoint_seconds=checkpoint_seconds, report=report, keep_going=keep_going or (lambda: None))
    clock.lap("steps")
    report({"phase": "evaluate"})
    final = run.evaluate()
    clock.lap("evaluate")
    metrics = _write(masked, engine, run, final, out_dir)
    clock.lap("write")
    return MaskResult(MaskArtifact.open(out_dir), metrics, clock.seconds)


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self._last = now - self._last, now


def _prepare(
    masked: MaskedModel,
    tokenizer: Any,
    pairs: Sequence[Pair],
    dev_pairs: Sequence[Pair],
    prompts: Sequence[tuple[int, ...]],
    dropped: dict[str, int],
) -> Prepared:
    """Reference log-probabilities and the anchor's targets, computed once with the weights they belong to. `dropped` counts
    what the data files had beside that."""
    settings = masked.settings
    used = Schedule(len(pairs), settings.batch_size, seed=settings.seed, what="pairs").used(settings.steps)
    dev = list(dev_pairs[: settings.eval_pairs])
    # ℓ is at ℓ₀ here, so the `initial` reference is the soft mask as it stands.
    masked.write("soft" if settings.reference == "initial" else settings.reference)
    scored = _with_reference(masked.model, [*(pairs[i] for i in used), *dev])
    train, held_out = _split_anchors(len(prompts), settings)
    anchors: list[Anchor] = []
    taken: list[int] = []
    if prompts:
        schedule = Schedule(len(train), settings.anchor_batch_size, seed=settings.seed, what="anchors")
        taken = schedule.used(settings.steps)
        masked.write("finetuned")
        chosen = [prompts[train[i]] for i in taken] + [prompts[i] for i in held_out[: settings.eval_pairs]]
        answers = answer(masked.model, tokenizer, chosen, settings.anchor_new_tokens)
        full, top_k = settings.anchor_full_vocabulary, settings.anchor_top_k
        taught = teachers(masked.model, answers, full_vocabulary=full, top_k=top_k)
        anchors = [Anchor(row, teacher) for row, teacher in zip(answers, taught, strict=True)]
    return Prepared(
        train=dict(zip(used, scored[: len(used)], strict=True)),
        train_size=len(pairs),
        dev=scored[len(used) :],
        anchors=dict(zip(taken, anchors[: len(taken)], strict=True)),
        anchors_size=len(train),
        anchors_dev=anchors[len(taken) :],
        counts={"pairs": len(pairs), "pairs_used": len(used), "pairs_dev": len(dev)}
        | {"anchors": len(train), "anchors_used": len(taken), "anchors_dev": len(anchors) - len(taken)}
        | dropped,
    )


def _with_reference(model: Any, pairs: Sequence[Pair]) -> list[ScoredPair]:
    values = sequence_log_probs(model, [r for p in pairs for r in (p.chosen, p.rejected)]).view(-1, 2).tolist()
    return [ScoredPair(p, (chosen, rejected)) for p, (chosen, rejected) in zip(pairs, values, strict=True)]


def _split_anchors(prompts: int, settings: MaskSettings) -> tuple[list[int], list[int]]:
    """Indices to train on and to hold out. The held-out ones are drawn by hash, so files sorted by kind are no
    trouble."""
    if not prompts:
        return [], []
    order = Schedule(prompts, prompts, seed=settings.seed, what="holdout").batch(0)
    held_out = min(int(prompts * settings.anchor_holdout), prompts - 1)
    return sorted(order[held_out:]), sorted(order[:held_out])


class _Run:
    """The loop over steps and its resumable state: `step-N/` directories, the one that counts named in LATEST.json."""

    def __init__(self, engine: Engine, data: Prepared, settings: MaskSettings, state_dir: Path) -> None:
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
            keep_going()
            metrics: dict[str, Any] = {"step": step, "temperature": self.settings.temperature(step)}
            metrics |= self.engine.step(self.batch(step))
            done, every = step + 1, self.settings.eval_every
            if done % DENSITY_EVERY == 0 or done == self.settings.steps:
                metrics |= self.engine.density()
            if every and done % every == 0 and done < self.settings.steps:
                metrics["eval"] = self.evaluate()
            self.history.append(metrics)
            report({"phase": "train", "steps": self.settings.steps, **metrics})
            if time.monotonic() - saved >= checkpoint_seconds or done == self.settings.steps:
                keep_going()  # not a byte after the lease is lost
                self._save(done)
                saved = time.monotonic()

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

    def _save(self, done: int) -> None:
        """A checkpoint counts from the moment LATEST.json names it; what it replaces is removed afterwards."""
        self.state_dir.mkdir(parents=True, exist_ok=True)
        target = self.state_dir / f"step-{done:08d}"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        self.engine.save(target)
        (target / "metrics.jsonl").write_text("".join(_lines(self.history)), encoding="utf-8")
        latest = self.state_dir / "LATEST.json.new"
        latest.write_text(json.dumps({"step": done, "identity": self._identity}), encoding="utf-8")
        latest.replace(self.state_dir / "LATEST.json")
        for old in self.state_dir.glob("step-*"):
            if old != target:
                shutil.rmtree(old, ignore_errors=True)

    def _resume(self, report: Progress) -> int:
        """Steps that are done. State that does not fit (another machine's finetune answered an anchor differently) or
        cannot be read is worth less than the run: it starts anew."""
        path = self.state_dir / "LATEST.json"
        if not path.exists():
            return 0
        try:
            latest = json.loads(path.read_text(encoding="utf-8"))
            if latest["identity"] != self._identity:
                report({"phase": "restart", "why": "the training state is of other settings or data"})
                return 0
            directory = self.state_dir / f"step-{latest['step']:08d}"
            text = (directory / "metrics.jsonl").read_text(encoding="utf-8")
            history = [json.loads(line) for line in text.splitlines()]
            self.engine.load(directory)
        except (StorageError, OSError, ValueError, KeyError, TypeError) as error:
            report({"phase": "restart", "why": str(error)})
            return 0
        self.history = history
        return int(latest["step"])


def _lines(history: Sequence[dict[str, Any]]) -> Iterator[str]:
    return (json.dumps(row) + "\n" for row in history)


def _write(
    masked: MaskedModel, engine: Engine, run: _Run, final: dict[str, dict[str, float]], out_dir: Path
) -> dict[str, Any]:
    unchanged = masked.unchanged()
    shapes = {s.name: s.home.shape for s in masked.slices}
    total = sum(s.numel for s in masked.slices)
    metrics = {
        "steps": run.settings.steps,
        "data": run.data.counts,
        "final": {k: v for k, v in run.history[-1].items() if k != "eval"},
        "evaluation": final,
        "delta_zero_share": sum(unchanged.values()) / total,
    }
    statistics = {n: {"delta_zero_share": unchanged[n] / max(_numel(shapes[n]), 1)} for n in shapes}
    write_artifact(
        out_dir,
        shapes=shapes,
        shards=engine.iter_shards(),
        settings=run.settings,
        unmasked=masked.unmasked_numel(),
        statistics=statistics,
        extra={"metrics": metrics},
    )
    (out_dir / "metrics.jsonl").write_text("".join(_lines(run.history)), encoding="utf-8")
    written = MaskArtifact.open(out_dir).metadata
    return metrics | {"density": written["density"], "soft_mean": written["soft_mean"]}


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
