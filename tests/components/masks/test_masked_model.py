"""Weights under a mask: identities bit for bit, tied weights, gradients against autograd and finite differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from components.checkpoints.adapters import LoraSource
from components.checkpoints.loading import load_causal_lm
from components.checkpoints.safetensors import SafetensorsSource
from components.checkpoints.source import read_whole
from components.errors import CheckpointError, ConfigError
from components.masks.anchor import Anchor
from components.masks.concrete import mask_uniforms
from components.masks.engine import Batch, ScoredPair, TorchEngine, batch_losses
from components.masks.loading import build_masked_model
from components.masks.masked_model import MaskedModel
from components.masks.objective import Teacher
from components.masks.preferences import Pair, Row
from components.masks.presets import resolve
from components.masks.rooms import MemoryRoom
from components.masks.settings import MaskSettings
from components.masks.slices import SMALL, FactoredSlice, MaskedSlice, WholeParameter, pack
from tests.components.checkpoints.test_adapters import make_adapter
from tests.components.checkpoints.tiny import llama, save
from tests.components.masks.support import VOCABULARY, DictSource, moved, source, tiny_model

ARCHITECTURES = ["llama", "qwen", "gpt2"]
STORED = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


def masked(
    architecture: str = "llama",
    settings: MaskSettings | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    stored: tuple[torch.dtype | None, torch.dtype | None] = (None, None),
    **options: Any,
) -> MaskedModel:
    model = tiny_model(architecture)
    finetune = moved(model, seed=1)
    built = build_masked_model(
        model=tiny_model(architecture, seed=9).to(dtype),
        aligned=source(model, stored[0]),
        finetune=source(finetune, stored[1]),
        settings=settings or MaskSettings(),
        where=Path("aligned"),
        logits_dtype=torch.float64 if dtype == torch.float64 else torch.float32,
    )
    if options:
        built = MaskedModel(built.model, built.slices, built.settings, unmasked=built.unmasked, **options)
    return built


def parameter(s: MaskedSlice) -> torch.nn.Parameter:
    assert isinstance(s.home, WholeParameter)
    return s.home.parameter


def randomise(built: MaskedModel, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for s in built.slices:
        s.logits.copy_(torch.randn(s.logits.shape, generator=generator, dtype=s.logits.dtype))


def example_batch(anchored: bool = True, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(3)

    def row(prompt: int, response: int) -> Row:
        ids = torch.randint(2, VOCABULARY, (prompt + response,), generator=generator).tolist()
        return Row(tuple(ids), prompt)

    pairs = tuple(ScoredPair(Pair(i, row(3, 4 + i), row(3, 6 - i)), (-10.0 - i, -11.5 + i)) for i in range(3))
    logits = torch.randn(5, VOCABULARY, generator=generator, dtype=dtype)
    anchor = Anchor(row(2, 5), Teacher(torch.log_softmax(logits, -1)))
    return Batch(2, pairs, (anchor,) if anchored else ())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "stored", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_mask_zero_is_the_aligned_model_and_mask_one_the_finetune_bit_for_bit(
    architecture: str, stored: tuple[torch.dtype, torch.dtype]
) -> None:
    built = masked(architecture, stored=stored)
    assert {p.dtype for p in built.model.parameters()} == {torch.float32}
    for logit, mode, attribute in ((-1.0, "aligned", "aligned"), (1.0, "finetuned", "finetuned")):
        for s in built.slices:
            s.logits.fill_(logit)
        built.write("binary")
        by_mask = [s.weights.clone() for s in built.slices]
        built.write(mode)  # type: ignore[arg-type]
        for s, weights in zip(built.slices, by_mask, strict=True):
            assert torch.equal(weights, getattr(s, attribute).float())
            assert torch.equal(s.weights, weights)
            assert torch.equal(parameter(s).detach().view(-1), weights)
    for s in built.slices:  # ±inf: also the soft mask, and every sample of it
        s.logits.fill_(torch.inf)
    built.write("soft")
    assert all(torch.equal(s.weights, s.finetuned.float()) for s in built.slices)
    built.write_sample(5)
    assert all(torch.equal(s.weights, s.finetuned.float()) for s in built.slices)


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
def test_binary_is_a_select_bit_for_bit(model_dtype: torch.dtype) -> None:
    built = masked(dtype=model_dtype, stored=(torch.bfloat16, torch.bfloat16))
    randomise(built)
    built.write("binary")
    for s in built.slices:
        assert torch.equal(s.weights, torch.where(s.logits > 0, s.finetuned, s.aligned).to(model_dtype))
        assert 0 < (s.logits > 0).sum() < s.numel


def test_soft_weights_are_their_formula_and_rescaled_ones_too() -> None:
    for rescale in ("none", "mean", "detached"):
        built = masked(settings=MaskSettings(rescale=rescale, scale=0.7), dtype=torch.float64)
        randomise(built)
        built.write("soft")
        for s in built.slices:
            mask = torch.sigmoid(s.logits)
            mask = mask if rescale == "none" else mask / mask.mean()
            aligned, finetuned = s.aligned.double(), s.finetuned.double()
            expected = aligned + 0.7 * mask * (finetuned - aligned)
            torch.testing.assert_close(s.weights, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_has_one_mask_and_a_tied_weight_only_one(architecture: str) -> None:
    built = masked(architecture)
    assert sorted(s.name for s in built.slices) == sorted(n for n, _ in built.model.named_parameters())
    tied = built.model.get_input_embeddings().weight is built.model.get_output_embeddings().weight
    assert tied == (architecture != "llama")
    assert (
        sum(s.name.endswith(("lm_head.weight", "embed_tokens.weight", "wte.weight")) for s in built.slices) == 2 - tied
    )
    assert built.numel == sum(p.numel() for p in built.model.parameters())
    assert [s.name for s in built.slices if "bias" in s.name] or architecture == "llama"


def test_a_tied_weight_is_found_under_either_name() -> None:
    model = tiny_model("qwen")
    whole = source(model)
    tensors = {n: whole.read(n).reshape(whole.spec(n).shape) for n in whole.names()}
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    other = DictSource(tensors, {"model.embed_tokens.weight": "lm_head.weight"})
    built = build_masked_model(model=model, aligned=whole, finetune=other, settings=MaskSettings(), where=Path("a"))
    assert "model.embed_tokens.weight" in [s.name for s in built.slices]
    built = build_masked_model(model=model, aligned=other, finetune=whole, settings=MaskSettings(), where=Path("a"))
    assert "lm_head.weight" in [s.name for s in built.slices]


SETTINGS = {
    "realign": resolve("realign"),
    "paper": resolve("paper"),
    "detached": resolve("paper", {"rescale": "detached", "scale": 0.8}),
    "rescaled_anchor": resolve(
        "realign", {"rescale": "mean", "scale": 1.3, "density_weight": 0.5, "chosen_weight": 1.7}
    ),
    "deterministic": resolve("realign", {"stochastic": False, "density_weight": -2.0}),
    "row": resolve("realign", {"granularity": "row", "density_weight": 0.5}),
    "row_rescaled": resolve("paper", {"granularity": "row"}),
    "tensor": resolve("realign", {"granularity": "tensor", "density_weight": 0.5}),
}


def by_slice(built: MaskedModel, packed: list[torch.Tensor]) -> list[torch.Tensor]:
    if built.shared:
        return packed
    parts = zip(built.packs, packed, strict=True)
    return [flat[begin:end] for p, flat in parts for _, begin, end in p.split(0, p.numel)]


def literal_loss(built: MaskedModel, batch: Batch, step: int, logits: list[torch.Tensor]) -> torch.Tensor:
    """The objective written out with autograd through functional weights: the reference for the closed form."""
    st, weights = built.settings, {}
    temperature = st.temperature(step)
    penalty = torch.zeros((), dtype=torch.float64)
    for s, ell in zip(built.slices, logits, strict=True):
        unit = s.unit or 1
        u = mask_uniforms(seed=st.seed, step=step, segments=[(s.name, 0, s.numel // unit)]).double()
        noise = torch.log(u) - torch.log(1 - u) if st.stochastic else 0.0
        mask = torch.sigmoid((ell + noise) / temperature).repeat_interleave(unit)
        if st.relaxation == "straight_through":
            mask = (mask > 0.5).double() + mask - mask.detach()
        mean = {"none": 1.0, "mean": mask.mean(), "detached": mask.mean().detach()}[st.rescale]
        fused = s.aligned + st.scale * mask / mean * (s.finetuned - s.aligned)
        weights[s.name] = fused.view(s.home.shape)
        penalty = penalty + unit * torch.sigmoid(ell).sum() / built.numel

    def log_probs(row: Row) -> torch.Tensor:
        ids = torch.tensor([row.tokens])
        out = torch.func.functional_call(built.model, weights, (), {"input_ids": ids}, tie_weights=True)
        return torch.log_softmax(out.logits[0], -1)[row.prompt - 1 : -1]

    def sequence(row: Row) -> torch.Tensor:
        return log_probs(row)[range(row.response), list(row.tokens[row.prompt :])].sum()

    loss = torch.zeros((), dtype=torch.float64)
    for p in batch.pairs:
        chosen, rejected = sequence(p.pair.chosen) - p.reference[0], sequence(p.pair.rejected) - p.reference[1]
        loss = loss - torch.nn.functional.logsigmoid(st.beta * (chosen - rejected)) / len(batch.pairs)
        loss = loss - st.chosen_weight * sequence(p.pair.chosen) / len(batch.pairs)
    for a in batch.anchors:
        kl = (a.teacher.log_probs.exp() * (a.teacher.log_probs - log_probs(a.row))).sum() / a.row.response
        loss = loss + st.anchor_weight * kl
    return loss + st.density_weight * penalty


def closed_form(built: MaskedModel, batch: Batch, step: int) -> tuple[float, list[torch.Tensor]]:
    built.write_sample(step)
    found = batch_losses(built.model, batch, built.settings)
    torch.autograd.backward(found.loss)
    return float(found.loss.detach()), by_slice(built, built.logit_gradients())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", [*SETTINGS, "straight_through", "straight_through_mean"])
def test_gradients_equal_autograd_through_the_literal_objective(name: str, architecture: str) -> None:
    straight = {"relaxation": "straight_through", "rescale": "mean" if name.endswith("mean") else "none"}
    settings = SETTINGS.get(name) or resolve("realign", straight)
    built = masked(architecture, settings, dtype=torch.float64, stored=(torch.float64, torch.float64))
    randomise(built)
    batch, step = example_batch(anchored=settings.anchor_weight > 0), 60
    loss, gradients = closed_form(built, batch, step)
    logits = [s.logits.clone().requires_grad_() for s in built.slices]
    expected = literal_loss(built, batch, step, logits)
    expected.backward()
    density = settings.density_weight * built.density()[0]
    # The noise is a fp32 logit here and a fp64 one in the literal version: 1e-6 of the mask.
    assert loss + density == pytest.approx(expected.item(), rel=1e-5)
    for s, got, ell in zip(built.slices, gradients, logits, strict=True):
        scale = ell.grad.abs().max().item()
        assert scale > 0, s.name
        torch.testing.assert_close(got, ell.grad, rtol=1e-3, atol=2e-5 * scale)


def rms_norm_as_wide_as_its_input(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """transformers computes the norm in fp32 whatever comes in, too coarse to take differences of."""
    power = hidden_states.square().mean(-1, keepdim=True)
    return self.weight * hidden_states * torch.rsqrt(power + self.variance_epsilon)


# "detached" is left out: its mean is a constant to the gradient and not to a difference.
@pytest.mark.parametrize("name", [n for n in SETTINGS if n != "detached"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradients_equal_finite_differences(name: str, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", rms_norm_as_wide_as_its_input)
    settings = SETTINGS[name]
    built = masked(architecture, settings, dtype=torch.float64, stored=(torch.float64, torch.float64))
    randomise(built)
    batch, step = example_batch(anchored=settings.anchor_weight > 0), 30
    _, gradients = closed_form(built, batch, step)

    def value() -> float:
        built.write_sample(step)
        with torch.no_grad():
            found = batch_losses(built.model, batch, settings)
        return float(found.loss) + settings.density_weight * built.density()[0]

    for s, gradient in zip(built.slices, gradients, strict=True):
        for i in (int(gradient.abs().argmax()), gradient.numel() // 2):
            middle = s.logits[i].item()
            s.logits[i] = middle + 1e-5
            above = value()
            s.logits[i] = middle - 1e-5
            below = value()
            s.logits[i] = middle
            # The losses carry rounding of about 1e-14 each, which the quotient divides by 2e-5.
            assert gradient[i].item() == pytest.approx((above - below) / 2e-5, rel=1e-4, abs=5e-9), (s.name, i)


def test_remembered_and_redrawn_samples_give_the_same_bits() -> None:
    found = []
    for remember in (0, 1 << 30):
        built = masked(settings=resolve("paper"), remember=remember)
        randomise(built)
        built.write_sample(7)
        weights = [s.weights.clone() for s in built.slices]
        found_loss = batch_losses(built.model, example_batch(False, torch.float32), resolve("paper"))
        torch.autograd.backward(found_loss.loss)
        found.append(weights + built.logit_gradients())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("preset", ["realign", "paper"])
def test_packing_changes_nothing(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor alone; all in one pack; one pack in pieces that cut across tensors. To the last bit or two: torch's sigmoid
    rounds the tail of a vector otherwise than its body."""
    found = []
    for small, block in ((0, 1 << 16), (1 << 17, 1 << 16), (1 << 17, 50)):
        monkeypatch.setattr("components.masks.slices.SMALL", small)
        monkeypatch.setattr("components.masks.slices.BLOCK", block)
        built = masked(settings=resolve(preset), stored=(torch.bfloat16, torch.float32))
        assert len(built.packs) == (1 if small else len(built.slices))
        randomise(built)
        built.write_sample(3)
        weights = [s.weights.clone() for s in built.slices]
        assert all(torch.equal(parameter(s).detach().view(-1), s.weights) for s in built.slices)
        generator = torch.Generator().manual_seed(
            5
        )  # given, for a matrix product's bits depend on where its inputs lie
        for s in built.slices:
            parameter(s).grad = torch.randn(s.home.shape, generator=generator)
        found.append([*weights, *by_slice(built, built.logit_gradients())])
    for alone, packed, cut in zip(*found, strict=True):
        size = alone.abs().max().item()
        torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6 * size)
        torch.testing.assert_close(cut, alone, rtol=1e-5, atol=1e-6 * size)


def test_only_runs_of_small_slices_are_packed() -> None:
    def part(size: int) -> MaskedSlice:
        flat = torch.zeros(size)
        home = WholeParameter(torch.nn.Parameter(flat))
        return MaskedSlice(f"t{size}", home, flat.clone(), flat.clone(), flat.clone())

    slices = [part(n) for n in (10, 200_000, 5, 7, SMALL, 3, 4, 6)]
    packs = pack(slices, MemoryRoom())
    assert [[s.numel for s in p.slices] for p in packs] == [[10], [200_000], [5, 7], [SMALL], [3, 4, 6]]
    assert [p.first for p in packs] == [0, 1, 2, 4, 5]
    assert packs[1].weights.data_ptr() == parameter(slices[1]).data_ptr()
    assert list(packs[4].split(2, 8)) == [(5, 0, 1), (6, 1, 5), (7, 5, 6)]
    assert packs[4].segments(2, 8) == [("t3", 2, 3), ("t4", 0, 4), ("t6", 0, 1)]
    packs[4].weights[3:7] = 9.0
    assert parameter(slices[6]).tolist() == [9.0] * 4


def test_slices_with_summed_statistics_equal_whole_tensors() -> None:
    """What a sharded engine does: two ranks own a part of each tensor, only `all_sum` connects them."""
    whole = masked(settings=resolve("paper"), dtype=torch.float64)
    randomise(whole)
    _, expected = closed_form(whole, example_batch(False), 4)
    whole.write_sample(4)
    weights = [s.weights.clone() for s in whole.slices]
    loss = batch_losses(whole.model, example_batch(False), resolve("paper"))
    torch.autograd.backward(loss.loss)
    grads = {s.name: s.home.gradient().clone() for s in whole.slices}

    def part(rank: int, all_sum: Any) -> MaskedModel:
        slices = []
        for s in whole.slices:
            low, high = (0, s.numel // 3) if rank == 0 else (s.numel // 3, s.numel)
            home = WholeParameter(torch.nn.Parameter(torch.zeros(high - low, dtype=torch.float64)))
            home.parameter.grad = grads[s.name][low:high].clone()
            home.shape, home.start, home.stop = s.home.shape, low, high
            home.move = lambda weights, home=home: setattr(home, "weights", weights)  # type: ignore[method-assign]
            logits = s.logits[low:high].clone()
            slices.append(MaskedSlice(s.name, home, s.aligned[low:high], s.finetuned[low:high], logits))
        return MaskedModel(whole.model, slices, whole.settings, all_sum=all_sum)

    # First pass: each rank's own sums are noted; second pass: every rank is given the totals, in the same order of calls.
    noted: list[list[torch.Tensor]] = [[], []]

    def note(rank: int) -> Any:
        def all_sum(sums: torch.Tensor) -> torch.Tensor:
            noted[rank].append(sums.clone())
            return sums

        return all_sum

    for rank in (0, 1):
        part(rank, note(rank)).write_sample(4)
    means = noted[0][0] + noted[1][0]
    noted = [[], []]
    for rank in (0, 1):
        calls = iter([means.clone()])

        def first_then_note(sums: torch.Tensor, calls: Any = calls, rank: int = rank) -> torch.Tensor:
            given = next(calls, None)
            if given is None:
                noted[rank].append(sums.clone())
                return sums
            return given

        model = part(rank, first_then_note)
        model.write_sample(4)
        model.logit_gradients()
    pulls = noted[0][0] + noted[1][0]
    joined_weights: list[list[torch.Tensor]] = [[], []]
    joined: list[list[torch.Tensor]] = [[], []]
    for rank in (0, 1):
        totals = iter([means.clone(), pulls.clone()])
        model = part(rank, lambda _sums, totals=totals: next(totals))
        model.write_sample(4)
        joined_weights[rank] = [s.weights.clone() for s in model.slices]
        joined[rank] = by_slice(model, model.logit_gradients())
    for i in range(len(whole.slices)):
        got = torch.cat([joined_weights[0][i], joined_weights[1][i]])
        torch.testing.assert_close(got, weights[i], rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(torch.cat([joined[0][i], joined[1][i]]), expected[i], rtol=1e-10, atol=1e-18)


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_shared_logits_get_what_every_rank_adds(granularity: str) -> None:
    """Two ranks own parts that cut through rows; each has all logits, and what they add up to is the whole's gradient."""
    settings = resolve("realign", {"granularity": granularity})
    whole = masked(settings=settings, dtype=torch.float64)
    randomise(whole)
    _, expected = closed_form(whole, example_batch(False), 4)
    whole.write_sample(4)
    loss = batch_losses(whole.model, example_batch(False), settings)
    torch.autograd.backward(loss.loss)
    added: list[torch.Tensor] = []
    for rank in (0, 1):
        slices = []
        for s in whole.slices:
            low, high = (0, s.numel // 3) if rank == 0 else (s.numel // 3, s.numel)
            home = WholeParameter(torch.nn.Parameter(torch.zeros(high - low, dtype=torch.float64)))
            gradient = s.home.gradient()
            assert gradient is not None
            home.parameter.grad = gradient[low:high].clone()
            home.shape, home.start, home.stop = s.home.shape, low, high
            finetuned = s.finetuned[low:high]
            slices.append(MaskedSlice(s.name, home, s.aligned[low:high], finetuned, s.logits.clone(), s.unit))
        model = MaskedModel(whole.model, slices, settings, all_sum=lambda v: added.append(v.clone()) or v)  # type: ignore[func-returns-value]
        model.write_sample(4)
        for part, s in zip(model.slices, whole.slices, strict=True):
            torch.testing.assert_close(
                part.weights, s.weights[part.home.start : part.home.stop], rtol=1e-12, atol=1e-14
            )
        model.logit_gradients()
    torch.testing.assert_close(added[0] + added[1], torch.cat(expected), rtol=1e-10, atol=1e-16)


def test_patterns_choose_tensors_and_the_rest_keeps_the_finetune() -> None:
    settings = MaskSettings(include=("model.layers.*",), exclude=("*norm*",))
    built = masked(settings=settings)
    names = {s.name for s in built.slices}
    assert names == {n for n, _ in built.model.named_parameters() if n.startswith("model.layers.") and "norm" not in n}
    embed = next(u for u in built.unmasked if u.name == "model.embed_tokens.weight")
    for mode, expected in (("soft", embed.finetuned), ("aligned", embed.aligned), ("binary", embed.finetuned)):
        built.write(mode)  # type: ignore[arg-type]
        assert torch.equal(built.model.get_input_embeddings().weight.detach().view(-1), expected.view(-1))
    built.write("aligned")
    built.write_sample(0)
    assert torch.equal(embed.weights, embed.finetuned)
    batch = example_batch(False, torch.float32)
    torch.autograd.backward(batch_losses(built.model, batch, resolve("paper")).loss)
    assert built.model.get_input_embeddings().weight.grad is None
    assert len(by_slice(built, built.logit_gradients())) == len(names)


def test_patterns_that_match_nothing_are_all_named() -> None:
    with pytest.raises(ConfigError, match=r"\*\.mlpp\.\*; lm_hed"):
        masked(settings=MaskSettings(include=("*", "*.mlpp.*"), exclude=("lm_hed",)))
    with pytest.raises(ConfigError, match="takes away every tensor"):
        masked(settings=MaskSettings(exclude=("*",)))


def test_all_misfits_are_listed_at_once() -> None:
    model = tiny_model()
    good = source(model)
    tensors = {n: good.read(n).reshape(good.spec(n).shape) for n in good.names()}
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = torch.zeros(3, 16)
    with pytest.raises(CheckpointError) as raised:
        build_masked_model(
            model=model, aligned=good, finetune=DictSource(tensors), settings=MaskSettings(), where=Path("here")
        )
    assert "model.norm.weight is missing" in str(raised.value)
    assert f"lm_head.weight: aligned [{VOCABULARY}, 16], finetune [3, 16]" in str(raised.value)
    with pytest.raises(CheckpointError, match=r"here: the model has parameters .* model\.norm\.weight"):
        build_masked_model(
            model=model, aligned=DictSource(tensors), finetune=good, settings=MaskSettings(), where=Path("here")
        )


def test_elements_that_the_finetune_left_alone_get_no_gradient_and_are_counted() -> None:
    built = masked(settings=MaskSettings(density_weight=0.0))
    unchanged = built.unchanged()
    engine = TorchEngine(built)
    engine.step(example_batch(dtype=torch.float32))
    for s in built.slices:
        same = s.aligned == s.finetuned
        assert unchanged[s.name] == int(same.sum()) > 0 or s.numel < 40
        assert bool((s.logits[same] == 2.0).all())
        assert float((s.logits[~same] != 2.0).float().mean()) > 0.5


@pytest.mark.parametrize(("preset", "dora"), [("realign", False), ("paper", False), ("realign", True)])
def test_a_lora_finetune_is_held_as_factors_and_trains_with_the_same_bits(
    preset: str, dora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices of 384 × 384 and larger, worked on in several pieces and merged in several tiles."""
    monkeypatch.setattr("components.checkpoints.adapters._TILE_ELEMENTS", 100_000)
    model = llama(0, torch.bfloat16, hidden_size=384, intermediate_size=400, num_hidden_layers=1)
    base = save(model, tmp_path / "base")
    adapter = make_adapter(model, tmp_path / "adapter", base=base, target_modules="all-linear", use_dora=dora)
    aligned, lora = SafetensorsSource(tmp_path / "base"), LoraSource(adapter, SafetensorsSource(tmp_path / "base"))
    merged = DictSource({n: read_whole(lora, n) for n in lora.names()})
    settings = resolve(preset, {"exclude": ["*o_proj*"], "rescale": "mean"})
    found = []
    for finetune in (lora, merged):
        built = build_masked_model(
            model=load_causal_lm(tmp_path / "base"),
            aligned=aligned,
            finetune=finetune,
            settings=settings,
            where=tmp_path,
        )
        randomise(built)
        values = []
        for weights in ("finetuned", "soft", "binary"):
            built.write(weights)  # type: ignore[arg-type]
            values += [p.detach().clone() for p in built.model.parameters()]
        built.write_sample(3)
        values += [p.detach().clone() for p in built.model.parameters()]
        generator = torch.Generator().manual_seed(5)
        for s in built.slices:
            parameter(s).grad = torch.randn(s.home.shape, generator=generator)
        values += built.logit_gradients()
        found.append((built, values))
    (factored, values), (whole, expected) = found
    assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))
    assert factored.unchanged() == whole.unchanged()
    held = {s.name for s in [*factored.slices, *factored.unmasked] if isinstance(s.finetuned, FactoredSlice)}
    # k_proj and v_proj (192 × 384) are small enough to be packed, and then merged.
    assert held == {f"model.layers.0.{n}.weight" for n in (
        "self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )}  # fmt: skip
    assert not any(isinstance(s.finetuned, FactoredSlice) for s in [*whole.slices, *whole.unmasked])
    part = FactoredSlice(lora, "model.layers.0.mlp.up_proj.weight", 1001, 151_000)  # a rank's run, and a piece of it
    assert torch.equal(part[7:140_001], merged.read(part.name, 1008, 141_002))
    assert torch.equal(part[:], merged.read(part.name, 1001, 151_000))
