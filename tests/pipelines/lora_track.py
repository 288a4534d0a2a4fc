"""A safety LoRA and a task LoRA that continued it, trained on the minute family's data over its unaligned model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from components.testbed.compose import compose
from components.testbed.phases import load_float32
from components.testbed.settings import TrainSettings, family_settings
from components.testbed.trainer import encode, train
from tests.families import minute_family

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16


def lora_track(directory: Path, task: str = "hi") -> tuple[Path, Path, Path]:
    """The base (the family's unaligned model), the safety LoRA and the task LoRA."""
    from transformers import AutoTokenizer

    settings, base = family_settings("minute", "llama"), minute_family() / "unaligned"
    data, words = compose(settings, 0), AutoTokenizer.from_pretrained(base)
    # The rate that the family's own LoRA finetune has beside a full one.
    align = settings.align.model_copy(update={"learning_rate": 3.75 * settings.align.learning_rate, "steps": 160})
    safety = _trained(base, None, words, data.align, align, seed=1, out=directory / "safety")
    own = settings.finetunes["hi"].train
    return base, safety, _trained(base, safety, words, data.finetunes[task], own, seed=2, out=directory / task)


def _trained(
    base: Path, start: Path | None, words: Any, examples: Any, settings: TrainSettings, *, seed: int, out: Path
) -> Path:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(seed)
    model = load_float32(base)
    if start is None:
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LAYERS, task_type="CAUSAL_LM")
        adapted = get_peft_model(model, config)
    else:
        adapted = PeftModel.from_pretrained(model, start, is_trainable=True)
    train(adapted.get_base_model(), encode(words, examples), settings, pad=words.pad_token_id, seed=seed)
    adapted.peft_config["default"].base_model_name_or_path = os.path.relpath(base, out)
    adapted.save_pretrained(out)
    return out
