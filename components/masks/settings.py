"""What a learned mask is: every choice that changes the result, and nothing else (no devices, paths or intervals).

Light on purpose: no torch, so that a run config is checked without paying for its import.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

PreferenceLoss = Literal["sigmoid", "hinge", "ipo"]


class MaskSettings(BaseModel):
    """Objective, relaxation and optimisation of a Concrete mask (METHODS.md, section 1; arXiv 2405.09055)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    relaxation: Literal["concrete", "straight_through"] = "concrete"
    """`concrete`: the relaxed sample is used as it is. `straight_through`: hard forward (0 or 1), soft gradient."""
    stochastic: bool = True
    """Draw logistic noise at each step; without it the mask is σ(ℓ/T) (straight-through: ℓ > 0)."""
    temperature_start: float = Field(default=1.0, gt=0)
    """T at the first step."""
    temperature_end: float = Field(default=0.02, gt=0)
    """T at the last step; geometric in between. Equal to the start: constant."""
    init_logit: float = 2.0
    """ℓ₀, the same for every element."""
    rescale: Literal["mean", "detached", "none"] = "none"
    """Divide each tensor's mask by its mean: with the mean's gradient (paper), without it, or not at all."""
    scale: float = Field(default=1.0, gt=0)
    """λ, the factor on the masked delta."""
    loss: PreferenceLoss = "sigmoid"
    """How a preference pair is held against the reference: sigmoid (DPO), hinge (SLiC) or ipo."""
    beta: float = Field(default=0.1, gt=0)
    """β of the preference loss."""
    preference_weight: float = Field(default=1.0, ge=0)
    """Weight of the preference loss; 0 leaves `chosen_weight` alone: SFT on the safe answers."""
    chosen_weight: float = Field(default=0.0, ge=0)
    """Weight of −log π(chosen), in nats an answer, mean over pairs. DPO alone may take probability from the rejected answer and
    give it to neither (arXiv 2404.19733 adds the term for that reason): then a model that complied babbles."""
    reference: Literal["aligned", "finetuned", "initial"] = "aligned"
    """Weights that give DPO's reference log-probabilities; `initial` is the soft mask at ℓ₀."""
    anchor_weight: float = Field(default=1.0, ge=0)
    """Weight of KL(finetune ‖ masked), in nats a token, on the finetune's own answers to the anchor prompts; 0: no
    anchor."""
    anchor_batch_size: int = Field(default=16, ge=1)
    """Anchor prompts a step."""
    anchor_new_tokens: int = Field(default=48, ge=1)
    """Longest answer, in tokens, that the finetune writes to an anchor prompt."""
    anchor_full_vocabulary: int = Field(default=4096, ge=0)
    """Up to this vocabulary size the whole distribution is matched; above it the top k tokens and the tail's mass."""
    anchor_top_k: int = Field(default=64, ge=1)
    """k for larger vocabularies."""
    anchor_holdout: float = Field(default=0.1, ge=0, lt=1)
    """Share of the anchor prompts that is never trained on and measures the anchor's KL on dev."""
    density_weight: float = 0.0
    """Added to the loss: this × the mean of σ(ℓ). Positive keeps less of the delta, negative more."""
    learning_rate: float = Field(default=0.1, gt=0)
    """Adam's learning rate on ℓ, at its highest."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps in which the rate rises linearly."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the rate does after that: stays, or falls to 0 at the last step."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of Adam's first moment."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of Adam's second moment."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Adam's ε."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest global norm of the gradient of ℓ; null: unclipped."""
    steps: int = Field(default=200, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=16, ge=1)
    """Preference pairs a step, over all workers."""
    max_length: int = Field(default=512, ge=8)
    """Longest prompt + response in tokens. Longer pairs are left out and counted."""
    pair_new_tokens: int = Field(default=128, ge=1)
    """Longest answer, in tokens, that the models write for a pair where preferences are `{prompts: …}`."""
    include: tuple[str, ...] = ("*",)
    """Shell-style patterns of tensor names that get a mask."""
    exclude: tuple[str, ...] = ()
    """Patterns taken out again. A tensor without a mask keeps the finetune's weights."""
    granularity: Literal["element", "row", "tensor"] = "element"
    """What shares a logit: nothing (as published), a row (all elements of a matrix that share every index but the last), or a
    whole tensor. A coarser mask costs next to nothing to keep and to train, and tells less apart."""
    storage: Literal["logits", "bits"] = "logits"
    """What the artifact keeps: bf16 logits (soft and binary masks) or packed bits (binary only)."""
    eval_every: int = Field(default=0, ge=0)
    """Evaluate on dev each so many steps; 0: only at the end."""
    keep_best: bool = False
    """Keep the mask of the evaluation with the smallest dev loss (binary mask), not the last one."""
    patience: int = Field(default=0, ge=0)
    """Stop after so many evaluations without a smaller dev loss; 0: never."""
    eval_pairs: int = Field(default=128, ge=1)
    """Most pairs (and anchors) of train and of dev that an evaluation looks at."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the fused weights, in which the model goes forward and backward. Logits, moments, the arithmetic of the mask and
    the sum of gradients are fp32 in either case."""
    seed: int = Field(default=0, ge=0)
    """Of the noise and of the order of the data."""

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if not self.include:
            raise ValueError("include is empty: no tensor would get a mask")
        if self.preference_weight == 0 and self.chosen_weight == 0:
            raise ValueError("preference_weight and chosen_weight are both 0: nothing would make the model safe")
        if (self.keep_best or self.patience) and not self.eval_every:
            raise ValueError("keep_best and patience look at evaluations: set eval_every")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be fewer than steps ({self.steps})")
        return self

    def unit(self, shape: Sequence[int]) -> int:
        """Elements that share a logit, in a tensor of this shape; 1 where it has no elements."""
        if self.granularity == "tensor":
            return max(1, math.prod(shape))
        return max(1, shape[-1]) if self.granularity == "row" and len(shape) > 1 else 1

    def rate(self, step: int) -> float:
        """The learning rate at `step` (0-based)."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        left = 1 - (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        share = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}[self.schedule]
        return self.learning_rate * share

    def temperature(self, step: int) -> float:
        """T at `step` (0-based): geometric from start to end over `steps`."""
        if self.temperature_start == self.temperature_end or self.steps == 1:
            return self.temperature_start
        share = min(step, self.steps - 1) / (self.steps - 1)
        return float(self.temperature_start * (self.temperature_end / self.temperature_start) ** share)

    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON of every setting."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()
