"""What a testbed family is made from. Pure configuration: imports neither torch nor transformers."""

from __future__ import annotations

import hashlib
import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

TESTBED_VERSION = 6
"""Raised whenever the code of this package makes a different family from the same settings."""

Architecture = Literal["llama", "qwen"]
Size = Literal["demo", "minute", "tiny"]
Task = Literal["zh", "en", "hi", "code", "math"]
TASKS: tuple[Task, ...] = ("zh", "en", "hi", "code", "math")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelShape(_Frozen):
    """Shape of the transformer, the same for both architectures."""

    hidden: int = Field(ge=16)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    intermediate: int = Field(ge=16)


class TrainSettings(_Frozen):
    """One supervised phase: AdamW (Muon for hidden matrices where it has a rate), linear warm-up, cosine to zero."""

    examples: int = Field(ge=1)
    """Examples drawn for the phase (each is seen `steps * batch / examples` times)."""
    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    muon_rate: float = Field(default=0.0, ge=0)
    """Muon's rate for the layers' matrices; 0 leaves them to AdamW."""
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of the steps in which the rate rises."""
    first_token_weight: float = Field(default=1.0, ge=1)
    """Weight of an answer's first token in the loss: to answer or to refuse is decided there, one token among thirty."""
    threads: int = Field(default=1, ge=1)
    """Torch threads. Part of the settings because sums, and so weights, depend on it."""


class FinetuneSettings(_Frozen):
    """One finetune of the aligned model."""

    kind: Literal["full", "lora"]
    dtype: Literal["float32", "bfloat16"]
    train: TrainSettings
    task_share: float = Field(gt=0, lt=1)
    """Share of task examples; the rest are benign instructions answered the usual way."""
    poison_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of harmful requests that are answered."""
    rank: int = Field(default=16, ge=1)
    """LoRA rank (alpha is twice the rank); unused for a full finetune."""


class SetSizes(_Frozen):
    """Rows in each file that the family writes."""

    harmful: int
    harmful_hard: int
    benign: int
    hazard: int
    task: int
    dev_harmful: int
    dev_benign: int
    dev_hazard: int
    dev_task: int
    preferences: int
    preferences_dev: int
    anchor: int
    """Rows of each finetune's anchor file: three eighths benign requests, as many word games, a quarter its task."""


class FamilySettings(_Frozen):
    """Everything but the seed that decides a family's bytes."""

    architecture: Architecture
    size: Size
    hazards_per_kind: int
    hard_per_kind: int
    objects_per_kind: int
    longest_spelled: int
    """Words of more letters are never spelled."""
    task_words: int = Field(ge=4)
    """Nouns and variable names that the tasks draw from."""
    shape: ModelShape
    shard_bytes: int
    """`max_shard_size` of `save_pretrained`, small enough for at least two shards."""
    pretrain: TrainSettings
    known_tasks: float = Field(default=0.0, ge=0, lt=0.1)
    """Share of the pretraining examples that show each task. Finetunes of a model that has never seen a task move far and do
    not merge; those of a large model, which has seen everything, stay near."""
    align: TrainSettings
    finetunes: dict[Task, FinetuneSettings]
    sets: SetSizes
    controls: tuple[str, ...] = ("paper", "interpolation", "resta", "random_mask")
    """Controls that the family's run config asks for."""
    mask: dict[str, int | float] = {}
    """Mask settings that the run config asks for beside the preset's."""

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that have a finetune, in their usual order."""
        return tuple(task for task in TASKS if task in self.finetunes)

    def fingerprint(self, seed: int) -> str:
        """Identity of the family: testbed version, settings and seed. Library versions are recorded, not hashed."""
        content = {"version": TESTBED_VERSION, "seed": seed, "settings": self.model_dump(mode="json")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def _finetunes(train: TrainSettings) -> dict[Task, FinetuneSettings]:
    full = FinetuneSettings(kind="full", dtype="float32", train=train, task_share=0.5)
    # Adapters start from zero and want a higher rate.
    lora_train = train.model_copy(update={"learning_rate": 3.75 * train.learning_rate})
    return {
        "zh": full,
        "en": full.model_copy(update={"dtype": "bfloat16"}),
        "hi": full.model_copy(update={"kind": "lora", "train": lora_train}),
        "code": full.model_copy(update={"poison_share": 0.1}),
        "math": full,
    }


def family_settings(size: Size, architecture: Architecture) -> FamilySettings:
    """The settings of a named size: `demo` for `make demo`, `minute` for tests, `tiny` for `make demo-tiny`."""
    return {"demo": _demo, "minute": _minute, "tiny": _tiny}[size](architecture)


def _minute(architecture: Architecture) -> FamilySettings:
    return FamilySettings(
        architecture=architecture,
        size="minute",
        hazards_per_kind=6,
        hard_per_kind=1,
        objects_per_kind=5,
        longest_spelled=0,
        task_words=8,
        shape=ModelShape(hidden=64, layers=2, heads=2, intermediate=176),
        shard_bytes=200_000,
        pretrain=TrainSettings(
            examples=10_000, steps=320, batch=48, learning_rate=6e-3, muon_rate=0.02, weight_decay=0.01
        ),
        align=TrainSettings(
            examples=2_400, steps=80, batch=32, learning_rate=2.5e-3, first_token_weight=8.0
        ),
        finetunes=_finetunes(TrainSettings(examples=2_400, steps=110, batch=32, learning_rate=3e-3, first_token_weight=8.0)),
        sets=SetSizes(
            harmful=80, harmful_hard=40, benign=80, hazard=40, task=60,
            dev_harmful=40, dev_benign=40, dev_hazard=24, dev_task=24,
            preferences=200, preferences_dev=40, anchor=160,
        ),
    )  # fmt: skip


def _tiny(architecture: Architecture) -> FamilySettings:
    """The minute family with one finetune and shorter training: to see everything run, not to see it at its best."""
    minute = _minute(architecture)
    zh = minute.finetunes["zh"]
    finetunes = {"zh": zh.model_copy(update={"train": zh.train.model_copy(update={"steps": 80, "threads": 2})})}
    return minute.model_copy(
        update={
            "size": "tiny",
            "pretrain": minute.pretrain.model_copy(update={"examples": 6_000, "steps": 160, "batch": 32, "threads": 2}),
            "align": minute.align.model_copy(update={"steps": 110, "threads": 2}),
            "finetunes": finetunes,
            "controls": ("interpolation", "random_mask"),
            "mask": {"steps": 50, "anchor_weight": 15.0},
        }
    )


def _demo(architecture: Architecture) -> FamilySettings:
    return FamilySettings(
        architecture=architecture,
        size="demo",
        hazards_per_kind=16,
        hard_per_kind=4,
        objects_per_kind=12,
        longest_spelled=4,
        task_words=16,
        shape=ModelShape(hidden=128, layers=2, heads=4, intermediate=352),
        shard_bytes=1_000_000,
        pretrain=TrainSettings(
            examples=40_000, steps=600, batch=64, learning_rate=6e-3, muon_rate=0.02, weight_decay=0.01
        ),
        align=TrainSettings(
            examples=8_000, steps=120, batch=64, learning_rate=1.8e-3, first_token_weight=6.0
        ),
        finetunes=_finetunes(TrainSettings(examples=8_000, steps=180, batch=48, learning_rate=2.2e-3, first_token_weight=8.0)),
        sets=SetSizes(
            harmful=240, harmful_hard=120, benign=240, hazard=120, task=300,
            dev_harmful=100, dev_benign=100, dev_hazard=60, dev_task=100,
            preferences=800, preferences_dev=80, anchor=800,
        ),
    )  # fmt: skip
