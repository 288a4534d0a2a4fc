"""LoraSource (LoRA and DoRA) against PEFT's own merge on the base loaded in fp32, and adapters that must be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.checkpoints import adapters
from components.checkpoints.adapters import LoraSource
from components.checkpoints.safetensors import SafetensorsSource
from components.checkpoints.source import read_whole
from components.errors import CheckpointError
from tests.components.checkpoints.tiny import edit_json, gpt2, llama, qwen, same_bits, save

ATTENTION = ["q_proj", "v_proj"]


def make_adapter(model: Any, path: Path, *, base: Path, seed: int = 0, **config: Any) -> Path:
    """A PEFT adapter with random factors (PEFT starts B at zero) over the model saved in `base`."""
    from peft import LoraConfig, get_peft_model

    config = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"} | config
    wrapped = get_peft_model(model, LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name or (parameter.requires_grad and name.endswith("bias")):
                noise = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.add_(noise.to(parameter.dtype))
    wrapped.save_pretrained(path)
    edit_json(path / "adapter_config.json", base_model_name_or_path=str(base))
    return path


def merged_by_peft(base: Path, adapter: Path, *, rows: int | None = None) -> dict[str, torch.Tensor]:
    """What PEFT makes of the base in fp32, after its vocabulary was given `rows`."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows is not None:
        model.resize_token_embeddings(rows)
    return dict(PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict())


def assert_equals_peft(base: Path, adapter: Path, *, exactly: bool = True) -> LoraSource:
    """Every tensor. Equal bits, or (many tiles, or DoRA's norms) within 4 rounding errors of the largest element."""
    full = SafetensorsSource(base)
    source = LoraSource(adapter, full, model_type=full.config["model_type"])
    want = merged_by_peft(base, adapter)
    assert set(source.names()) | set(source.aliases()) == set(want)
    for name in source.names():
        got = read_whole(source, name).float()
        if exactly:
            assert torch.equal(got, want[name]), name
        else:
            bound = 4 * torch.finfo(torch.float32).eps * want[name].abs().max()
            assert (got - want[name]).abs().max() <= bound, name
    return source


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 3, "lora_alpha": 7},
        {"r": 5, "lora_alpha": 16, "use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 32}},
        {"target_modules": "all-linear"},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": r".*layers\.1\..*(up|down)_proj"},
    ],
    ids=["plain", "odd", "rslora", "patterns", "all", "modules_to_save", "embedding", "regex"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_merge_and_unload(config: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    model = llama(0, dtype)
    base = save(model, tmp_path / "base", shard="20KB")
    adapter = make_adapter(model, tmp_path / "adapter", base=base, **config)
    source = assert_equals_peft(base, adapter)
    untouched = set(source.names()) - set(source.adapted())
    assert source.adapted()
    assert all(same_bits(read_whole(source, n), read_whole(source.base, n)) for n in untouched)
    lora_only = set(source.adapted()) - {"lm_head.weight"}
    assert all(source.spec(n).dtype == torch.float32 for n in lora_only)


def test_gpt2_conv1d_is_stored_transposed(tmp_path: Path) -> None:
    model = gpt2(0)
    base = save(model, tmp_path / "base")
    # attn.c_proj is square: its orientation shows in no shape
    adapter = make_adapter(model, tmp_path / "adapter", base=base, target_modules=["c_attn", "attn.c_proj", "c_fc"])
    assert_equals_peft(base, adapter)


def test_trained_biases_of_a_tied_qwen(tmp_path: Path) -> None:
    model = qwen(0, torch.bfloat16)
    base = save(model, tmp_path / "base")
    adapter = make_adapter(model, tmp_path / "adapter", base=base, bias="lora_only", target_modules=["q_proj"])
    source = assert_equals_peft(base, adapter)
    assert "model.layers.0.self_attn.q_proj.bias" in source.adapted()
    assert source.aliases() == {"lm_head.weight": "model.embed_tokens.weight"}


def test_half_precision_factors(tmp_path: Path) -> None:
    model = llama(0)
    base = save(model, tmp_path / "base")
    adapter = make_adapter(model, tmp_path / "adapter", base=base)
    file = adapter / "adapter_model.safetensors"
    save_file({k: t.bfloat16() for k, t in load_file(file).items()}, file)
    assert_equals_peft(base, adapter)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_any_range_gives_the_same_bits_and_only_its_tiles_are_computed(
    fan_in_fan_out: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "_TILE_ELEMENTS", 200)
    model = gpt2(1) if fan_in_fan_out else llama(1)
    target = "c_fc" if fan_in_fan_out else "up_proj"
    base = save(model, tmp_path / "base")
    adapter = make_adapter(model, tmp_path / "adapter", base=base, target_modules=[target])
    source = assert_equals_peft(base, adapter, exactly=False)
    name = next(iter(source.adapted()))
    whole = source.read(name)
    for start in range(0, whole.numel(), 37):
        assert same_bits(source.read(name, start, min(start + 53, whole.numel())), whole[start : start + 53])
    rows, cols = source.spec(name).shape
    computed: list[int] = []
    original = LoraSource._product

    def counted(self: LoraSource, tensor: str, tile: int) -> torch.Tensor:
        computed.append(tile)
        return original(self, tensor, tile)

    monkeypatch.setattr(LoraSource, "_product", counted)
    per_tile = (200 // cols) * cols
    source.read(name, 2 * per_tile + 1, 3 * per_tile + 1)
    assert computed == [2, 3]
    assert rows * cols > 5 * per_tile


DORA: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (llama, {"target_modules": "all-linear"}),
    "rslora-patterns": (llama, {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "k_proj", "lm_head"]}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "attn.c_proj", "c_fc"]}),
    "biases": (qwen, {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"}),
    "modules_to_save": (llama, {"modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize(("case", "tile"), [*((case, 200) for case in DORA), ("linear", 1 << 20), ("conv1d", 1 << 20)])
def test_dora_equals_merge_and_unload(case: str, tile: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_TILE_ELEMENTS", tile)
    make, config = DORA[case]
    model = make(3)
    base = save(model, tmp_path / "base")
    adapter = make_adapter(model, tmp_path / "adapter", base=base, use_dora=True, **config)
    source = assert_equals_peft(base, adapter, exactly=False)
    full = SafetensorsSource(base)
    assert source.pairs()
    for name, pair in source.pairs().items():
        assert pair.magnitude is not None
        want = dora_in_fp64(source, full, name)
        bound = 4 * torch.finfo(torch.float32).eps * want.abs().max()
        assert (read_whole(source, name).double() - want).abs().max() <= bound, name
        assert (read_whole(source, name) - read_whole(full, name)).abs().max() > 0.01, name


def dora_in_fp64(source: LoraSource, base: SafetensorsSource, name: str) -> torch.Tensor:
    """The formula of the paper's section 4, a whole matrix at a time, inputs along the second dimension."""
    pair = source.pairs()[name]
    stored = load_file(source.files[-1])
    assert pair.magnitude is not None
    a, b, magnitude = (stored[key].double() for key in (pair.a, pair.b, pair.magnitude))
    weight = read_whole(base, name).double()
    direction = (weight.T if pair.transposed else weight) + pair.scaling * (b @ a)
    merged = magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
    return merged.T if pair.transposed else merged


@pytest.mark.parametrize("make", [llama, gpt2], ids=["rows", "columns"])
def test_any_range_of_dora_gives_the_same_bits(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_TILE_ELEMENTS", 200)
    model = make(1)
    base = save(model, tmp_path / "base")
    target = "up_proj" if make is llama else "c_fc"
    adapter = make_adapter(model, tmp_path / "adapter", base=base, target_modules=[target], use_dora=True)
    full = SafetensorsSource(base)
    name = LoraSource(adapter, full, model_type=full.config["model_type"]).adapted()[0]
    whole = LoraSource(adapter, full, model_type=full.config["model_type"]).read(name)
    again = LoraSource(adapter, full, model_type=full.config["model_type"])
    for start in range(whole.numel() - 53, -1, -37):  # from behind: no earlier read has gone over what is asked for
        assert same_bits(again.read(name, start, start + 53), whole[start : start + 53])
    assert again.read(name, 5, 5).numel() == 0


def test_a_cut_dora_adapter_is_refused(tmp_path: Path) -> None:
    model = llama(0)
    base = save(model, tmp_path / "base")
    adapter = make_adapter(model, tmp_path / "adapter", base=base, use_dora=True)
    file = adapter / "adapter_model.safetensors"
    q0, v1 = (f"base_model.model.model.layers.{i}.self_attn.{p}_proj" for i, p in ((0, "q"), (1, "v")))
    tensors = load_file(file)
    tensors[f"{q0}.lora_magnitude_vector"] = torch.ones(31)
    del tensors[f"{v1}.lora_magnitude_vector"]
    tensors["base_model.model.model.norm.lora_magnitude_vector"] = torch.ones(32)
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        LoraSource(adapter, SafetensorsSource(base))
    message = str(caught.value)
    assert "module model.layers.0.self_attn.q_proj: magnitudes are [31], one for each of 32 outputs" in message
    assert "module model.layers.1.self_attn.v_proj has no DoRA magnitudes, use_dora asks for them" in message
    assert "module model.norm has DoRA magnitudes and no factors" in message


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    model = llama(0)
    base = save(model, tmp_path / "base")
    return base, make_adapter(model, tmp_path / "adapter", base=base)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3 is not supported, only LORA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa changes the base"),
        ({"r": 0, "lora_alpha": None}, r"r must be a positive number, not 0; lora_alpha must be"),
        ({"lora_bias": True, "layer_replication": [[0, 1]]}, "lora_bias.*; replicated layers"),
        ({"use_dora": True}, r"q_proj has no DoRA magnitudes, use_dora asks for them; .*v_proj has no DoRA"),
        ({"r": 5}, r"are not of rank 5; .*are not of rank 5"),
    ],
)
def test_refused_kinds(change: dict[str, Any], message: str, pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    edit_json(adapter / "adapter_config.json", **change)
    with pytest.raises(CheckpointError, match=message):
        LoraSource(adapter, SafetensorsSource(base))


def test_everything_that_does_not_fit_is_listed(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    q0 = "base_model.model.model.layers.0.self_attn.q_proj"
    v1 = "base_model.model.model.layers.1.self_attn.v_proj"
    tensors[f"{q0}.lora_A.weight"] = torch.zeros(4, 31)
    del tensors[f"{v1}.lora_B.weight"]
    tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 32)
    tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight"] = torch.zeros(32, 4)
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(65, 32)
    tensors[f"{q0}.lora_magnitude_vector"] = torch.zeros(32)
    tensors[f"{q0}.lora_bias_like"] = torch.zeros(32)
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        LoraSource(adapter, SafetensorsSource(base))
    message = str(caught.value)
    assert str(adapter) in message
    assert "module model.layers.0.self_attn.q_proj: B A is [32, 31], the base's weight [32, 32]" in message
    assert "module model.layers.1.self_attn.v_proj has only its A factor" in message
    assert "adapts module model.layers.7.self_attn.q_proj, which the base does not have" in message
    assert "saves model.embed_tokens.weight of shape [65, 32], the base's is [64, 32]" in message
    assert (
        f"holds DoRA magnitudes ({q0}.lora_magnitude_vector), but adapter_config.json does not say use_dora" in message
    )
    assert f"tensor {q0}.lora_bias_like belongs to an adapter kind that is not supported" in message


def test_factors_missing_for_a_targeted_module(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    file = adapter / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if "layers.1.self_attn.q_proj" not in k}, file)
    with pytest.raises(CheckpointError, match=r"targets model\.layers\.1\.self_attn\.q_proj, for which there are no"):
        LoraSource(adapter, SafetensorsSource(base))


def test_a_saved_end_of_a_tie_is_refused_unless_both_are_equal(tmp_path: Path) -> None:
    model = qwen(0)
    base = save(model, tmp_path / "base")
    adapter = make_adapter(model, tmp_path / "adapter", base=base, target_modules=["q_proj"])
    file = adapter / "adapter_model.safetensors"
    head = torch.randn(64, 32)
    tensors = load_file(file) | {"base_model.model.lm_head.weight": head}
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"the base ties lm_head\.weight to model\.embed_tokens\.weight"):
        LoraSource(adapter, SafetensorsSource(base))
    save_file(tensors | {"base_model.model.model.embed_tokens.weight": head.clone()}, file)
    source = LoraSource(adapter, SafetensorsSource(base))
    assert torch.equal(read_whole(source, "lm_head.weight"), head)


def test_pickled_empty_and_unreadable_adapters(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    file = adapter / "adapter_model.safetensors"
    full = SafetensorsSource(base)
    save_file({}, file)
    with pytest.raises(CheckpointError, match="holds no LoRA factors"):
        LoraSource(adapter, full)
    file.rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is a pickle"):
        LoraSource(adapter, full)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        LoraSource(adapter, full)
    (adapter / "adapter_config.json").write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match="a JSON object was expected"):
        LoraSource(adapter, full)
