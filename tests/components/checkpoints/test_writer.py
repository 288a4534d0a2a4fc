"""CheckpointWriter: what it writes, transformers and safetensors read; what was not written is noticed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from components.checkpoints.dtypes import BF16, F16, F32, U8
from components.checkpoints.safetensors import SafetensorsSource
from components.checkpoints.source import TensorSpec, read_whole
from components.checkpoints.writer import CheckpointWriter, copy_side_files, plan_shards
from components.errors import CheckpointError, StorageError
from tests.components.checkpoints.tiny import edit_json, llama, same_bits, save, save_tokenizer


def _specs(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {n: TensorSpec.of(t) for n, t in tensors.items()}


def _write(tensors: dict[str, torch.Tensor], out: Path, limit: int = 10**9) -> list[Path]:
    with CheckpointWriter(out, _specs(tensors), max_shard_bytes=limit) as writer:
        for name, tensor in tensors.items():
            writer.write_whole(name, tensor)
        return writer.finish()


def test_mixed_dtypes_and_odd_shapes_round_trip_through_safetensors(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(7, dtype=torch.bfloat16),
        "b": torch.randn(3, 5),
        "c": torch.arange(5),
        "d": torch.tensor([True, False, True]),
        "e": torch.randn(1, 3, 1).half(),
        "f": torch.randn(0, 4),
        "ü": torch.tensor(2.5, dtype=torch.float64),
    }
    (file,) = _write(tensors, tmp_path)
    assert file.name == "model.safetensors"
    read = load_file(file)
    assert all(same_bits(read[n], t) for n, t in tensors.items())
    assert read.keys() == tensors.keys()


def test_sharded_writing_loads_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = llama(3, torch.bfloat16)
    source = SafetensorsSource(save(model, tmp_path / "in"))
    specs = {n: source.spec(n) for n in source.names()}
    with CheckpointWriter(tmp_path / "out", specs, max_shard_bytes=20_000) as writer:
        for name in reversed(source.names()):  # any order, in slices
            half = specs[name].numel // 2
            writer.write(name, half, source.read(name, half))
            writer.write(name, 0, source.read(name, 0, half))
        files = writer.finish()
        assert writer.bytes_written == sum(s.nbytes for s in specs.values())
    assert len(files) > 3
    assert all(f.stat().st_size < 20_000 + 5_000 for f in files[1:])
    copy_side_files(model_dir=tmp_path / "in", tokenizer_dir=tmp_path / "in", out_dir=tmp_path / "out", dtype=BF16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(same_bits(t, state[n]) for n, t in loaded.state_dict().items())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(s.nbytes for s in specs.values())


def test_same_input_same_bytes(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((11,), float(i)) for i in range(20)}
    digests = []
    for run, order in (("x", list(tensors)), ("y", list(reversed(tensors)))):
        files = _write({n: tensors[n] for n in order}, tmp_path / run, limit=100)
        digests.append({f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files})
    assert digests[0] == digests[1]
    assert len(digests[0]) == 11  # 20 tensors of 44 bytes, two a file, and the index


def test_shard_plan() -> None:
    specs = {n: TensorSpec(U8, (size,)) for n, size in {"a": 4, "b": 4, "c": 20, "d": 1, "e": 9}.items()}
    assert list(plan_shards(specs, 10).values()) == [["a", "b"], ["c"], ["d", "e"]]
    assert list(plan_shards(specs, 1000)) == ["model.safetensors"]
    assert next(iter(plan_shards(specs, 10))) == "model-00001-of-00003.safetensors"


def test_finish_refuses_holes_and_writes_refuse_overlap(tmp_path: Path) -> None:
    specs = {"a": TensorSpec(F32, (10,)), "b": TensorSpec(F32, (2,))}
    writer = CheckpointWriter(tmp_path, specs)
    writer.write("a", 0, torch.zeros(4))
    writer.write("a", 8, torch.zeros(2))
    with pytest.raises(AssertionError, match="a written twice"):
        writer.write("a", 3, torch.zeros(2))
    with pytest.raises(AssertionError, match="a written twice"):
        writer.write("a", 7, torch.zeros(2))
    with pytest.raises(AssertionError, match=r"unwritten tensors: a \(6 of 10 elements\); b \(0 of 2 elements\)"):
        writer.finish()
    writer.write("a", 4, torch.zeros(4))
    writer.write("b", 0, torch.ones(2))
    assert load_file(writer.finish()[0])["b"].tolist() == [1, 1]


def test_unwritable_directory_and_odd_dtype(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        CheckpointWriter(tmp_path / "file" / "out", {"a": TensorSpec(F32, (1,))})
    with pytest.raises(CheckpointError, match="cannot hold complex64"):
        TensorSpec.of(torch.zeros(1, dtype=torch.complex64))
    with pytest.raises(StorageError, match="GB left, the model needs"):
        CheckpointWriter(tmp_path / "out", {"a": TensorSpec(F32, (1 << 50,))})
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_never_writes_over_weights(tmp_path: Path) -> None:
    _write({"a": torch.zeros(3)}, tmp_path)
    with pytest.raises(StorageError, match="File exists"):
        CheckpointWriter(tmp_path, {"a": TensorSpec(F32, (3,))})


def test_side_files(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    aligned, finetune, out = (tmp_path / n for n in ("aligned", "finetune", "out"))
    save(llama(0, torch.bfloat16), aligned)
    save_tokenizer(aligned, template="{{ 'aligned ' + messages[0]['content'] }}")
    save(llama(0), finetune)
    (finetune / "generation_config.json").unlink()
    copy_side_files(model_dir=finetune, tokenizer_dir=finetune, out_dir=out, dtype=F16, fallback_dir=aligned)
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert config["tie_word_embeddings"] is False
    assert (out / "generation_config.json").read_bytes() == (aligned / "generation_config.json").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w3"}], tokenize=False) == "aligned w3"

    save_tokenizer(finetune, template="{{ 'finetune ' + messages[0]['content'] }}")
    second = tmp_path / "second"
    copy_side_files(model_dir=finetune, tokenizer_dir=finetune, out_dir=second, dtype=F16, fallback_dir=aligned)
    tokenizer = AutoTokenizer.from_pretrained(second)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w3"}], tokenize=False) == "finetune w3"


def test_a_class_of_its_own_comes_along(tmp_path: Path) -> None:
    finetune = save(llama(0), tmp_path / "finetune")
    save_tokenizer(finetune)
    (finetune / "modeling_own.py").write_text("class Own: ...\n")
    named = []
    for out in (tmp_path / "plain", tmp_path / "own"):
        named.append(copy_side_files(model_dir=finetune, tokenizer_dir=finetune, out_dir=out, dtype=F16))
        edit_json(finetune / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    assert "modeling_own.py" not in named[0]
    assert "modeling_own.py" in named[1]
    assert (tmp_path / "own" / "modeling_own.py").read_text() == "class Own: ...\n"


def test_read_back_by_our_own_source(tmp_path: Path) -> None:
    model = llama(5)
    state = {n: t.detach() for n, t in model.state_dict().items()}
    _write(state, tmp_path, limit=15_000)
    (tmp_path / "config.json").write_text(model.config.to_json_string())
    source = SafetensorsSource(tmp_path)
    assert all(same_bits(read_whole(source, n), t) for n, t in state.items())
