"""What ranks share before the first step: pairs made from the models, and reference log-probabilities that were kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from components.checkpoints.loading import load_causal_lm
from components.checkpoints.reference import open_checkpoint
from components.masks.artifact import MaskArtifact
from components.masks.data import PreferenceData
from components.masks.engine import TorchEngine
from components.masks.loading import build_masked_model
from components.masks.objective import ONE, Forwards
from components.masks.presets import resolve
from components.masks.reference_cache import ReferenceCache
from components.masks.settings import MaskSettings
from components.masks.training import train_mask
from tests.components.masks.support import WORDS, anchors
from tests.ray_jobs.gloo import run_ranks
from tests.ray_jobs.test_deepspeed_engine import losses, workplace

pytestmark = pytest.mark.multiproc
SETTINGS = {"steps": 6, "batch_size": 4, "anchor_batch_size": 3, "anchor_new_tokens": 6, "pair_new_tokens": 6}


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def one_process_padded_as_ranks(model_dir: Path, aligned: Any, finetune: Any, settings: MaskSettings) -> TorchEngine:
    model = load_causal_lm(model_dir)
    masked = build_masked_model(model=model, aligned=aligned, finetune=finetune, settings=settings, where=model_dir)
    return TorchEngine(masked, forwards=Forwards(overhead=ONE))


@pytest.mark.usefixtures("one_thread")
def test_ranks_make_the_pairs_of_one_process_and_share_what_was_kept(tmp_path: Path) -> None:
    place, settings = workplace(tmp_path, "llama"), resolve("realign", SETTINGS)
    prompts = PreferenceData(prompts=anchors(place / "prompts.jsonl", 3 * len(WORDS)))
    alone = train_mask(
        settings=settings,
        aligned_dir=place / "aligned",
        aligned=open_checkpoint(place / "aligned").source,
        finetune=open_checkpoint(place / "finetune").source,
        preferences=prompts,
        anchors=[place / "anchors.jsonl"],
        state_dir=place / "alone/state",
        out_dir=place / "alone/mask",
        make_engine=one_process_padded_as_ranks,
        cache=ReferenceCache(place / "alone-cache", {"aligned": "the workplace's"}),
    )
    (entry,) = (place / "alone-cache").iterdir()
    kept = json.loads(entry.read_text())
    kept["log_probs"][::2] = [value + 1 for value in kept["log_probs"][::2]]
    kept["sha256"] = hashlib.sha256(json.dumps(kept["log_probs"]).encode()).hexdigest()
    (place / "shifted-cache").mkdir()
    (place / "shifted-cache" / entry.name).write_text(json.dumps(kept))
    job = {
        "place": str(place),
        "zero": {"stage": 3},
        "settings": settings.model_dump(),
        "preferences": prompts.to_json(),
    }
    jobs = [{**job, "run": "made"}, {**job, "run": "found"}, {**job, "run": "shifted", "cache": "shifted-cache"}]
    run_ranks(2, jobs, tmp_path)

    # The same bits as one process computes, so the same file.
    assert [(p.name, p.read_bytes()) for p in (place / "cache").iterdir()] == [(entry.name, entry.read_bytes())]
    for name in ("mask.safetensors", "mask.json", "metrics.jsonl"):
        assert (place / "found/mask" / name).read_bytes() == (place / "made/mask" / name).read_bytes()
    made = MaskArtifact.open(place / "made/mask").figures()
    assert made["data"] == alone.metrics["data"]
    assert made["tokens_sha256"] == alone.metrics["tokens_sha256"]
    assert losses(place / "made") == pytest.approx(losses(place / "alone"), rel=1e-4, abs=1e-6)
    # Both ranks took what the first one read: every pair's margin fell by β.
    first = [json.loads((place / run / "mask/metrics.jsonl").read_text().split("\n")[0]) for run in ("made", "shifted")]
    assert first[1]["reward_margin"] == pytest.approx(first[0]["reward_margin"] - settings.beta, abs=1e-5)
