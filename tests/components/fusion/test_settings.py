"""Fusion settings refuse what their method cannot use, and do not import torch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from components.errors import ConfigError
from components.fusion.methods import METHODS, method_named
from components.fusion.settings import FusionSettings, MethodName


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "masked"}, "method masked needs form"),
        ({"method": "interpolation"}, "method interpolation needs alpha"),
        ({"method": "resta"}, "method resta needs gamma"),
        ({"method": "masked", "form": "soft", "alpha": 0.5}, "method masked has no use for alpha"),
        ({"method": "resta", "gamma": 1, "scale": 2, "seed": 4}, "method resta has no use for scale, seed"),
        ({"method": "slerp"}, "'masked', 'interpolation', 'resta', 'random_mask', 'safe_lora', 'safe_merge' or 'lox'"),
        ({"method": "lox"}, "method lox needs gamma and rank"),
        ({"method": "lox", "gamma": 1, "rank": 0}, "greater than or equal to 1"),
        ({"method": "safe_lora"}, "method safe_lora takes either similarity or lowest"),
        (
            {"method": "safe_merge", "similarity": 0.5, "lowest": 3},
            "method safe_merge takes either similarity or lowest",
        ),
        ({"method": "safe_lora", "lowest": 3, "safe_share": 0.5}, "method safe_lora has no use for safe_share"),
        ({"method": "safe_merge", "similarity": 1.5}, "less than or equal to 1"),
        ({"method": "masked", "form": "soft", "lambda": 1}, "Extra inputs are not permitted"),
        ({"method": "masked", "form": "soft", "scale": 0}, "greater than 0"),
        ({"method": "interpolation", "alpha": float("nan")}, "finite"),
        ({"method": "random_mask", "density": 1.5}, "less than or equal to 1"),
        (
            {"method": "masked", "form": "soft", "threshold": 1.0},
            "a soft mask has no use for threshold, only a binary one",
        ),
        ({"method": "masked", "form": "binary", "temperature": 2.0}, "a binary mask has no use for temperature"),
        ({"method": "masked", "form": "soft", "temperature": 0}, "greater than 0"),
        ({"method": "masked", "form": "soft", "layers": {"*": float("inf")}}, "layers: a factor is a finite number"),
        ({"method": "interpolation", "alpha": 1, "layers": {"*": 2}}, "method interpolation has no use for layers"),
    ],
)
def test_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        FusionSettings(**given)
    assert message in str(caught.value)


def test_defaults_in_so_many_words_are_allowed_and_settings_round_trip() -> None:
    settings = FusionSettings(method="interpolation", alpha=0.3, scale=1.0, form=None)
    assert FusionSettings(**settings.model_dump()) == settings
    for method, own in (
        ("masked", {"form": "binary", "rescale": "mean", "threshold": -0.5, "layers": {"b": 2.0, "*": 0.5}}),
        ("random_mask", {"density": 0.5, "seed": 3}),
    ):
        made = FusionSettings(method=method, **own)  # type: ignore[arg-type]
        assert FusionSettings(**made.model_dump(mode="json")) == made


def test_every_name_is_registered_with_its_paper() -> None:
    assert set(METHODS) == set(MethodName.__args__)  # type: ignore[attr-defined]
    assert all(m.paper.startswith("https://arxiv.org/abs/") for m in METHODS.values())
    with pytest.raises(ConfigError, match="'slerp' is unknown; there are interpolation, lox, masked, random_mask"):
        method_named("slerp")


def test_settings_import_no_torch() -> None:
    code = "import sys, components.fusion.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
