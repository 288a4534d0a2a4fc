"""What the large model's benchmark does, on a small shape: load, one ZeRO-3 step over files, save."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.mask_large import QUICK, run
from components.masks.artifact import MaskArtifact
from components.masks.presets import resolve
from components.masks.state import SavedState

pytestmark = [pytest.mark.slow, pytest.mark.multiproc]


def test_a_large_models_way_ends_with_a_mask(tmp_path: Path) -> None:
    found = run(tmp_path, {**QUICK, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 2}, 2)
    h, i, v = 512, 1376, 500
    assert found["parameters"] == 2 * (4 * h * h + 3 * h * i + 2 * h) + 2 * v * h + h
    assert list((tmp_path / "files").iterdir()) == []
    assert found["bytes"]["aligned"] == found["bytes"]["finetune"] > 2 * found["parameters"]
    mask = MaskArtifact.open(tmp_path / "saved/mask")
    assert sum(mask.numel(name) for name in mask.names()) == found["parameters"]
    with SavedState(tmp_path / "saved") as state:
        assert state.updates == 1
        logits, first = torch.empty(h * h), torch.empty(h * h)
        state.read_into("logits/model.layers.1.self_attn.q_proj.weight", 0, logits)
        state.read_into("first/model.layers.1.self_attn.q_proj.weight", 0, first)
    settings = resolve("paper")
    gradient = first / (1 - settings.adam_beta1)
    assert (gradient != 0).float().mean() > 0.9
    # Adam's first update, bias-corrected: the moments are g and g².
    wanted = settings.init_logit - settings.learning_rate * gradient / (gradient.abs() + settings.adam_epsilon)
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-6)
    assert torch.equal(mask.logits("model.layers.1.self_attn.q_proj.weight"), logits.bfloat16().float())
