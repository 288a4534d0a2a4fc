"""The estimate of a rank's memory: counted by hand, and held to the tensors of a real engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from components.checkpoints.dimensions import Dimensions
from components.checkpoints.reference import open_checkpoint
from components.errors import CheckpointError
from components.masks.engine import Batch, ScoredPair, TorchEngine
from components.masks.memory import (
    GIB,
    PROCESS_DEVICE,
    PROCESS_HOST,
    Item,
    Lengths,
    RankMemory,
    Stored,
    Weight,
    artifact_disk,
    kept_memory,
    layer_bytes,
    rank_memory,
    training_disk,
    weights_of,
)
from components.masks.preferences import Pair, Row
from components.masks.settings import MaskSettings
from components.masks.training import one_process
from components.masks.zero import MaskExecution, ZeroSettings
from tests.components.masks.support import DictSource, moved, saved

MAPPED_BF16, COMPUTED_FP32 = Stored(2, mapped=True), Stored(4, mapped=False)
WEIGHTS = [
    Weight("a", 10, True, MAPPED_BF16, COMPUTED_FP32),
    Weight("b", 6, True, MAPPED_BF16, COMPUTED_FP32),
    Weight("big", 300_000, True, MAPPED_BF16, COMPUTED_FP32),
    Weight("plain", 1_000, False, MAPPED_BF16, COMPUTED_FP32),
]
"""Two small neighbours that are packed, one too large for that, one without a mask."""
MASKED = 300_016
DIMENSIONS = Dimensions(hidden=8, layers=3, inner=20, queries=8, keys=4, vocabulary=50)
LENGTHS = Lengths(longest=30, mean=20.0, longest_response=12, mean_response=8.0, prompt=10, anchors=5)


def sizes(memory: RankMemory) -> dict[tuple[str, str], int]:
    return {(item.what, item.place): item.nbytes for item in memory.items}


def execution(**values: Any) -> MaskExecution:
    return MaskExecution(**values)


def test_one_process_keeps_what_a_count_by_hand_finds() -> None:
    assert sizes(kept_memory(WEIGHTS, MaskSettings(), execution())) == {
        ("logits", "host"): 4 * MASKED,
        ("Adam's moments", "host"): 8 * MASKED,
        ("finetune, computed when read", "host"): 4 * 301_016,
        ("small tensors, packed", "host"): 8 * 16,
        ("fused weights", "host"): 4 * 301_016,
    }


def test_two_ranks_of_zero_3_keep_half_of_everything() -> None:
    found = kept_memory(WEIGHTS, MaskSettings(), execution(ranks=2, stage=3))
    assert sizes(found) == {
        ("logits", "host"): 4 * 150_008,
        ("Adam's moments", "host"): 8 * 150_008,
        ("finetune, computed when read", "host"): 4 * 150_508,
        ("small tensors, packed", "host"): 8 * 8,
        ("fused weights, this rank's", "host"): 4 * 150_508,
        ("small tensors' weights, packed", "host"): 4 * 8,
    }


def test_runs_are_padded_and_a_third_of_the_large_one_is_small_enough_to_pack() -> None:
    found = kept_memory(WEIGHTS, MaskSettings(), execution(ranks=3, stage=1))
    here = 4 + 2 + 100_000
    assert sizes(found) == {
        ("logits", "host"): 4 * here,
        ("Adam's moments", "host"): 8 * here,
        ("finetune, computed when read", "host"): 4 * (here + 334),
        ("small tensors, packed", "host"): 8 * here,
        ("fused weights", "host"): 4 * 3 * (here + 334),
        ("small tensors' weights, packed", "host"): 4 * here,
    }


def test_zero_0_spreads_nothing() -> None:
    alone, ranks = (kept_memory(WEIGHTS, MaskSettings(), execution(ranks=n, stage=0)) for n in (1, 4))
    assert sizes(alone) == sizes(ranks)


def test_a_gpu_copies_the_stored_models_unless_the_state_is_offloaded() -> None:
    gpu: dict[str, Any] = {"ranks": 2, "stage": 2, "device": "cuda"}
    bf16 = MaskSettings(dtype="bfloat16")
    on = sizes(kept_memory(WEIGHTS, bf16, execution(**gpu)))
    assert on["stored models, as stored", "device"] == (2 + 4) * 150_508
    assert on["fused weights", "device"] == 2 * 301_016
    off = sizes(kept_memory(WEIGHTS, bf16, execution(**gpu, offload="cpu")))
    assert off == {
        ("logits", "host"): 4 * 150_008,
        ("Adam's moments", "host"): 8 * 150_008,
        ("finetune, computed when read", "host"): 4 * 150_508,
        ("small tensors, packed", "host"): 8 * 8,
        ("fused weights", "device"): 2 * 301_016,
        ("small tensors' weights, packed", "device"): 2 * 8,
    }
    files = sizes(kept_memory(WEIGHTS, bf16, execution(**gpu | {"stage": 3}, offload="nvme", offload_weights="nvme")))
    assert files["logits", "disk"] == 4 * 150_008
    assert files["fused weights, this rank's", "disk"] == 2 * 150_508
    assert {place for _, place in files} == {"disk", "host", "device"}
    assert sum(n for (_, place), n in files.items() if place != "disk") == (8 + 2) * 8


def test_gradients_by_stage() -> None:
    def gradients(settings: MaskSettings, **values: Any) -> dict[str, int]:
        found = rank_memory(WEIGHTS, DIMENSIONS, LENGTHS, settings, execution(**values))
        return {i.what: i.nbytes for i in found.items if i.what.startswith("a gradient") or i.what.startswith("gradie")}

    fp32, bf16 = MaskSettings(), MaskSettings(dtype="bfloat16")
    packed = "gradients of small tensors, packed"
    assert gradients(fp32) == {"gradients": 4 * MASKED, packed: 4 * 16}
    assert gradients(fp32, ranks=2, stage=1) == {"gradients": 4 * MASKED, packed: 4 * 8}
    own = {"gradients, this rank's": 4 * 150_008, packed: 4 * 8}
    assert gradients(fp32, ranks=2, stage=2) == {**own, "a gradient as it comes": 4 * 300_000}
    # Narrow ones cannot be added up whole, so they are scattered as they come.
    assert gradients(bf16, ranks=2, stage=1) == {**own, "a gradient as it comes": 2 * 300_000}
    moved_to_host = gradients(bf16, ranks=2, stage=2, device="cuda", offload="cpu")
    assert moved_to_host["gradients, copied to the logits"] == 4 * 150_008


def test_activations_and_logits_of_a_step() -> None:
    settings = MaskSettings(batch_size=8, anchor_batch_size=4, anchor_new_tokens=6)
    found = sizes(rank_memory(WEIGHTS, DIMENSIONS, LENGTHS, settings, execution(ranks=2, stage=3)))
    tokens = 8 * 30 + 2 * (10 + 6)  # half the pairs, two rows each, padded to the longest; half the anchors
    # Llama in fp32: input and output of both norms in fp32, two residual sums, q, k, v, o and the MLP's four.
    layer = 4 * (4 * 8 + 2 * 8 + 2 * 8 + 2 * 4 + 4 * 20)
    assert layer_bytes(DIMENSIONS, 4) == layer
    assert found["activations", "host"] == tokens * 3 * layer
    responses = 8 * 8 + 12  # eight rows' mean, and √8 of what the longest has beyond it, rounded up
    assert found["output logits", "host"] == 50 * (12 * responses + 20 * 2 * 6)
    thrifty = execution(ranks=2, stage=3, accumulate=4, activation_checkpointing=True)
    less = sizes(rank_memory(WEIGHTS, DIMENSIONS, LENGTHS, settings, thrifty))
    tokens = 2 * 30 + 1 * (10 + 6)
    assert less["activations, layers' inputs", "host"] == tokens * 3 * 4 * 8
    assert less["activations, one layer's", "host"] == tokens * layer


def test_the_largest_of_many_batches_lies_between_the_mean_and_the_longest() -> None:
    assert LENGTHS.tokens(1, padded=False) == 30
    assert LENGTHS.tokens(100, padded=False) == 100 * 20 + 10 * 10
    assert LENGTHS.tokens(100, padded=True) == 100 * 30


def test_peaks_are_taken_over_moments_and_places() -> None:
    memory = RankMemory((
        Item("always", "host", 5), Item("early", "host", 10, ("forward",)), Item("late", "host", 7, ("backward",)),
        Item("there", "device", 1),
    ))  # fmt: skip
    assert (memory.peak("host"), memory.peak("device"), memory.peak("disk")) == (15, 1, 0)
    assert [item.what for item in memory.worst("host")] == ["early", "always"]


def test_a_process_and_a_gpu_take_something_before_any_tensor() -> None:
    found = sizes(rank_memory(WEIGHTS, DIMENSIONS, LENGTHS, MaskSettings(), execution(ranks=2, device="cuda")))
    assert found["the process and its libraries", "host"] == PROCESS_HOST
    assert found["CUDA context and NCCL", "device"] == PROCESS_DEVICE == GIB


def test_disk_of_state_and_artifact() -> None:
    assert training_disk(WEIGHTS, MaskSettings()) == 2 * 12 * MASKED
    assert training_disk(WEIGHTS, MaskSettings(eval_every=5, keep_best=True)) == 3 * 12 * MASKED
    assert artifact_disk(WEIGHTS, MaskSettings()) == 2 * MASKED
    assert artifact_disk(WEIGHTS, MaskSettings(storage="bits")) == 2 + 1 + 37_500


def test_patterns_choose_what_is_masked_and_sources_tell_how_it_lies() -> None:
    tensors = {"w": torch.zeros(3, 4), "v": torch.zeros(5, dtype=torch.bfloat16)}
    [v, w] = weights_of(DictSource(tensors), DictSource(tensors), MaskSettings(include=("w",)))
    assert (w.numel, w.masked, w.aligned) == (12, True, Stored(4, mapped=False))
    assert (v.numel, v.masked, v.finetuned) == (5, False, Stored(2, mapped=False))


def engine_of(place: Path, settings: MaskSettings) -> tuple[TorchEngine, list[Weight]]:
    """One process' engine of a model with one tensor too large to pack."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=2500, **shape, num_key_value_heads=2)).to(torch.bfloat16)
    saved(model, place / "aligned")
    saved(moved(model, seed=1), place / "finetune")
    aligned, finetune = (open_checkpoint(place / name).source for name in ("aligned", "finetune"))
    engine = one_process(ZeroSettings())(place / "aligned", aligned, finetune, settings)
    return engine, weights_of(aligned, finetune, settings)


def nbytes(tensors: list[torch.Tensor]) -> int:
    """Of the memory behind tensors, which may share it."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("exclude", [(), ("model.layers.1.*",)])
def test_the_estimate_is_the_sum_of_an_engines_tensors(tmp_path: Path, exclude: tuple[str, ...]) -> None:
    settings = MaskSettings(exclude=exclude)
    engine, weights = engine_of(tmp_path, settings)
    packs = engine.masked.packs
    held = [pack.logits for pack in packs] + [one for pair in engine._moments for one in pair]
    held += [one for pack in packs if len(pack.slices) > 1 for one in (pack.aligned, pack.finetuned)]
    held += [*engine.masked.model.parameters()]
    estimate = kept_memory(weights, settings, MaskExecution())
    assert nbytes(held) == estimate.peak("host")
    assert any(len(pack.slices) > 1 for pack in packs)
    assert any(len(pack.slices) == 1 for pack in packs)
    rows = (Row(tuple(range(20, 40)), 10), Row(tuple(range(30, 50)), 10))
    engine.masked.write_sample(0)
    engine._backward(Batch(0, (ScoredPair(Pair(1, *rows), (-5.0, -6.0)),)))
    gradients = [p.grad for p in engine.masked.model.parameters() if p.grad is not None]
    expected = rank_memory(weights, DIMENSIONS, LENGTHS, settings, MaskExecution())
    assert nbytes(gradients) == sizes(expected)["gradients", "host"]


def test_dimensions_of_configs_of_several_kinds() -> None:
    llama = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 96, "vocab_size": 100}  # fmt: skip
    assert Dimensions.of(llama) == Dimensions(64, 2, 96, 64, 32, 100)
    gpt2 = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_inner": None, "vocab_size": 10}
    assert Dimensions.of(gpt2) == Dimensions(16, 3, 64, 16, 16, 10)
    experts = {**llama, "num_experts_per_tok": 4, "head_dim": 8}
    assert Dimensions.of({"text_config": experts}) == Dimensions(64, 2, 384, 32, 16, 100)
    assert Dimensions.of(llama).cached(4) == 2 * 32 * 2 * 4
    with pytest.raises(CheckpointError, match="has none of hidden_size, n_embd, d_model"):
        Dimensions.of({"vocab_size": 10})


def test_rows_have_next_to_no_logits_and_every_rank_has_them_all() -> None:
    rows = [
        Weight("w", 300_000, True, MAPPED_BF16, MAPPED_BF16, units=1_000),
        Weight("b", 10, True, MAPPED_BF16, MAPPED_BF16, 10),
    ]
    settings = MaskSettings(granularity="row")
    for ranks in (1, 4):
        found = sizes(kept_memory(rows, settings, execution(ranks=ranks, stage=3)))
        assert found["logits", "host"] == 4 * 1_010
        assert found["Adam's moments", "host"] == 8 * 1_010
        assert ("small tensors, packed", "host") not in found
    assert training_disk(rows, settings) == 2 * 12 * 1_010
    assert artifact_disk(rows, settings) == 2 * 1_010
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=30)
    )
    source = DictSource({n: p.detach() for n, p in model.named_parameters()})
    units = {w.name: w.units for w in weights_of(source, source, settings)}
    assert units["model.layers.0.mlp.up_proj.weight"] == 24
    assert units["model.norm.weight"] == 16


def test_a_lora_finetune_takes_no_room_where_the_cpu_works_on_it() -> None:
    factored = Stored(4, mapped=False, factored=True)
    weights = [Weight("w", 300_000, True, MAPPED_BF16, factored), Weight("small", 10, True, MAPPED_BF16, factored)]
    alone = sizes(kept_memory(weights, MaskSettings(), execution()))
    assert alone["finetune, computed when read", "host"] == 4 * 10
    on_gpus = sizes(kept_memory(weights, MaskSettings(), execution(ranks=2, stage=3, device="cuda")))
    assert on_gpus["stored models, as stored", "device"] == (2 + 4) * (150_000 + 5)
