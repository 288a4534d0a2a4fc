"""The loop over a training's steps, and the state that a killed one goes on from."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from components.errors import StorageError
from components.masks.engine import Batch, TorchEngine
from components.masks.preferences import Schedule
from components.masks.prepare import Prepared
from components.masks.settings import MaskSettings
from components.storage import Progress

DENSITY_EVERY = 10
"""Steps between density measurements in metrics.jsonl."""


class Preempted(Exception):  # noqa: N818 - no error: what is left is somebody else's turn
    """The process was asked to end (SIGTERM, as spot machines are given before they are taken away); the state is saved."""


class TrainingRun:
    """The loop over steps and its resumable state: `step-N/` directories, the one that counts named in LATEST.json."""

    def __init__(self, engine: TorchEngine, data: Prepared, settings: MaskSettings, state_dir: Path) -> None:
        self.engine, self.data, self.settings, self.state_dir = engine, data, settings, state_dir
        seed = settings.seed
        self._pairs = Schedule(data.train_size, settings.batch_size, seed=seed, what="pairs")
        self._anchors = (
            Schedule(data.anchors_size, settings.anchor_batch_size, seed=seed, what="anchors") if data.anchors else None
        )
        self.history: list[dict[str, Any]] = []
        self.tokens, self.stepping = 0, 0.0
        """Tokens of this attempt's steps, and the seconds that they took."""
        self._identity = hashlib.sha256((settings.fingerprint() + data.fingerprint()).encode()).hexdigest()

    def batch(self, step: int) -> Batch:
        """What step `step` looks at."""
        anchors = () if self._anchors is None else tuple(self.data.anchors[i] for i in self._anchors.batch(step))
        return Batch(step, tuple(self.data.train[i] for i in self._pairs.batch(step)), anchors)

    def train(
        self,
        *,
        checkpoint_seconds: float,
        checkpoint_steps: int = 0,
        report: Progress,
        keep_going: Callable[[], None],
    ) -> None:
        """Run the steps that are left. Raises Preempted, with the state saved, when a rank is asked to end."""
        first = self._resume(report)
        if first:
            report({"phase": "resume", "step": first, "steps": self.settings.steps})
        saved = time.monotonic()
        with _asked_to_end() as asked:
            for step in range(first, self.settings.steps):
                if self._stalled():
                    break
                keep_going()
                self._advance(step, report)
                done = step + 1
                due, ends = self._agreed(time.monotonic() - saved >= checkpoint_seconds, asked())
                if due or ends or self._wanted(done) or (checkpoint_steps and done % checkpoint_steps == 0):
                    keep_going()  # not a byte after the lease is lost
                    self._save(done)
                    saved = time.monotonic()
                if ends and done < self.settings.steps:
                    raise Preempted(f"asked to end after step {step}; its state is saved")

    def _advance(self, step: int, report: Progress) -> None:
        """One step, with everything that is measured beside it."""
        metrics: dict[str, Any] = {"step": step, "temperature": self.settings.temperature(step)}
        metrics["learning_rate"] = self.settings.rate(step)
        metrics |= self._step(self.batch(step))
        done, every = step + 1, self.settings.eval_every
        if done % DENSITY_EVERY == 0 or done == self.settings.steps:
            metrics |= self.engine.density()
        if every and done % every == 0 and (done < self.settings.steps or self.settings.keep_best):
            metrics["eval"] = self.evaluate()
        self.history.append(metrics)
        report({"phase": "train", "steps": self.settings.steps, **metrics})

    def _wanted(self, done: int) -> bool:
        """Whether the state after so many steps is kept whatever the clock says: the last one, and the best so far."""
        best = self.settings.keep_best and self._best() == done
        return best or done == self.settings.steps or self._stalled()

    def _step(self, batch: Batch) -> dict[str, float]:
        began = time.monotonic()
        metrics = self.engine.step(batch)
        self.stepping += time.monotonic() - began
        self.tokens += batch.tokens()
        return metrics

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

    def _agreed(self, due: bool, asked: bool) -> tuple[bool, bool]:
        """Whether it is time to save, by the first rank's clock, and whether any rank was asked to end."""
        ranks = self.engine.ranks
        votes = ranks.all_sum(torch.tensor([int(due and ranks.rank == 0), int(asked)]))
        return bool(votes[0]), bool(votes[1])

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
            (target / "metrics.jsonl").write_text("".join(lines(self.history)), encoding="utf-8")
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


@contextmanager
def _asked_to_end() -> Iterator[Callable[[], bool]]:
    """Whether a SIGTERM has come meanwhile. Only a process's main thread is told of signals; elsewhere none is caught."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, lambda number, _frame: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


def lines(history: Sequence[dict[str, Any]]) -> Iterator[str]:
    """metrics.jsonl, a line a step."""
    return (json.dumps(row) + "\n" for row in history)
