"""Quantised checkpoints are refused when they are opened, each with its kind; plain ones are not taken for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.checkpoints.quantised import quantised_tensors
from components.checkpoints.reference import open_checkpoint
from components.errors import CheckpointError
from tests.components.checkpoints.tiny import edit_json, gpt2, llama, qwen, save
from tests.components.masks.support import tiny_model

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(llama(0), tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"gptq, 4 bits"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemm"}}, r"awq, 4 bits"),
        ({"quantization_config": {"load_in_8bit": True}}, r"bitsandbytes, load_in_8bit"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}},
            r"bitsandbytes, nf4",
        ),
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}, r"fp8, e4m3"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, r"mxfp4"),
        (
            {"compression_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
            r"compressed-tensors, pack-quantized",
        ),
        ({"text_config": {"quantization_config": {"quant_method": "hqq"}}}, r"hqq"),
        ({"quantization_config": "int4"}, r"quantization_config"),
    ],
)
def test_said_by_the_config(changes: dict[str, Any], kind: str, model: Path) -> None:
    edit_json(model / "config.json", **changes)
    with pytest.raises(
        CheckpointError, match=rf"{model}: weights are quantised \(config\.json: {kind}\); .*fp32 model"
    ):
        open_checkpoint(model)


@pytest.mark.parametrize(
    ("file", "kind"),
    [("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ"), ("hf_quant_config.json", "ModelOpt")],
)
def test_said_by_a_file_beside_the_config(file: str, kind: str, model: Path) -> None:
    (model / file).write_text('{"bits": 4}')
    with pytest.raises(CheckpointError, match=rf"quantised \({kind}.*there is a {file}; remove it if"):
        open_checkpoint(model)


@pytest.mark.parametrize(
    ("endings", "kind"),
    [
        (["qweight", "qzeros", "scales"], r"GPTQ or AWQ: .*q_proj\.qweight; .*q_proj\.qzeros \(\+1 more\)"),
        (
            ["weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"],
            r"bitsandbytes, 4 bits: .*weight\.absmax",
        ),
        (["SCB"], r"bitsandbytes, 8 bits: .*SCB"),
        (["weight_scale_inv"], "fp8 in blocks"),
        (["weight_scale", "input_scale"], "fp8 or compressed-tensors"),
        (["weight_packed", "weight_shape"], "compressed-tensors"),
        (["experts_blocks", "experts_scales"], "MXFP4: .*experts_blocks"),
    ],
)
def test_seen_from_the_names_of_tensors_alone(endings: list[str], kind: str, model: Path) -> None:
    file = model / "model.safetensors"
    save_file(load_file(file) | {f"{LAYER}.{e}": torch.zeros(3, dtype=torch.uint8) for e in endings}, file)
    with pytest.raises(CheckpointError, match=rf"{model}: weights are quantised \({kind}"):
        open_checkpoint(model)


def test_eight_bit_floats_are_refused_by_their_type(model: Path) -> None:
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"{file}: tensor {LAYER}\.weight has dtype F8_E4M3; .*fp32 model"):
        open_checkpoint(model)


def plain_models() -> Iterator[Any]:
    yield from (llama(0), qwen(0), gpt2(0), tiny_model("moe"))


def test_plain_weights_are_not_taken_for_codes() -> None:
    for made in plain_models():
        assert quantised_tensors(made.state_dict()) is None
    odd = ["model.scale", "attn.q_scales", "model.upscales.weight", "a_blocks", "layers.0.weight_scaled"]
    assert quantised_tensors(odd) is None
