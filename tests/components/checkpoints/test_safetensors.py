"""SafetensorsSource: reads what transformers wrote, and refuses what is broken with everything that is wrong."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from components.checkpoints.headers import read_header
from components.checkpoints.reference import open_checkpoint
from components.checkpoints.safetensors import SafetensorsSource
from components.checkpoints.source import read_whole
from components.errors import CheckpointError
from tests.components.checkpoints.tiny import edit_json, llama, qwen, rewrite, same_bits, save


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(llama(0, torch.bfloat16), tmp_path_factory.mktemp("models") / "sharded", shard="9KB")


@pytest.fixture
def broken(sharded: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in sharded.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.mark.parametrize("shard", ["20KB", "5GB"])
def test_reads_what_transformers_wrote(shard: str, tmp_path: Path) -> None:
    model = llama(1, torch.bfloat16)
    source = SafetensorsSource(save(model, tmp_path, shard=shard))
    state = model.state_dict()
    assert source.names() == sorted(state)
    assert len(source.files) == (1 if shard == "5GB" else 1 + len(list(tmp_path.glob("model-*.safetensors"))))
    for name, tensor in state.items():
        assert same_bits(read_whole(source, name), tensor)
        assert torch.equal(source.read(name, 3, 17), tensor.reshape(-1)[3:17])
    assert source.read(source.names()[0], 4, 4).numel() == 0


def test_stored_buffers_that_the_model_computes_are_left_out_and_named(broken: Path) -> None:
    index = json.loads((broken / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = "extra.safetensors"
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, broken / "extra.safetensors")
    source = SafetensorsSource(broken)
    assert source.computed == ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert source.names() == sorted(llama(0).state_dict())
    assert any("rotary_emb.inv_freq" in note for note in open_checkpoint(broken).notes)


def test_opening_reads_headers_only(sharded: Path) -> None:
    source = SafetensorsSource(sharded)
    assert all(file._map is None for file in source._files.values())
    source.read("model.norm.weight")
    assert sum(file._map is not None for file in set(source._files.values())) == 1


def test_writing_into_a_read_leaves_the_file_alone(broken: Path) -> None:
    before = {f.name: f.read_bytes() for f in broken.glob("*.safetensors")}
    SafetensorsSource(broken).read("model.norm.weight").zero_()
    assert {f.name: f.read_bytes() for f in broken.glob("*.safetensors")} == before


def test_tied_head_is_an_alias(tmp_path: Path) -> None:
    model = qwen(0)
    source = SafetensorsSource(save(model, tmp_path))
    assert source.aliases() == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in source.names()
    assert torch.equal(read_whole(source, "lm_head.weight"), model.lm_head.weight)


def test_redundant_stored_head_is_dropped_and_a_different_one_refused(tmp_path: Path) -> None:
    model = qwen(0)
    save(model, tmp_path)
    file = tmp_path / "model.safetensors"
    rewrite(file, lm_head__weight=model.lm_head.weight.detach().clone())
    source = SafetensorsSource(tmp_path)
    assert source.aliases() == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in source.names()
    rewrite(file, lm_head__weight=model.lm_head.weight.detach() + 1)
    with pytest.raises(CheckpointError, match=r"config\.json ties lm_head\.weight to model\.embed_tokens\.weight"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("ties", [True, False])
def test_a_config_that_is_silent_about_ties_means_its_class_default(ties: bool, tmp_path: Path) -> None:
    model = llama(0)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tie_word_embeddings"]
    config["model_type"] = "gemma" if ties else "llama"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert bool(SafetensorsSource(tmp_path).aliases()) is ties


def test_untied_equal_matrices_stay_two(tmp_path: Path) -> None:
    model = llama(0)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    source = SafetensorsSource(save(model, tmp_path))
    assert source.aliases() == {}
    assert "lm_head.weight" in source.names()


def test_unaligned_tensors_are_read_right(tmp_path: Path) -> None:
    save(llama(0), tmp_path)
    values = torch.arange(5, dtype=torch.float32)
    header = json.dumps({"x": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}}).encode()
    header += b" " * (9 - len(header) % 8)  # the data begins at an odd offset
    raw = struct.pack("<Q", len(header)) + header + values.numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(raw)
    assert torch.equal(SafetensorsSource(tmp_path).read("x", 1, 4), values[1:4])


def test_missing_and_truncated_shards_and_absent_tensors_in_one_error(broken: Path) -> None:
    shards = sorted(broken.glob("model-*.safetensors"))
    assert len(shards) > 3
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-10])
    index = broken / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    weight_map["model.layers.9.mlp.up_proj.weight"] = shards[2].name
    dropped = next(n for n, s in weight_map.items() if s == shards[3].name)
    del weight_map[dropped]
    edit_json(index, weight_map=weight_map)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsSource(broken)
    message = str(caught.value)
    assert f"missing shard {shards[0].name}" in message
    assert f"{shards[1].name}: truncated" in message
    assert f"tensors that {shards[2].name} does not have: model.layers.9.mlp.up_proj.weight" in message
    assert f"tensor {dropped} of {shards[3].name} is not in model.safetensors.index.json" in message
    assert "\n" not in message


@pytest.mark.parametrize("length", [0, 5, 40])
def test_truncated_single_file(length: int, tmp_path: Path) -> None:
    save(llama(0), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: (not a safetensors file|truncated)"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff" * 64,
        struct.pack("<Q", 16) + b"this is no json " + b"\0" * 8,
        struct.pack("<Q", 8) + b"[1, 2]  ",
        struct.pack("<Q", 24) + b'{"x": {"dtype": "F32"}} ',
    ],
)
def test_garbage_headers(raw: bytes, tmp_path: Path) -> None:
    save(llama(0), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: header .*garbage"):
        SafetensorsSource(tmp_path)


def test_shape_that_does_not_fit_its_bytes(tmp_path: Path) -> None:
    save(llama(0), tmp_path)
    header = b'{"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}   '
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    with pytest.raises(CheckpointError, match=r"tensor x \[3\] F32 does not fit its 8 bytes"):
        SafetensorsSource(tmp_path)


def test_trailing_bytes_are_refused(tmp_path: Path) -> None:
    save(llama(0), tmp_path)
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b"junk")
    with pytest.raises(CheckpointError, match="4 bytes beyond"):
        SafetensorsSource(tmp_path)


def test_pickles_are_refused_with_the_remedy(tmp_path: Path) -> None:
    save(llama(0), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pickle weights \(pytorch_model\.bin\).*save_pretrained"):
        SafetensorsSource(tmp_path)


def test_no_weights_no_config_quantised_stale(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        SafetensorsSource(tmp_path)
    save(llama(0), tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b"}}')
    with pytest.raises(CheckpointError, match=r"has both .*remove the one that is stale"):
        SafetensorsSource(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        SafetensorsSource(tmp_path)
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(CheckpointError, match=r"quantised \(config\.json: gptq\)"):
        SafetensorsSource(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        SafetensorsSource(tmp_path)


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.safetensors: cannot be read \(No such file"):
        read_header(tmp_path / "x.safetensors")


def test_unknown_tensor_name(sharded: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor nothing"):
        SafetensorsSource(sharded).spec("nothing")
