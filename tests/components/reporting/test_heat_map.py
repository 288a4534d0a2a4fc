"""The picture of a mask: which tensor goes where, and what it shows of it."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from components.reporting.heat_map import OUTSIDE, density_grid, density_svg, layer_figures

TENSORS = {
    "model.embed_tokens.weight": 0.25,
    "model.layers.0.self_attn.q_proj.weight": 0.5,
    "model.layers.0.self_attn.q_proj.bias": 1.0,
    "model.layers.10.self_attn.q_proj.weight": 0.75,
    "model.layers.2.mlp.experts.0.up_proj.weight": 0.2,
    "model.layers.2.mlp.experts.1.up_proj.weight": 0.4,
    "lm_head.weight": 0.0,
}


def test_every_tensor_has_its_cell() -> None:
    grid = density_grid(TENSORS)
    assert grid.layers == (OUTSIDE, "0", "2", "10")
    assert grid.kinds == (
        "model.embed_tokens",
        "lm_head",
        "self_attn.q_proj",
        "self_attn.q_proj.bias",
        "mlp.experts.up_proj",
    )
    assert grid.cells["10", "self_attn.q_proj"] == 0.75
    assert grid.cells["2", "mlp.experts.up_proj"] == pytest.approx(0.3)
    assert len(grid.cells) == 6


def test_gpt2_names_have_layers_too() -> None:
    grid = density_grid({"transformer.h.3.attn.c_attn.weight": 0.5, "transformer.wte.weight": 1.0})
    assert set(grid.cells) == {("3", "attn.c_attn"), (OUTSIDE, "transformer.wte")}


def test_layers_have_a_mean_and_a_spread() -> None:
    found = layer_figures(TENSORS)
    assert found == {"0": (0.75, 0.5), "2": (pytest.approx(0.3), 0.0), "10": (0.75, 0.0)}


def test_the_picture_is_valid_and_shows_every_number() -> None:
    svg = density_svg(TENSORS, title="zh <&> mask")
    root = ET.fromstring(svg)
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "zh <&> mask"
    assert {"25.0", "50.0", "100.0", "75.0", "30.0", "0.0"} <= set(texts)
    assert {"layer 0", "layer 2", "layer 10", "no layer"} <= set(texts)
    fills = [node.get("fill") for node in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert fills.count("#440154") == 1, "what is kept whole is darkest"
    assert fills.count("#fde725") == 1, "what is dropped whole is lightest"
    assert density_svg(TENSORS, title="zh <&> mask") == svg
