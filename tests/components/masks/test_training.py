"""The whole of mask training: it learns, resumes to the bit, keeps its promises about errors; Adam; presets."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from components.errors import DataError, TrainingError
from components.masks.engine import Batch, ScoredPair, TorchEngine
from components.masks.loop import Preempted
from components.masks.presets import resolve
from components.masks.settings import MaskSettings
from components.masks.training import MaskResult, train_mask
from tests.components.masks.support import anchors, moved, preferences, saved, source, tiny_model
from tests.components.masks.test_masked_model import by_slice, example_batch, masked

SMALL = {"steps": 24, "batch_size": 4, "anchor_batch_size": 3, "anchor_new_tokens": 6}


class Workplace:
    """Files of one training problem; `train` runs it."""

    def __init__(self, root: Path, architecture: str = "llama") -> None:
        self.root = root
        self.model = tiny_model(architecture)
        self.finetune = moved(self.model, seed=3)
        self.aligned_dir = saved(self.model, root / "aligned")
        self.preferences = preferences(root / "pairs.jsonl")
        self.dev = preferences(root / "dev.jsonl", 5)
        self.anchor = anchors(root / "anchor.jsonl")

    def train(self, name: str, settings: MaskSettings, **options: Any) -> MaskResult:
        given = {
            "aligned": source(self.model),
            "finetune": source(self.finetune),
            "preferences": self.preferences,
            "preferences_dev": self.dev,
            "anchors": [self.anchor],
            "state_dir": self.root / name / "state",
            "out_dir": self.root / name / "out",
        }
        return train_mask(settings=settings, aligned_dir=self.aligned_dir, **{**given, **options})

    def files(self, name: str) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in (self.root / name / "out").iterdir()}


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def test_a_mask_learns_to_prefer_the_chosen_answers(place: Workplace) -> None:
    settings = resolve("realign", SMALL | {"learning_rate": 0.3, "steps": 40, "eval_every": 20})
    result = place.train("run", settings)
    history = [json.loads(line) for line in (place.root / "run/out/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history] == list(range(40))
    assert sum(r["loss"] for r in history[-8:]) < 0.8 * sum(r["loss"] for r in history[:8])
    assert history[0]["temperature"] == 1.0
    assert history[-1]["temperature"] == pytest.approx(0.02)
    assert [row["step"] for row in history if "eval" in row] == [19]
    evaluation = result.metrics["evaluation"]
    assert set(evaluation) == {"train_soft", "dev_soft", "train_binary", "dev_binary"}
    assert evaluation["train_soft"]["dpo_accuracy"] > 0.9
    assert evaluation["train_binary"]["loss"] < history[0]["loss"]
    assert result.metrics["data"] == {
        "pairs": 12, "pairs_too_long": 0, "pairs_used": 12, "pairs_dev": 5, "pairs_dev_too_long": 0,
        "anchors": 18, "anchors_used": 18, "anchors_dev": 2,
    }  # fmt: skip
    assert 0.15 < result.metrics["delta_zero_share"] < 0.25
    about = result.artifact.metadata["tensors"]
    assert set(about) == {n for n, _ in place.model.named_parameters()}
    assert all(0 <= t["density"] <= 1 and 0 <= t["delta_zero_share"] <= 1 for t in about.values())
    assert set(result.cost["seconds"]) == {"load", "prepare", "steps", "evaluate", "write"}
    assert result.cost["tokens_per_second"] * result.cost["seconds"]["steps"] > 24 * (2 * 4 + 3) * 8
    assert result.cost["peak_memory_bytes"] > 2**27
    # Where the finetune changed nothing the logits stay at ℓ₀.
    name = "model.layers.0.mlp.up_proj.weight"
    finetune = dict(place.finetune.named_parameters())[name].detach().view(-1)
    same = finetune == dict(place.model.named_parameters())[name].detach().view(-1)
    assert bool((result.artifact.logits(name)[same] == 2.0).all())


def test_a_run_that_is_asked_to_end_saves_first(tmp_path: Path) -> None:
    place, settings = Workplace(tmp_path, "llama"), resolve("realign", SMALL)
    place.train("whole", settings)
    before, calls = signal.getsignal(signal.SIGTERM), iter(range(10_000))

    def keep_going() -> None:
        if next(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted, match="asked to end after step 5; its state is saved"):
        place.train("asked", settings, keep_going=keep_going, checkpoint_seconds=3600.0)
    assert signal.getsignal(signal.SIGTERM) is before
    assert [p.name for p in (place.root / "asked/state").glob("step-*")] == ["step-00000006"]
    events: list[dict[str, Any]] = []
    place.train("asked", settings, progress=events.append)
    assert {"phase": "resume", "step": 6, "steps": 24} in events
    for file in ("mask.safetensors", "mask.json", "metrics.jsonl"):
        assert (place.root / "asked/out" / file).read_bytes() == (place.root / "whole/out" / file).read_bytes()


def test_states_are_kept_each_so_many_steps(tmp_path: Path) -> None:
    place, settings, calls = Workplace(tmp_path, "llama"), resolve("realign", SMALL), iter(range(10_000))

    def keep_going() -> None:
        # Called before each step and once more before each save: steps 0 to 4 and one save make six.
        if next(calls) == 7:
            raise LeaseLostError

    with pytest.raises(LeaseLostError):
        place.train("run", settings, keep_going=keep_going, checkpoint_seconds=3600.0, checkpoint_steps=4)
    assert json.loads((place.root / "run/state/LATEST.json").read_text())["step"] == 4


class LeaseLostError(Exception):
    """Raised by a test in place of a lost lease."""


@pytest.mark.parametrize(("architecture", "preset"), [("llama", "realign"), ("qwen", "paper"), ("gpt2", "realign")])
def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path: Path, architecture: str, preset: str) -> None:
    place = Workplace(tmp_path, architecture)
    settings = resolve(preset, SMALL | {"learning_rate": 0.1, "clip_norm": 0.05, "eval_every": 7})
    place.train("whole", settings)
    for stop_at in (1, 9, 10, 20):
        calls = iter(range(10_000))

        def keep_going(calls: Any = calls, stop_at: int = stop_at) -> None:
            if next(calls) >= stop_at:
                raise LeaseLostError

        with pytest.raises(LeaseLostError):
            place.train("broken", settings, keep_going=keep_going, checkpoint_seconds=0.0)
    assert not (place.root / "broken/out").exists()
    latest = json.loads((place.root / "broken/state/LATEST.json").read_text())
    assert 0 < latest["step"] < settings.steps
    assert [p.name for p in (place.root / "broken/state").glob("step-*")] == [f"step-{latest['step']:08d}"]
    events: list[dict[str, Any]] = []
    place.train("broken", settings, progress=events.append)
    assert {"phase": "resume", "step": latest["step"], "steps": 24} in events
    assert place.files("broken") == place.files("whole")
    # A finished state gives the artifact again without a step.
    events.clear()
    place.train("broken", settings, progress=events.append, out_dir=place.root / "again/out")
    assert not [e for e in events if e["phase"] == "train"]
    assert place.files("again") == place.files("whole")


def test_a_half_written_checkpoint_is_passed_over(place: Workplace) -> None:
    settings = resolve("paper", SMALL)
    place.train("whole", settings)
    calls = iter(range(100))

    def keep_going() -> None:
        if next(calls) > 11:
            raise LeaseLostError

    with pytest.raises(LeaseLostError):
        place.train("broken", settings, keep_going=keep_going, checkpoint_seconds=0.0)
    state = place.root / "broken/state"
    done = json.loads((state / "LATEST.json").read_text())["step"]
    half = state / f"step-{done + 1:08d}"
    half.mkdir()
    (half / "engine.safetensors").write_bytes(b"half")
    (state / "LATEST.json.new").write_text("{")
    place.train("broken", settings, checkpoint_seconds=0.0)
    assert place.files("broken") == place.files("whole")


def test_state_that_does_not_fit_or_cannot_be_read_is_not_gone_on_with(place: Workplace) -> None:
    other = resolve("paper", SMALL | {"beta": 0.2})
    place.train("fresh", other)
    place.train("run", resolve("paper", SMALL))

    def train_again() -> list[str]:
        events: list[dict[str, Any]] = []
        place.train("run", other, progress=events.append)
        assert place.files("run") == place.files("fresh")
        assert len([e for e in events if e["phase"] == "train"]) in (0, other.steps)
        return [e["why"] for e in events if e["phase"] == "restart"]

    assert train_again() == ["the training state is of other settings or data"]
    assert train_again() == []  # this is its own state, and done
    state = next((place.root / "run/state").glob("step-*")) / "engine-00000-of-00001.safetensors"
    state.write_bytes(state.read_bytes()[:-4])
    (why,) = train_again()
    assert "engine-00000-of-00001.safetensors: training state cannot be read" in why
    (place.root / "run/state/LATEST.json").write_text("{")
    assert len(train_again()) == 1


def test_the_anchor_needs_prompts(place: Workplace) -> None:
    with pytest.raises(DataError, match="there is no anchor file"):
        place.train("run", resolve("realign", SMALL), anchors=[])
    place.train("run", resolve("paper", SMALL), anchors=[])


def test_a_loss_that_is_not_finite_names_step_and_rows() -> None:
    engine, batch = TorchEngine(masked()), example_batch(dtype=torch.float32)
    before = [s.logits.clone() for s in engine.masked.slices]
    bad = (ScoredPair(batch.pairs[0].pair, (math.nan, 0.0)), *batch.pairs[1:])
    with pytest.raises(TrainingError, match="the loss is nan at step 7, preference lines 0; 1; 2"):
        engine.step(Batch(7, bad, batch.anchors))
    assert all(torch.equal(a, s.logits) for a, s in zip(before, engine.masked.slices, strict=True))


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_the_optimizer_is_adam(clip: float | None) -> None:
    settings = MaskSettings(learning_rate=0.05, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-5, clip_norm=clip)
    engine = TorchEngine(masked(settings=settings, dtype=torch.float64))
    ours = engine.masked.slices
    theirs = [torch.nn.Parameter(s.logits.clone()) for s in ours]
    adam = torch.optim.Adam(theirs, lr=0.05, betas=(0.8, 0.95), eps=1e-5)
    for step in range(5):
        batch = example_batch()
        batch = Batch(step, batch.pairs, batch.anchors)
        mirror = masked(settings=settings, dtype=torch.float64)
        for s, logits in zip(mirror.slices, theirs, strict=True):
            s.logits.copy_(logits.detach())
        mirror.write_sample(step)
        torch.autograd.backward(TorchEngine(mirror)._losses(batch).loss)
        for logits, gradient in zip(theirs, by_slice(mirror, mirror.logit_gradients()), strict=True):
            logits.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(theirs, clip or 1e9)
        adam.step()
        metrics = engine.step(batch)
        assert metrics["gradient_norm"] == pytest.approx(norm.item(), rel=1e-6)
    for s, logits in zip(ours, theirs, strict=True):
        torch.testing.assert_close(s.logits, logits.detach(), rtol=1e-5, atol=1e-6)
        assert (s.logits - 2.0).abs().max() > 0.1


@pytest.mark.parametrize("reference", ["aligned", "finetuned", "initial"])
def test_reference_log_probs_come_from_the_weights_that_are_named(place: Workplace, reference: str) -> None:
    """At the first step with the reference's own weights every margin is 0 and the loss ln 2."""
    settings = resolve("paper", SMALL | {"reference": reference, "steps": 1, "learning_rate": 1e-9})
    init = {"aligned": -200.0, "finetuned": 200.0, "initial": 0.3}[reference]
    extra = {
        "init_logit": init,
        "rescale": "none",
        "stochastic": False,
        "temperature_start": 1.0,
        "temperature_end": 1.0,
    }
    result = place.train("run", settings.model_copy(update=extra))
    assert result.metrics["final"]["dpo_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert result.metrics["final"]["reward_margin"] == pytest.approx(0.0, abs=1e-4)


def test_evaluation_in_parts_equals_one_batch() -> None:
    engine, batch = TorchEngine(masked(dtype=torch.float64)), example_batch()
    many = Batch(-1, batch.pairs * 15, batch.anchors * 20)  # 45 pairs, 20 anchors: two parts
    got, expected = engine.evaluate(many, "soft"), engine.evaluate(batch, "soft")
    assert got == pytest.approx(expected, rel=1e-9)
    assert not any(p.grad is not None for p in engine.masked.model.parameters())


def test_shares_of_a_batch_add_up_to_it() -> None:
    settings = resolve("realign", {"learning_rate": 0.05})
    batch = example_batch()
    batch = Batch(3, batch.pairs + batch.pairs[:2], batch.anchors * 2)
    found = []
    for accumulate in (1, 2, 7):
        engine = TorchEngine(masked(settings=settings, dtype=torch.float64), accumulate=accumulate)
        engine.masked.write_sample(3)
        metrics = engine._backward(batch)
        found.append((metrics, engine.masked.logit_gradients()))
    for metrics, gradients in found[1:]:
        assert metrics == pytest.approx(found[0][0], rel=1e-6)
        for got, expected in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


def test_the_rate_rises_and_falls() -> None:
    settings = MaskSettings(learning_rate=0.4, steps=10, warmup_steps=4, schedule="linear")
    rates = [settings.rate(step) for step in range(10)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4 * 5 / 6, 0.4 * 4 / 6, 0.2, 0.4 * 2 / 6, 0.4 / 6])
    cosine = MaskSettings(learning_rate=0.4, steps=10, schedule="cosine")
    assert [cosine.rate(s) for s in (0, 5)] == pytest.approx([0.4, 0.2])
    assert {MaskSettings(learning_rate=0.4).rate(s) for s in (0, 7, 199)} == {0.4}
    with pytest.raises(ValueError, match="must be fewer than steps"):
        MaskSettings(steps=4, warmup_steps=4)


def test_training_stops_when_dev_no_longer_falls_and_keeps_the_best_mask(place: Workplace) -> None:
    """A rate far too high: the first evaluation is the best one, or close to it."""
    options = SMALL | {"steps": 60, "learning_rate": 30.0, "eval_every": 3, "patience": 2, "keep_best": True}
    result = place.train("run", resolve("realign", options))
    rows = [json.loads(line) for line in (place.root / "run/out/metrics.jsonl").read_text().splitlines()]
    losses = {row["step"] + 1: row["eval"]["dev_binary"]["loss"] for row in rows if "eval" in row}
    best = min(losses, key=lambda done: (losses[done], done))
    assert result.metrics["kept_step"] == best
    assert result.metrics["steps"] == len(rows) == best + 6 < 60
    assert result.metrics["evaluation"]["dev_binary"]["loss"] == pytest.approx(losses[best], rel=1e-6)
    # Stopping leaves a run that is over: the same call finds it and writes the same files.
    first = place.files("run")
    assert place.train("run", resolve("realign", options)).metrics == result.metrics
    assert place.files("run") == first
    # Up to there it is the training without an end.
    place.train("short", resolve("realign", {**options, "keep_best": False, "patience": 0, "eval_every": 0}))
    again = [json.loads(line) for line in (place.root / "short/out/metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in again[:best]] == [row["loss"] for row in rows[:best]]


def test_safe_answers_alone_are_learnt_without_a_preference_loss(place: Workplace) -> None:
    options = SMALL | {"steps": 40, "learning_rate": 0.3, "preference_weight": 0.0, "chosen_weight": 1.0}
    place.train("run", resolve("realign", options))
    rows = [json.loads(line) for line in (place.root / "run/out/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["chosen_nll"] < 0.7 * rows[0]["chosen_nll"]
    for row in rows:
        assert row["loss"] == pytest.approx(row["chosen_nll"] + 60.0 * row["anchor_kl"], rel=1e-5)
    with pytest.raises(ValueError, match="nothing would make the model safe"):
        MaskSettings(preference_weight=0.0)
