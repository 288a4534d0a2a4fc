"""What a fusion is: the method and every number that changes the fused weights, and nothing else.

Light on purpose: no torch, so that a run config is checked without paying for its import.
"""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from components.fusion.merge_settings import Patterns

MethodName = Literal["masked", "interpolation", "resta", "random_mask", "safe_lora", "safe_merge", "lox"]

OWN_FIELDS: dict[str, frozenset[str]] = {
    "masked": frozenset({"form", "scale", "rescale", "threshold", "temperature", "layers"}),
    "interpolation": frozenset({"alpha"}),
    "resta": frozenset({"gamma"}),
    "random_mask": frozenset({"scale", "rescale", "seed", "density"}),
    "safe_lora": frozenset({"similarity", "lowest"}),
    "safe_merge": frozenset({"similarity", "lowest", "safe_share"}),
    "lox": frozenset({"gamma", "rank"}),
}
"""What each method has a use for."""
OF_FORM: dict[str, str] = {"threshold": "binary", "temperature": "soft"}
"""Fields that only one form of a mask has a use for."""
REQUIRED: dict[str, tuple[str, ...]] = {
    "masked": ("form",),
    "interpolation": ("alpha",),
    "resta": ("gamma",),
    "lox": ("gamma", "rank"),
}
NEEDS_UNALIGNED: tuple[MethodName, ...] = ("resta", "safe_lora", "safe_merge", "lox")
"""Methods that look at the model which the aligned one was made from."""


class FusionSettings(BaseModel):
    """How an aligned model and a finetune become one. A field that the method has no use for is refused, not
    ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: MethodName
    """`masked`: a learned mask on the delta; `interpolation`: WiSE-FT; `resta`: add the safety vector; `random_mask`:
    the control, a random mask as dense as the learned one; `safe_lora`, `safe_merge`: matrices whose change lies away from what
    alignment changed are projected on that, or merged with safe ones; `lox`: add the safety vector's low-rank part."""
    form: Literal["soft", "binary"] | None = None
    """masked: `soft` = σ(ℓ / temperature), `binary` = ℓ > threshold."""
    threshold: float = Field(0.0, allow_inf_nan=False)
    """masked, binary: the logit above which a weight keeps the finetune's change."""
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    """masked, soft: logits are divided by it; near 0 the mask is binary, when large one half everywhere."""
    layers: Patterns = ()
    """masked: pattern of tensor names -> another factor on the masked delta, beside λ; 1 where no pattern matches. A tensor
    that was left out of the mask keeps the finetune's weights whatever its factor."""
    scale: float = Field(1.0, gt=0, allow_inf_nan=False)
    """λ, the factor on the masked delta. A binary mask with λ = 1 and no rescale selects bits and computes nothing."""
    rescale: Literal["none", "mean"] = "none"
    """Divide each tensor's mask by its mean over the whole tensor (the paper), or not."""
    alpha: float | None = Field(None, allow_inf_nan=False)
    """interpolation: α of θ_safe + α τ."""
    gamma: float | None = Field(None, allow_inf_nan=False)
    """resta: γ of θ_t + γ (θ_safe − θ_u); lox: of θ_t + γ SVD_k(θ_safe − θ_u)."""
    rank: int | None = Field(None, ge=1)
    """lox: k, the rank of what is added to each matrix."""
    similarity: float | None = Field(None, ge=-1, le=1, allow_inf_nan=False)
    """safe_lora, safe_merge: matrices are restored whose cosine between C ΔW and ΔW is at most this; others keep the
    finetune."""
    lowest: int | None = Field(None, ge=1)
    """safe_lora, safe_merge, instead of `similarity`: how many matrices are restored, those with the lowest cosines."""
    safe_share: float = Field(0.2, ge=0, le=1)
    """safe_merge: the safe part's share s in (1 − s) ΔW + s ΔW_safe; 0.2 as published."""
    seed: int = Field(0, ge=0)
    """random_mask: which random mask."""
    density: float | None = Field(None, ge=0, le=1)
    """random_mask without a learned mask: the share of ones in every tensor."""
    output_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """None: per tensor the wider of aligned and finetune, so that a select loses no bit."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How fp32 becomes bf16: to the nearest, or by a loaded coin (counted noise), so that what is too small to be seen in one
    weight is kept in the mean of many."""
    max_shard_bytes: int = Field(5_000_000_000, gt=0)
    """Largest weight file, in bytes (a larger tensor has a file of its own)."""

    @model_validator(mode="after")
    def _fields_fit_the_method(self) -> Self:
        own = OWN_FIELDS[self.method] | {"method", "output_dtype", "rounding", "max_shard_bytes"}
        useless = sorted((FusionSettings.model_fields.keys() & self.model_fields_set) - own)
        # Leaving a field at its default in so many words is no wish.
        useless = [f for f in useless if getattr(self, f) != FusionSettings.model_fields[f].default]
        if useless:
            raise ValueError(f"method {self.method} has no use for {', '.join(useless)}")
        for field, form in OF_FORM.items():
            if self.form not in (None, form) and getattr(self, field) != type(self).model_fields[field].default:
                raise ValueError(f"a {self.form} mask has no use for {field}, only a {form} one")
        if any(not math.isfinite(factor) for _, factor in self.layers):
            raise ValueError("layers: a factor is a finite number")
        missing = [field for field in REQUIRED.get(self.method, ()) if getattr(self, field) is None]
        if missing:
            raise ValueError(f"method {self.method} needs {' and '.join(missing)}")
        if self.rounding == "stochastic" and self.output_dtype not in (None, "bfloat16"):
            raise ValueError(f"stochastic rounding is to bfloat16, not to {self.output_dtype}")
        if "similarity" in own and (self.similarity is None) == (self.lowest is None):
            raise ValueError(f"method {self.method} takes either similarity or lowest, one of them")
        return self
