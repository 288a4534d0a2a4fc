"""The LoRA track: masks on A and B of adapters that continued one safety LoRA, from training to the adapter that comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.checkpoints.compare import compare
from components.checkpoints.factors import FactorSource
from components.checkpoints.loading import load_causal_lm
from components.checkpoints.reference import Checkpoint, open_checkpoint
from components.checkpoints.source import read_whole
from components.deltas import delta_statistics
from components.errors import CheckpointError
from components.evaluation.generate import load_model
from components.fusion.fuse import fuse_checkpoint
from components.fusion.settings import FusionSettings
from components.masks.concrete import mask_uniforms
from components.masks.engine import Batch, batch_losses
from components.masks.loading import base_model, build_masked_model
from components.masks.masked_model import MaskedModel
from components.masks.preferences import Row
from components.masks.presets import resolve
from components.masks.settings import MaskSettings
from components.masks.training import train_mask
from tests.components.checkpoints.test_adapters import merged_by_peft
from tests.components.checkpoints.tiny import edit_json, same_bits
from tests.components.masks.support import anchors, lora_pair, preferences
from tests.components.masks.test_masked_model import by_slice, example_batch, randomise

PREFIX = "base_model.model."


def opened(root: Path, architecture: str = "llama", **config: Any) -> tuple[Checkpoint, Checkpoint]:
    base, safe, task = lora_pair(root, architecture, **config)
    return open_checkpoint(safe, base=base, factors=True), open_checkpoint(task, base=base, factors=True)


def masked(aligned: Checkpoint, finetune: Checkpoint, settings: MaskSettings) -> MaskedModel:
    model = base_model(load_causal_lm, aligned.model_dir, aligned.source)
    built = build_masked_model(
        model=model.double(),
        aligned=aligned.source,
        finetune=finetune.source,
        settings=settings,
        where=aligned.path,
        logits_dtype=torch.float64,
    )
    randomise(built)
    return built


def literal(
    built: MaskedModel, aligned: Checkpoint, batch: Batch, step: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The objective through W = W0 + s B̃ Ã on a plain model without LoRA layers; the loss and each factor's logits."""
    assert isinstance(aligned.source, FactorSource)
    st, temperature = built.settings, built.settings.temperature(step)
    plain, fused, leaves = load_causal_lm(aligned.model_dir).double(), {}, []
    for s in built.slices:
        u = mask_uniforms(seed=st.seed, step=step, segments=[(s.name, 0, s.numel)]).double()
        leaves.append(s.logits.clone().requires_grad_())
        mask = torch.sigmoid((leaves[-1] + torch.log(u) - torch.log(1 - u)) / temperature)
        mean = mask.mean() if st.rescale == "mean" else 1.0
        factor = s.aligned.double() + st.scale * mask / mean * (s.finetuned.double() - s.aligned.double())
        fused[s.name] = factor.view(s.home.shape)
    weights = {n: p.detach() for n, p in plain.named_parameters()}
    scaling = 6 / 4  # lora_alpha / r
    for name in [n for n in fused if ".lora_A." in n]:
        target = name.removeprefix(PREFIX).replace(".lora_A.", ".")
        product = scaling * fused[name.replace("lora_A", "lora_B")] @ fused[name]
        weights[target] = weights[target] + (product.T if aligned.config["model_type"] == "gpt2" else product)

    def sequence(row: Row) -> torch.Tensor:
        ids = {"input_ids": torch.tensor([row.tokens])}
        out = torch.func.functional_call(plain, weights, (), ids, tie_weights=True).logits[0]
        return torch.log_softmax(out, -1)[row.prompt - 1 : -1][
            range(row.response), list(row.tokens[row.prompt :])
        ].sum()

    loss = torch.zeros((), dtype=torch.float64)
    for p in batch.pairs:
        chosen, rejected = sequence(p.pair.chosen) - p.reference[0], sequence(p.pair.rejected) - p.reference[1]
        loss = loss - torch.nn.functional.logsigmoid(st.beta * (chosen - rejected)) / len(batch.pairs)
        loss = loss - st.chosen_weight * sequence(p.pair.chosen) / len(batch.pairs)
    return loss, leaves


@pytest.mark.parametrize("preset", ["realign", "paper"])
@pytest.mark.parametrize("architecture", ["llama", "qwen", "gpt2"])
def test_gradients_equal_autograd_through_the_merged_weights(architecture: str, preset: str, tmp_path: Path) -> None:
    aligned, finetune = opened(tmp_path, architecture)
    built = masked(aligned, finetune, resolve(preset, {"anchor_weight": 0}))
    batch, step = example_batch(anchored=False), 60
    built.write_sample(step)
    found = batch_losses(built.model, batch, built.settings)
    torch.autograd.backward(found.loss)
    expected, leaves = literal(built, aligned, batch, step)
    expected.backward()
    assert float(found.loss.detach()) == pytest.approx(expected.item(), rel=1e-5)
    for s, got, ell in zip(built.slices, by_slice(built, built.logit_gradients()), leaves, strict=True):
        scale = ell.grad.abs().max().item()
        assert scale > 0, s.name
        torch.testing.assert_close(got, ell.grad, rtol=1e-3, atol=2e-5 * scale)
    # The base takes no gradient and is held once, as the model's own weights.
    trained = {id(s.home.parameter) for s in built.slices}  # type: ignore[attr-defined]
    assert {id(p) for p in built.model.parameters() if p.requires_grad} == trained
    assert not built.unmasked
    assert {s.name for s in built.slices} == set(load_file(aligned.path / "adapter_model.safetensors"))


@pytest.mark.parametrize("weights", ["aligned", "finetuned"])
def test_mask_zero_is_the_safety_lora_and_mask_one_the_task_lora(weights: Any, tmp_path: Path) -> None:
    aligned, finetune = opened(tmp_path)
    built = masked(aligned, finetune, MaskSettings())
    built.write(weights)
    ids = torch.tensor([[3, 5, 7, 11, 2]])
    whose = aligned if weights == "aligned" else finetune
    merged = load_model(whose.path, base=aligned.model_dir)[0].double()
    torch.testing.assert_close(built.model(ids).logits, merged(ids).logits, rtol=1e-5, atol=1e-6)
    other = load_model((finetune if whose is aligned else aligned).path, base=aligned.model_dir)[0].double()
    assert (other(ids).logits - merged(ids).logits).abs().max() > 0.01


def trained(root: Path, **settings: Any) -> tuple[Checkpoint, Checkpoint, Any]:
    aligned, finetune = opened(root)
    given = {"steps": 12, "batch_size": 4, "anchor_batch_size": 3, "anchor_new_tokens": 6, "learning_rate": 0.5}
    result = train_mask(
        settings=resolve("realign", given | settings),
        aligned_dir=aligned.model_dir,
        aligned=aligned.source,
        finetune=finetune.source,
        preferences=preferences(root / "pairs.jsonl"),
        anchors=[anchors(root / "anchors.jsonl")],
        state_dir=root / "state",
        out_dir=root / "mask",
    )
    return aligned, finetune, result


def test_what_comes_out_is_an_adapter_of_exactly_selected_factors(tmp_path: Path) -> None:
    aligned, finetune, result = trained(tmp_path)
    assert 0 < result.metrics["density"] < 1
    assert 0.1 < result.metrics["delta_zero_share"] < 0.3
    settings = FusionSettings(method="masked", form="binary")
    report = fuse_checkpoint(
        aligned=aligned, finetune=finetune, settings=settings, mask=result.artifact, out_dir=tmp_path / "out"
    )
    safe, task, out = (
        load_file(d / "adapter_model.safetensors") for d in (aligned.path, finetune.path, tmp_path / "out")
    )
    assert set(out) == set(safe)
    taken = 0
    for name, values in out.items():
        bits = result.artifact.binary(name).reshape(values.shape)
        assert same_bits(values, torch.where(bits, task[name], safe[name])), name
        taken += int((bits & (task[name] != safe[name])).sum())
    assert report.from_finetune == taken
    assert report.from_aligned + report.from_finetune == report.differing > taken > 0
    merged = merged_by_peft(aligned.model_dir, tmp_path / "out")
    base = open_checkpoint(aligned.model_dir).source
    for name in base.names():
        a, b = (f"{PREFIX}{name.removesuffix('weight')}lora_{letter}.weight" for letter in "AB")
        want = read_whole(base, name)
        if a in out:
            want = want + 1.5 * out[b] @ out[a]
        torch.testing.assert_close(merged[name], want, rtol=1e-5, atol=1e-6)
    loaded, tokenizer = load_model(tmp_path / "out", base=aligned.model_dir)
    assert tokenizer.chat_template
    assert torch.equal(loaded.state_dict()["lm_head.weight"], merged["lm_head.weight"])
    again = open_checkpoint(tmp_path / "out", base=aligned.model_dir, factors=True)
    assert again.notes == ()
    assert delta_statistics(aligned.source, again.source).overall.zeros > result.metrics["delta_zero_share"]


def test_a_soft_mask_is_its_formula_factor_by_factor(tmp_path: Path) -> None:
    aligned, finetune, result = trained(tmp_path, exclude=("*lora_A*",))
    settings = FusionSettings(method="masked", form="soft")
    fuse_checkpoint(
        aligned=aligned, finetune=finetune, settings=settings, mask=result.artifact, out_dir=tmp_path / "out"
    )
    safe, task, out = (
        load_file(d / "adapter_model.safetensors") for d in (aligned.path, finetune.path, tmp_path / "out")
    )
    for name, values in out.items():
        if "lora_A" in name:  # left out of the mask: the finetune's
            assert torch.equal(values, task[name])
        else:
            mask = torch.sigmoid(result.artifact.logits(name)).reshape(values.shape)
            torch.testing.assert_close(values, safe[name] + mask * (task[name] - safe[name]), rtol=1e-6, atol=1e-7)
            assert (values != task[name]).float().mean() > 0


def test_everything_that_does_not_fit_the_safety_lora_is_listed(tmp_path: Path) -> None:
    aligned, _ = opened(tmp_path)
    base, task = aligned.model_dir, tmp_path / "finetune"
    edit_json(
        task / "adapter_config.json", lora_alpha=8, rank_pattern={"layers.0.mlp.up_proj": 2}, target_modules=["x"]
    )
    file = task / "adapter_model.safetensors"
    factors = load_file(file)
    up = f"{PREFIX}model.layers.0.mlp.up_proj"
    factors[f"{up}.lora_A.weight"], factors[f"{up}.lora_B.weight"] = torch.zeros(2, 16), torch.zeros(24, 2)
    down = f"{PREFIX}model.layers.1.mlp.down_proj"
    factors = {k: v for k, v in factors.items() if not k.startswith(down)}
    save_file(factors, file)
    found = compare(aligned, open_checkpoint(task, base=base, factors=True))
    assert f"tensor {down}.lora_A.weight is missing" in found
    assert f"tensor {down}.lora_B.weight is missing" in found
    assert f"{up}.lora_A.weight is [2, 16], not [4, 16]" in found
    assert "module model.layers.0.self_attn.q_proj is scaled by 2, not 1.5" in found
    assert "module model.layers.0.mlp.up_proj is scaled by 4, not 1.5" in found
    assert sum("is scaled by" in line for line in found) == 13  # every module that both adapt


def test_adapters_without_factors_of_their_own_are_refused(tmp_path: Path) -> None:
    base, _, _ = lora_pair(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"is no LoRA adapter; mask\.track: factors"):
        open_checkpoint(base, base=base, factors=True)
    base, safe, _ = lora_pair(tmp_path / "whole", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(CheckpointError, match=r"carries whole tensors \(base_model\.model\.lm_head\.weight\)"):
        open_checkpoint(safe, base=base, factors=True)
    base, safe, _ = lora_pair(tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    with pytest.raises(CheckpointError, match=r"is a DoRA adapter \(.*q_proj\.weight\).*use track: weights"):
        open_checkpoint(safe, base=base, factors=True)
    base, safe, _ = lora_pair(tmp_path / "other", target_modules=["q_proj"])
    aligned = open_checkpoint(safe, base=base, factors=True)
    config = json.loads((safe / "adapter_config.json").read_text())
    edit_json(safe / "adapter_config.json", target_modules=[*config["target_modules"], "v_proj"])
    with pytest.raises(CheckpointError, match=r"makes other LoRA layers than its file holds: .*v_proj\.lora_A"):
        masked(aligned, aligned, MaskSettings())
