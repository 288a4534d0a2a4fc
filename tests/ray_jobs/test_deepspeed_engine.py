"""One process and ranks of every ZeRO stage train the same mask."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from components.masks.presets import resolve
from components.masks.state import SavedState
from components.masks.training import one_process, train_mask
from components.masks.zero import ZeroSettings
from tests.components.masks.support import anchors, lora_pair, moved, preferences, saved, tiny_model
from tests.ray_jobs.gloo import models, run_ranks

pytestmark = pytest.mark.multiproc
STEPS = 20
SETTINGS: dict[str, Any] = {
    "steps": STEPS,
    "batch_size": 5,
    "anchor_batch_size": 3,
    "anchor_new_tokens": 6,
    "learning_rate": 0.05,
}
"""Batches that do not come out even on 2 or 4 ranks."""


def workplace(root: Path, architecture: str, **options: Any) -> Path:
    """Two whole models, or (`lora-…`) two adapters over one base."""
    place = root / architecture
    if architecture.startswith("lora-"):
        lora_pair(place, architecture.removeprefix("lora-"))
    else:
        model = tiny_model(architecture, **options)
        saved(model, place / "aligned")
        saved(moved(model, seed=1), place / "finetune")
    preferences(place / "preferences.jsonl")
    anchors(place / "anchors.jsonl")
    return place


def settings_of(preset: str) -> dict[str, Any]:
    return resolve(preset, SETTINGS).model_dump()


def alone(place: Path, preset: str, *, zero: ZeroSettings | None = None, **settings: Any) -> Path:
    """The same training in one process; where it left its run."""
    run = place / f"alone-{preset}-{zero}-{settings}"
    train_mask(
        settings=resolve(preset, SETTINGS | settings),
        **models(place),
        preferences=place / "preferences.jsonl",
        anchors=[place / "anchors.jsonl"],
        state_dir=run / "state",
        out_dir=run / "mask",
        make_engine=one_process(zero or ZeroSettings()),
    )
    return run


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "mask/metrics.jsonl").read_text().splitlines()]


def state_of(run: Path, kind: str, *, steps: int = STEPS) -> torch.Tensor:
    """Logits or a moment of every tensor after so many steps, one after the other."""
    found = []
    with SavedState(run / f"state/step-{steps:08d}") as state:
        for key, numel in sorted(state.numels().items()):
            if key.startswith(f"{kind}/"):
                found.append(torch.empty(numel))
                state.read_into(key, 0, found[-1])
    return torch.cat(found)


def assert_same_training(run: Path, reference: Path) -> None:
    """Losses to 1e-4 of their size. Logits: Adam divides a gradient by its own size, so where that is nothing but rounding (a
    key's bias has none by softmax's nature) the direction is anybody's. Of the others all but one in two thousand agree to
    1e-3 of the distance travelled."""
    assert losses(run) == pytest.approx(losses(reference), rel=1e-4, abs=1e-6)
    got, want, size = state_of(run, "logits"), state_of(reference, "logits"), state_of(reference, "second").sqrt()
    told = size > 1e-5 * size.max()
    moved_elements = (want != 2.0).float().mean()
    assert told.float().mean() > 0.9 * moved_elements > 0.5
    travelled = float(SETTINGS["learning_rate"]) * STEPS
    assert ((got - want)[told].abs() > 1e-3 * travelled).float().mean() < 5e-4


def test_two_ranks_of_zero_3_train_the_mask_of_one_process(tmp_path: Path) -> None:
    place = workplace(tmp_path, "llama")
    job = {"place": str(place), "settings": settings_of("realign")}
    run_ranks(2, [{**job, "run": "zero3", "zero": {"stage": 3}}], tmp_path)
    assert_same_training(place / "zero3", alone(place, "realign"))


@pytest.mark.slow
def test_two_ranks_of_zero_3_train_the_factors_mask_of_one_process(tmp_path: Path) -> None:
    place = workplace(tmp_path, "lora-llama")
    job = {"place": str(place), "settings": settings_of("paper")}
    run_ranks(2, [{**job, "run": "zero3", "zero": {"stage": 3}}], tmp_path)
    assert_same_training(place / "zero3", alone(place, "paper"))


def assert_same_bits(run: Path, reference: Path) -> None:
    assert (run / "mask/metrics.jsonl").read_bytes() == (reference / "mask/metrics.jsonl").read_bytes()
    for kind in ("logits", "first", "second"):
        assert torch.equal(state_of(run, kind), state_of(reference, kind)), kind


def test_what_lies_over_files_is_trained_to_the_same_bits(tmp_path: Path) -> None:
    """Slices large enough to be worked on in place, over files; nothing is left in the directory."""
    place, files = workplace(tmp_path, "llama", vocabulary=20_000), tmp_path / "files"
    offload = {"offload": "nvme", "offload_dir": str(files)}
    both = {**offload, "offload_weights": "nvme"}
    settings = {**settings_of("paper"), "anchor_weight": 0.5}
    jobs = [
        {"place": str(place), "settings": settings, "run": run, "zero": zero}
        for run, zero in {
            "1": {"stage": 1},
            "1-files": {"stage": 1, **offload},
            "3": {"stage": 3, "accumulate": 2},
            "3-files": {"stage": 3, "accumulate": 2, **both},
        }.items()
    ]
    run_ranks(2, jobs, tmp_path)
    for stage in ("1", "3"):
        assert_same_bits(place / f"{stage}-files", place / stage)
    zero = ZeroSettings(offload="nvme", offload_dir=files)
    alone_over_files = alone(place, "paper", zero=zero, anchor_weight=0.5)
    assert_same_bits(alone_over_files, alone(place, "paper", anchor_weight=0.5))
    assert losses(place / "3-files") == pytest.approx(losses(alone_over_files), rel=1e-4)
    assert list(files.iterdir()) == []


@pytest.mark.slow
def test_bf16_is_trained_as_in_one_process_and_near_fp32(tmp_path: Path) -> None:
    """bf16 rounds every layer's output to 2⁻⁹ of its size. One step's loss agrees to 1 %, the direction of its gradient (Adam's
    first moment) to a cosine of 0.99 with fp32's and of 0.999 with the one process', whose sums are rounded elsewhere. Without
    anchors: bf16 models answer them otherwise, which would be other data."""
    place = workplace(tmp_path, "llama")
    settings = {"steps": 1, "anchor_weight": 0.0}
    given = settings_of("realign") | settings | {"dtype": "bfloat16"}
    variants = {f"bf16-{stage}": {"stage": stage, "accumulate": 2} for stage in (0, 1, 2, 3)}
    jobs = [{"place": str(place), "settings": given, "run": run, "zero": zero} for run, zero in variants.items()]
    run_ranks(2, jobs, tmp_path)
    narrow = alone(place, "realign", **settings, dtype="bfloat16")
    wide = alone(place, "realign", **settings)
    assert losses(narrow) != losses(wide)
    for reference, run, cosine in [(wide, narrow, 0.99), *((narrow, place / variant, 0.999) for variant in variants)]:
        assert losses(run) == pytest.approx(losses(reference), rel=0.01)
        got, want = state_of(run, "first", steps=1), state_of(reference, "first", steps=1)
        assert torch.cosine_similarity(got, want, dim=0) > cosine
        torch.testing.assert_close(got.norm(), want.norm(), rtol=0.02, atol=0)


BUFFERS = """
import sys
import torch
from pathlib import Path
from components.checkpoints.loading import empty_causal_lm
from components.checkpoints.reference import open_checkpoint
from components.masks.ranks import TorchRanks
from components.masks.rooms import MemoryRoom
from components.masks.zero import ZeroSettings
from ray_jobs.deepspeed_engine import _model
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=0, world_size=1)
source = open_checkpoint(Path(sys.argv[1])).source
model, _ = _model(Path(sys.argv[1]), ZeroSettings(), TorchRanks(), source, torch.bfloat16, "cpu", MemoryRoom())
assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
wanted = dict(empty_causal_lm(Path(sys.argv[1]), dtype=torch.bfloat16).named_buffers())
assert wanted and all(b.dtype == torch.float32 and torch.equal(b, wanted[n]) for n, b in model.named_buffers())
"""


def test_a_partitioned_bf16_model_computes_its_buffers_in_fp32(tmp_path: Path) -> None:
    """Rotary frequencies: in bf16 they would differ from those of the model that is used afterwards."""
    place = saved(tiny_model("llama"), tmp_path / "model")
    environment = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", BUFFERS, str(place), str(tmp_path / "meeting")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_one_rank_that_is_asked_to_end_takes_the_others_along_with_their_state_saved(tmp_path: Path) -> None:
    place = workplace(tmp_path, "llama")
    job = {"place": str(place), "settings": settings_of("realign"), "zero": {"stage": 1}}
    run_ranks(2, [{**job, "run": "asked", "asked_at": 7}], tmp_path)
    assert json.loads((place / "asked/state/LATEST.json").read_text())["step"] == 8
    assert not (place / "asked/mask").exists()
    run_ranks(2, [{**job, "run": "asked"}, {**job, "run": "unbroken"}], tmp_path)
    assert_same_bits(place / "asked", place / "unbroken")


ARCHITECTURES = ("llama", "qwen", "gpt2", "moe", "lora-llama", "lora-gpt2")
VARIANTS: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero2-parts": {"stage": 2, "accumulate": 2},
    "zero3-parts": {"stage": 3, "accumulate": 3, "activation_checkpointing": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_stage_trains_the_mask_of_one_process(tmp_path: Path, world: int) -> None:
    places = {architecture: workplace(tmp_path, architecture) for architecture in ARCHITECTURES}
    wanted = [
        (architecture, preset, variant)
        for architecture in ARCHITECTURES
        for preset, variants in (("realign", VARIANTS), ("paper", ("zero1", "zero3")))
        for variant in variants
    ]
    jobs = [
        {"place": str(places[a]), "run": f"{v}-{p}", "zero": VARIANTS[v], "settings": settings_of(p)}
        for a, p, v in wanted
    ]
    run_ranks(world, jobs, tmp_path, timeout=1200)
    references = {(a, p): alone(places[a], p) for a in ARCHITECTURES for p in ("realign", "paper")}
    for architecture, preset, variant in wanted:
        assert_same_training(places[architecture] / f"{variant}-{preset}", references[architecture, preset])


@pytest.mark.slow
def test_training_goes_on_at_another_number_of_ranks(tmp_path: Path) -> None:
    """Stopped after every seven steps: two ranks, four, one, two again and to the end."""
    place = workplace(tmp_path, "qwen")
    job = {"place": str(place), "settings": settings_of("realign"), "run": "moved"}
    for world, stage in ((2, 3), (4, 1), (1, 2)):
        run_ranks(world, [{**job, "zero": {"stage": stage}, "stop_at": 5}], tmp_path)
    run_ranks(2, [{**job, "zero": {"stage": 0}}], tmp_path)
    assert_same_training(place / "moved", alone(place, "realign"))


@pytest.mark.slow
def test_shared_logits_are_the_same_on_every_rank(tmp_path: Path) -> None:
    """Rows and tensors that ranks cut through; also stopped on two ranks and gone on with by one."""
    places = {architecture: workplace(tmp_path, architecture) for architecture in ("llama", "moe")}
    cells = [(a, g, stage) for a in places for g in ("row", "tensor") for stage in (0, 2, 3)]
    jobs = [
        {"place": str(places[a]), "run": f"{g}-{stage}", "zero": {"stage": stage},
         "settings": settings_of("realign") | {"granularity": g}}
        for a, g, stage in cells
    ]  # fmt: skip
    run_ranks(2, [*jobs, {**jobs[2], "run": "moved", "stop_at": 8}], tmp_path, timeout=600)
    run_ranks(1, [{**jobs[1], "run": "moved"}], tmp_path)
    references = {(a, g): alone(places[a], "realign", granularity=g) for a in places for g in ("row", "tensor")}
    for a, g, stage in cells:
        assert_same_training(places[a] / f"{g}-{stage}", references[a, g])
    assert_same_training(places["llama"] / "moved", references["llama", "row"])
