"""Adapters out: PEFT's own merge against aligned + Δ_r, and Δ_r against numpy's SVD."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.checkpoints.adapters import LoraSource
from components.checkpoints.reference import Checkpoint, open_checkpoint
from components.checkpoints.source import read_whole
from components.evaluation.choose import choose_form
from components.evaluation.generate import load_model
from components.fusion.fused import FusedSource
from components.fusion.low_rank import best_of_rank, export_adapter
from components.fusion.settings import FusionSettings
from tests.components.checkpoints.test_adapters import make_adapter, merged_by_peft
from tests.components.checkpoints.tiny import LogitMask, MemorySource, gpt2, llama, qwen, save, save_tokenizer

MODELS = {"llama": llama, "qwen": qwen, "gpt2": gpt2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": "all-linear"}),
    "rslora-patterns": ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    "modules_to_save": ("llama", {"modules_to_save": ["lm_head"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "attn.c_proj", "c_fc"]}),
    "biases": ("qwen", {"bias": "lora_only", "target_modules": ["q_proj", "down_proj"]}),
    "dora": ("llama", {"use_dora": True, "target_modules": "all-linear"}),
    "dora-conv1d": ("gpt2", {"use_dora": True, "target_modules": ["c_attn", "attn.c_proj", "c_fc"]}),
}


def fused_family(root: Path, case: str) -> tuple[Checkpoint, Checkpoint, FusedSource]:
    """Aligned, adapter, and the binary-fused model under a random mask."""
    architecture, config = CASES[case]
    model = MODELS[architecture](0)
    base = save(model, root / "aligned")
    save_tokenizer(base)
    make_adapter(model, root / "adapter", base=base, **config)
    aligned, finetune = open_checkpoint(base), open_checkpoint(root / "adapter", base=base)
    generator = torch.Generator().manual_seed(5)
    mask = {n: torch.randn(aligned.source.spec(n).shape, generator=generator) for n in aligned.source.names()}
    settings = FusionSettings(method="masked", form="binary")
    fused = FusedSource(aligned=aligned.source, finetune=finetune.source, settings=settings, mask=LogitMask(mask))
    return aligned, finetune, fused


def truncated(delta: torch.Tensor, rank: int) -> tuple[np.ndarray[Any, Any], float]:
    """The best approximation by numpy's SVD in fp64, and its relative error from the singular values that are left."""
    u, s, v = np.linalg.svd(delta.double().numpy(), full_matrices=False)
    rest = float(np.sqrt((s[rank:] ** 2).sum() / (s**2).sum())) if s.any() else 0.0
    return (u[:, :rank] * s[:rank]) @ v[:rank], rest


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("case", CASES)
def test_peft_merges_it_to_aligned_plus_the_best_of_its_rank(case: str, rank: int | None, tmp_path: Path) -> None:
    aligned, finetune, fused = fused_family(tmp_path, case)
    assert isinstance(finetune.source, LoraSource)
    report = export_adapter(aligned=aligned, finetune=finetune, fused=fused, rank=rank, out_dir=tmp_path / "out")
    merged = merged_by_peft(aligned.path, tmp_path / "out")
    pairs = finetune.source.pairs()
    assert set(report.tensors) == set(pairs)
    lost = norm = 0.0
    for name in aligned.source.names():
        before, want = read_whole(aligned.source, name), read_whole(fused, name)
        if name in pairs:
            kept = min(pairs[name].rank if rank is None else rank, *before.shape)
            low, error = truncated(want - before, kept)
            want = before + torch.from_numpy(low).float()
            size = float((read_whole(fused, name) - before).double().norm())
            lost, norm = lost + (error * size) ** 2, norm + size**2
            assert report.tensors[name].rank == kept
            assert report.tensors[name].error == pytest.approx(error, rel=1e-5)
            assert 0.01 < error < 1
        assert (merged[name] - want).abs().max() <= 2e-6 * want.abs().max(), name
    assert report.error == pytest.approx((lost / norm) ** 0.5, rel=1e-5)
    # Our own reader and the evaluation's loader agree with PEFT; the tokenizer came along.
    reread = open_checkpoint(tmp_path / "out", base=aligned.path)
    assert reread.notes == ()
    loaded, tokenizer = load_model(tmp_path / "out", base=aligned.path)
    state = loaded.state_dict()
    assert tokenizer.chat_template
    for name in reread.source.names():
        assert torch.equal(state[name], merged[name]), name
        assert torch.allclose(read_whole(reread.source, name).float(), merged[name], rtol=0, atol=1e-6), name


@pytest.mark.parametrize("case", ["plain", "conv1d"])
def test_at_full_rank_nothing_is_lost(case: str, tmp_path: Path) -> None:
    aligned, finetune, fused = fused_family(tmp_path, case)
    report = export_adapter(aligned=aligned, finetune=finetune, fused=fused, rank=1000, out_dir=tmp_path / "out")
    assert report.error < 1e-6
    assert all(t.rank == min(aligned.source.spec(name).shape) for name, t in report.tensors.items())
    merged = merged_by_peft(aligned.path, tmp_path / "out")
    for name in aligned.source.names():
        want = read_whole(fused, name)
        assert (merged[name] - want).abs().max() <= 2e-6 * want.abs().max(), name


def test_the_same_bytes_each_time(tmp_path: Path) -> None:
    aligned, finetune, fused = fused_family(tmp_path, "modules_to_save")
    made = []
    for out in (tmp_path / "one", tmp_path / "two"):
        export_adapter(aligned=aligned, finetune=finetune, fused=fused, rank=None, out_dir=out)
        made.append({f.name: f.read_bytes() for f in out.iterdir()})
    assert made[0] == made[1]
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(made[0])


def test_a_change_outside_the_adapter_is_our_own_mistake(tmp_path: Path) -> None:
    aligned, finetune, fused = fused_family(tmp_path, "plain")
    tensors = {n: read_whole(fused, n).clone() for n in fused.names()}
    tensors["model.norm.weight"][0] += 1
    with pytest.raises(AssertionError, match=r"model\.norm\.weight"):
        export_adapter(
            aligned=aligned, finetune=finetune, fused=MemorySource(tensors), rank=2, out_dir=tmp_path / "out"
        )


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9)])
def test_no_rank_is_beaten_by_numpy(shape: tuple[int, int]) -> None:
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * (torch.arange(shape[1]) % 3 > 0)
    for rank in range(1, min(shape) + 1):
        b, a = best_of_rank(delta, rank)
        low, _ = truncated(delta, rank)
        assert (b.shape, a.shape) == ((shape[0], rank), (rank, shape[1]))
        assert torch.allclose(b @ a, torch.from_numpy(low).float(), atol=2e-6)
    b, a = best_of_rank(torch.zeros(shape), 2)
    assert float((b @ a).abs().max()) == 0


def test_the_form_that_is_chosen() -> None:
    def rates(asr: float, task: float, over: float) -> dict[str, dict[str, float]]:
        return {"asr": {"value": asr}, "task": {"value": task}, "over_refusal": {"value": over}}

    soft, binary = rates(0.04, 0.8, 0.1), rates(0.0, 0.7, 0.0)
    assert choose_form({"soft": soft, "binary": binary}, select="auto", max_asr=0.05) == "soft"
    assert choose_form({"soft": soft, "binary": binary}, select="auto", max_asr=0.01) == "binary"
    assert choose_form({"soft": soft, "binary": rates(0.0, 0.8, 0.0)}, select="auto", max_asr=0.05) == "binary"
    assert choose_form({"soft": soft, "binary": binary}, select="binary", max_asr=0.05) == "binary"
    assert choose_form({"soft": {}}, select="binary", max_asr=0.05) is None
    assert choose_form({}, select="auto", max_asr=0.05) is None
