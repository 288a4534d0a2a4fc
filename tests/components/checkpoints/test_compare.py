"""compare lists every difference; check_finite names every bad tensor with its first bad element."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from components.checkpoints.compare import (
    check_finite,
    compare,
    relative_distance,
    require_compatible,
    require_finite,
    require_near,
    same_bits,
)
from components.checkpoints.reference import open_checkpoint
from components.errors import CheckpointError
from tests.components.checkpoints.tiny import (
    MemorySource,
    edit_json,
    llama,
    qwen,
    rewrite,
    save,
    save_tokenizer,
)


def test_finetunes_are_compatible_whatever_their_dtype_and_shards(tmp_path: Path) -> None:
    a = save(llama(0, torch.bfloat16), tmp_path / "a", shard="20KB")
    b = save(llama(1), tmp_path / "b")
    for path in (a, b):
        save_tokenizer(path)
    assert compare(open_checkpoint(a), open_checkpoint(b)) == []
    require_compatible(open_checkpoint(a), open_checkpoint(b))


def test_every_difference_at_once(tmp_path: Path) -> None:
    a = save(llama(0), tmp_path / "a")
    b = save(llama(0, num_hidden_layers=1, intermediate_size=40, rms_norm_eps=1e-5), tmp_path / "b")
    rewrite(b / "model.safetensors", model__extra=torch.zeros(3))
    first, second = open_checkpoint(a), open_checkpoint(b)
    found = compare(first, second)
    assert "config num_hidden_layers is 1, not 2" in found
    assert "config rms_norm_eps is 1e-05, not 1e-06" in found
    assert "tensor model.extra is extra" in found
    missing = sorted(n for n in first.source.names() if ".layers.1." in n)
    assert [f for f in found if "is missing" in f] == [f"tensor {n} is missing" for n in missing]
    assert "model.layers.0.mlp.up_proj.weight is [40, 32], not [48, 32]" in found
    with pytest.raises(CheckpointError, match=rf"{b} does not fit {a} \({len(found)} differences\): .*\+\d+ more"):
        require_compatible(first, second)


def test_other_architecture_and_ties(tmp_path: Path) -> None:
    a = open_checkpoint(save(llama(0), tmp_path / "a"))
    b = open_checkpoint(save(qwen(0), tmp_path / "b"))
    found = compare(a, b)
    assert 'config model_type is "qwen2", not "llama"' in found
    assert 'config architectures is ["Qwen2ForCausalLM"], not ["LlamaForCausalLM"]' in found
    assert "lm_head.weight is tied, not separate" in found
    assert "tensor model.layers.0.self_attn.q_proj.bias is extra" in found


def test_vocabularies_that_clash(tmp_path: Path) -> None:
    a = save(llama(0), tmp_path / "a")
    b = save(llama(1), tmp_path / "b")
    save_tokenizer(a)
    save_tokenizer(b)
    tokenizer = json.loads((b / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    vocabulary["one_more"] = 63
    edit_json(b / "tokenizer.json", model=tokenizer["model"])
    (found,) = compare(open_checkpoint(a), open_checkpoint(b))
    assert found == "vocabulary: 2 tokens have other ids ('w1' 4 and 5; 'w2' 5 and 4)"


def test_a_renamed_row_is_a_clash(tmp_path: Path) -> None:
    a = save(llama(0), tmp_path / "a")
    b = save(llama(1), tmp_path / "b")
    save_tokenizer(a)
    save_tokenizer(b)
    tokenizer = json.loads((b / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["renamed"] = tokenizer["model"]["vocab"].pop("w7")
    edit_json(b / "tokenizer.json", model=tokenizer["model"])
    assert compare(open_checkpoint(a), open_checkpoint(b)) == [
        "vocabulary: 1 tokens have other ids ('renamed' None and 10)"
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_check_finite_names_the_first_bad_element_of_every_tensor(dtype: torch.dtype) -> None:
    good = torch.randn(6, 7).to(dtype)
    bad, worse = good.clone(), good.clone().reshape(2, 3, 7)
    bad[4, 2] = math.nan
    bad[5, 0] = math.inf
    worse[1, 0, 6] = -math.inf
    source = MemorySource({"a": good, "b": bad, "c": worse, "ids": torch.arange(3)})
    for block in (1, 5, 1000):
        assert check_finite(source, block=block) == [
            "b[4, 2] is nan (2 bad elements)",
            "c[1, 0, 6] is -inf (1 bad elements)",
        ]


def test_a_sum_that_overflows_is_no_bad_weight() -> None:
    assert check_finite(MemorySource({"a": torch.full((100,), 3e38)})) == []


def test_require_finite_names_the_model(tmp_path: Path) -> None:
    model = llama(0)
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    path = save(model, tmp_path / "m")
    with pytest.raises(CheckpointError, match=rf"{path}: weights are not finite: model\.norm\.weight\[3\] is nan"):
        require_finite(open_checkpoint(path))


def test_a_finetune_of_another_base_is_refused(tmp_path: Path) -> None:
    aligned = open_checkpoint(save(llama(0), tmp_path / "aligned"))
    near = llama(0)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.mul_(1.25)
    finetune = open_checkpoint(save(near, tmp_path / "finetune"))
    assert relative_distance(aligned.source, finetune.source) == pytest.approx(0.25, rel=1e-6)
    require_near(aligned, finetune)
    stranger = open_checkpoint(save(llama(1), tmp_path / "stranger"))
    assert relative_distance(aligned.source, stranger.source) == pytest.approx(math.sqrt(2), rel=0.05)
    with pytest.raises(CheckpointError, match=r"stranger differs from .*aligned by 1\.4. times .* trained apart"):
        require_near(aligned, stranger)


def test_the_same_bits_are_the_same_wherever_they_lie() -> None:
    values = torch.randn(4096).bfloat16()
    one, other = MemorySource({"w": values}), MemorySource({"w": torch.cat([values[:3], values])[3:]})
    assert one.read("w").data_ptr() % 8 == 0
    assert other.read("w").data_ptr() % 8 == 6
    assert same_bits(one, other, "w", 0, 4096)
    other.tensors["w"][4095] += 1
    assert not same_bits(one, other, "w", 0, 4096)
