"""Fusing checkpoints: values against a slow reference, bytes independent of the block, and models that just load."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.checkpoints.reference import Checkpoint, open_checkpoint
from components.checkpoints.safetensors import SafetensorsSource
from components.checkpoints.source import read_whole
from components.errors import CheckpointError, ConfigError
from components.fusion.fuse import fuse_checkpoint
from components.fusion.fused import FusedSource, apply_to_model
from components.fusion.settings import FusionSettings
from tests.components.checkpoints.test_adapters import make_adapter
from tests.components.checkpoints.tiny import (
    LogitMask,
    MemorySource,
    edit_json,
    llama,
    perturbed,
    qwen,
    rewrite,
    same_bits,
    save,
    save_tokenizer,
)

SOFT = FusionSettings(method="masked", form="soft")
BINARY = FusionSettings(method="masked", form="binary")


def random_mask(checkpoint: Checkpoint, seed: int = 0, scale: float = 3.0) -> LogitMask:
    generator = torch.Generator().manual_seed(seed)
    source = checkpoint.source
    return LogitMask(
        {n: scale * torch.randn(source.spec(n).shape, generator=generator).bfloat16() for n in source.names()}
    )


def constant_mask(checkpoint: Checkpoint, logit: float) -> LogitMask:
    source = checkpoint.source
    return LogitMask({n: torch.full(source.spec(n).shape, logit) for n in source.names()})


def contents(directory: Path) -> dict[str, bytes]:
    return {f.relative_to(directory).as_posix(): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """bf16 aligned and unaligned, finetunes in bf16 and fp32, and an adapter."""
    root = tmp_path_factory.mktemp("family")
    save(llama(0, torch.bfloat16), root / "aligned", shard="20KB")
    save_tokenizer(root / "aligned")
    save(perturbed(llama(0, torch.bfloat16), 1), root / "unaligned")
    save(perturbed(llama(0, torch.bfloat16), 2), root / "half")
    save_tokenizer(root / "half", template="{{ 'half ' + messages[0]['content'] }}")
    save(perturbed(llama(0, torch.bfloat16).float(), 3), root / "full")
    make_adapter(llama(0, torch.bfloat16), root / "adapter", base=root / "aligned", target_modules="all-linear")
    opened = {n: open_checkpoint(root / n) for n in ("aligned", "unaligned", "half", "full")}
    return opened | {"adapter": open_checkpoint(root / "adapter", base=root / "aligned")}


@pytest.mark.parametrize("finetune", ["half", "full", "adapter"])
def test_binary_selects_bit_for_bit_and_the_model_loads(
    finetune: str, family: dict[str, Checkpoint], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    aligned, tuned = family["aligned"], family[finetune]
    mask = random_mask(aligned)
    report = fuse_checkpoint(aligned=aligned, finetune=tuned, settings=BINARY, mask=mask, out_dir=tmp_path / "out")
    written = SafetensorsSource(tmp_path / "out")
    for name in written.names():
        a, f = read_whole(aligned.source, name), read_whole(tuned.source, name)
        wide = torch.promote_types(a.dtype, f.dtype)
        bits = mask.binary(name, 0, a.numel()).reshape(a.shape)
        assert same_bits(read_whole(written, name), torch.where(bits, f.to(wide), a.to(wide))), name
    assert report.rounded_to_binary == 1.0
    assert report.from_aligned + report.from_finetune == report.differing > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == (torch.bfloat16 if finetune == "half" else torch.float32)
    state = model.state_dict()
    assert all(torch.equal(state[n].double(), read_whole(written, n).double()) for n in written.names())
    prefix = "half " if finetune == "half" else ""
    chat = [{"role": "user", "content": "w5"}]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(chat, tokenize=False) == f"{prefix}w5"


@pytest.mark.parametrize("finetune", ["half", "full", "adapter"])
@pytest.mark.parametrize("form", ["soft", "binary"])
@pytest.mark.parametrize("logit", [-200.0, 200.0], ids=["zero", "one"])
def test_mask_zero_is_aligned_and_mask_one_is_the_finetune(
    finetune: str, form: str, logit: float, family: dict[str, Checkpoint]
) -> None:
    aligned, tuned = family["aligned"], family[finetune]
    source = FusedSource(
        aligned=aligned.source,
        finetune=tuned.source,
        settings=FusionSettings(method="masked", form=form),  # type: ignore[arg-type]
        mask=constant_mask(aligned, logit),
    )
    want = aligned if logit < 0 else tuned
    for name in source.names():
        assert same_bits(read_whole(source, name), read_whole(want.source, name).to(source.spec(name).dtype))


@pytest.mark.parametrize("finetune", ["half", "full"])
@pytest.mark.parametrize("rescale", ["none", "mean"])
def test_soft_against_fp64(finetune: str, rescale: str, family: dict[str, Checkpoint], tmp_path: Path) -> None:
    aligned, tuned = family["aligned"], family[finetune]
    mask = random_mask(aligned)
    settings = FusionSettings(method="masked", form="soft", scale=0.7, rescale=rescale, output_dtype="float32")  # type: ignore[arg-type]
    fuse_checkpoint(aligned=aligned, finetune=tuned, settings=settings, mask=mask, out_dir=tmp_path / "out")
    written = SafetensorsSource(tmp_path / "out")
    for name in written.names():
        a, f = (read_whole(c.source, name).double() for c in (aligned, tuned))
        m = 1 / (1 + torch.exp(-mask.values[name].double())).reshape(a.shape)
        factor = 0.7 / (float(m.mean()) if rescale == "mean" else 1.0)
        want = a + factor * m * (f - a)
        assert torch.allclose(read_whole(written, name).double(), want, rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize(
    "given_settings",
    [
        {"method": "safe_lora", "lowest": 5},
        {"method": "safe_merge", "similarity": 0.9},
        {"method": "lox", "gamma": 0.5, "rank": 3},
    ],
    ids=["safe_lora", "safe_merge", "lox"],
)
def test_two_processes_restore_the_same_bytes(
    given_settings: dict[str, Any], family: dict[str, Checkpoint], tmp_path: Path
) -> None:
    written = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        report = fuse_checkpoint(
            aligned=family["aligned"],
            finetune=family["half"],
            unaligned=family["unaligned"],
            settings=FusionSettings(**given_settings),
            out_dir=out,
            processes=processes,
        )
        assert 0 < report.from_finetune < report.differing  # some was restored, some kept
        written.append(contents(out))
    assert written[0] == written[1]


@settings(max_examples=16, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    block=st.integers(50, 3_000),
    method=st.sampled_from(["soft", "binary", "random", "resta", "interpolation", "safe_lora", "safe_merge", "lox"]),
    finetune=st.sampled_from(["half", "full", "adapter"]),
)
def test_any_block_size_gives_the_same_bytes(
    block: int, method: str, finetune: str, family: dict[str, Checkpoint], tmp_path_factory: pytest.TempPathFactory
) -> None:
    chosen: dict[str, dict[str, Any]] = {
        "soft": {"method": "masked", "form": "soft", "rescale": "mean"},
        "binary": {"method": "masked", "form": "binary", "scale": 0.5},
        "random": {"method": "random_mask"},
        "resta": {"method": "resta", "gamma": 0.3},
        "interpolation": {"method": "interpolation", "alpha": 0.3},
        "safe_lora": {"method": "safe_lora", "lowest": 5},
        "safe_merge": {"method": "safe_merge", "similarity": 0.9},
        "lox": {"method": "lox", "gamma": 0.5, "rank": 3},
    }
    aligned = family["aligned"]
    written = []
    for size in (block, 1 << 30):
        out = tmp_path_factory.mktemp("blocks") / "out"
        fuse_checkpoint(
            aligned=aligned,
            finetune=family[finetune],
            unaligned=family["unaligned"],
            settings=FusionSettings(max_shard_bytes=20_000, **chosen[method]),
            mask=random_mask(aligned),
            out_dir=out,
            block=size,
        )
        written.append(contents(out))
    assert written[0] == written[1]
    assert len(written[0]) > 6


@settings(max_examples=40, deadline=None)
@given(start=st.integers(0, 1200), length=st.integers(0, 400), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_slice_has_the_bits_of_the_whole(start: int, length: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, f = (MemorySource({"w": torch.randn(1201, generator=generator).to(dtype)}) for _ in range(2))
    mask = LogitMask({"w": torch.randn(1201, generator=generator)})
    chosen = FusionSettings(method="masked", form="soft", scale=0.8, rescale="mean", output_dtype="float32")
    source = FusedSource(aligned=a, finetune=f, settings=chosen, mask=mask)
    stop = min(start + length, 1201)
    assert same_bits(source.read("w", start, stop), source.read("w")[start:stop])


def test_random_mask_is_as_dense_as_the_learned_one(family: dict[str, Checkpoint], tmp_path: Path) -> None:
    aligned, tuned = family["aligned"], family["full"]
    mask = random_mask(aligned)
    learned = fuse_checkpoint(aligned=aligned, finetune=tuned, settings=BINARY, mask=mask, out_dir=tmp_path / "l")
    reports = [
        fuse_checkpoint(
            aligned=aligned,
            finetune=tuned,
            settings=FusionSettings(method="random_mask", seed=seed),
            mask=mask,
            out_dir=tmp_path / str(seed),
        )
        for seed in (0, 1)
    ]
    for random in reports:
        for name, count in random.tensors.items():
            assert count.differing == count.numel  # fp32 noise changed every weight
            assert count.from_finetune == learned.tensors[name].from_finetune == int((mask.values[name] > 0).sum())
    assert contents(tmp_path / "0")["model.safetensors"] != contents(tmp_path / "1")["model.safetensors"]


@pytest.mark.parametrize("storage", ["logits", "bits"])
def test_a_trained_mask_from_its_artifact(storage: str, family: dict[str, Checkpoint], tmp_path: Path) -> None:
    """The real artifact, with a tensor that training left out: it keeps the finetune's weights, whatever λ."""
    from components.masks.artifact import MaskArtifact, write_artifact
    from components.masks.settings import MaskSettings

    aligned, tuned = family["aligned"], family["full"]
    logits = random_mask(aligned).values
    norm = logits.pop("model.norm.weight").numel()
    write_artifact(
        tmp_path / "mask",
        shapes={n: aligned.source.spec(n).shape for n in logits},
        shards=((n, 0, t.numel(), t) for n, t in logits.items()),
        settings=MaskSettings(storage=storage),  # type: ignore[arg-type]
        unmasked={"model.norm.weight": norm},
    )
    chosen = FusionSettings(method="masked", form="binary", scale=0.5)
    report = fuse_checkpoint(
        aligned=aligned,
        finetune=tuned,
        settings=chosen,
        mask=MaskArtifact.open(tmp_path / "mask"),
        out_dir=tmp_path / "o",
    )
    assert report.unmasked_tensors == ["model.norm.weight"]
    written = SafetensorsSource(tmp_path / "o")
    for name in written.names():
        a, f = (read_whole(c.source, name).double().reshape(-1) for c in (aligned, tuned))
        want = a + 0.5 * (logits[name] > 0).double() * (f - a) if name in logits else f
        assert torch.allclose(written.read(name).double(), want, rtol=1e-6, atol=1e-8), name
    assert same_bits(written.read("model.norm.weight"), tuned.source.read("model.norm.weight"))


def test_one_ulp_deltas_are_reported_as_rounded_to_binary(tmp_path: Path) -> None:
    model = llama(0, torch.bfloat16)
    aligned = open_checkpoint(save(model, tmp_path / "aligned"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(torch.int16).add_(1)  # the next bf16 number away from zero
    tuned = open_checkpoint(save(model, tmp_path / "tuned"))
    mask = random_mask(aligned)
    report = fuse_checkpoint(aligned=aligned, finetune=tuned, settings=SOFT, mask=mask, out_dir=tmp_path / "out")
    assert report.rounded_to_binary == 1.0
    assert report.differing == report.numel
    (note,) = report.notes
    assert note.startswith("100.0% of the differing weights came out exactly as aligned or as finetuned")
    assert "bfloat16" in note
    wide = FusionSettings(method="masked", form="soft", output_dtype="float32")
    kept = fuse_checkpoint(aligned=aligned, finetune=tuned, settings=wide, mask=mask, out_dir=tmp_path / "wide")
    assert kept.rounded_to_binary is not None
    assert kept.rounded_to_binary < 0.01
    assert kept.notes == []


def test_report_counts(tmp_path: Path) -> None:
    model = llama(0)
    aligned = open_checkpoint(save(model, tmp_path / "aligned"))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:3] += 1
    tuned = open_checkpoint(save(model, tmp_path / "tuned"))
    mask = constant_mask(aligned, 0.0)
    mask.left_out = ("model.norm.weight",)
    seen: list[dict[str, Any]] = []
    settings = FusionSettings(method="masked", form="soft", max_shard_bytes=20_000)
    report = fuse_checkpoint(
        aligned=aligned, finetune=tuned, settings=settings, mask=mask, out_dir=tmp_path / "out", progress=seen.append
    )
    up = "model.layers.0.mlp.up_proj.weight"
    assert report.differing == report.tensors[up].differing == 3 * 32
    assert (report.from_aligned, report.from_finetune, report.rounded_to_binary) == (0, 0, 0.0)
    assert report.copied_tensors == sorted(set(aligned.source.names()) - {up})
    assert report.unmasked_tensors == ["model.norm.weight"]
    size = sum(aligned.source.spec(n).nbytes for n in aligned.source.names())
    assert (report.bytes_read, report.bytes_written, report.numel) == (2 * size, size, size // 4)
    assert set(report.files) == {f.name for f in (tmp_path / "out").iterdir()}
    assert seen[-1]["bytes"] == seen[-1]["total_bytes"] == 3 * size
    assert report.to_json()["tensors"][up]["numel"] == 48 * 32
    assert torch.allclose(
        read_whole(SafetensorsSource(tmp_path / "out"), up)[:3],
        read_whole(aligned.source, up)[:3] + 0.5,
    )


@pytest.mark.parametrize("architecture", ["llama", "qwen"])
def test_in_memory_and_written_models_give_the_same_logits(architecture: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    make = llama if architecture == "llama" else qwen
    save(make(0, torch.bfloat16), tmp_path / "aligned")
    save(perturbed(make(0, torch.bfloat16), 5), tmp_path / "tuned")
    aligned, tuned = open_checkpoint(tmp_path / "aligned"), open_checkpoint(tmp_path / "tuned")
    mask = random_mask(aligned)
    fuse_checkpoint(aligned=aligned, finetune=tuned, settings=SOFT, mask=mask, out_dir=tmp_path / "out")
    source = FusedSource(aligned=aligned.source, finetune=tuned.source, settings=SOFT, mask=mask)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = {name: read_whole(source, name) for name in source.names()}
    expected |= {alias: expected[name] for alias, name in source.aliases().items()}
    assert expected.keys() == written.state_dict().keys()
    assert all(same_bits(t, expected[n]) for n, t in written.state_dict().items())
    inputs = torch.arange(3, 15).reshape(2, 6)
    for dtype in (torch.bfloat16, torch.float32):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).eval()
        in_place = AutoModelForCausalLM.from_pretrained(tmp_path / "aligned", dtype=dtype).eval()
        apply_to_model(in_place, source)
        with torch.no_grad():
            assert torch.equal(loaded(inputs).logits, in_place(inputs).logits)
    if architecture == "qwen":
        assert written.lm_head.weight.data_ptr() == written.model.embed_tokens.weight.data_ptr()


def test_apply_to_a_model_that_does_not_fit_lists_all() -> None:
    source = MemorySource({"model.norm.weight": torch.zeros(31), "extra": torch.zeros(1)})
    with pytest.raises(CheckpointError) as caught:
        apply_to_model(llama(0), source)
    message = str(caught.value)
    assert "the model's lm_head.weight has no tensor" in message
    model = llama(0)
    full = MemorySource({n: p.detach() for n, p in model.named_parameters()} | {"model.norm.weight": torch.zeros(31)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is \[32\] in the model and \[31\] in the weights"):
        apply_to_model(model, full)


def _fuse(a: Checkpoint, f: Checkpoint, settings: FusionSettings, out: Path, **inputs: Any) -> None:
    fuse_checkpoint(aligned=a, finetune=f, settings=settings, out_dir=out, **inputs)


def test_missing_inputs(family: dict[str, Checkpoint], tmp_path: Path) -> None:
    pair = (family["aligned"], family["half"])
    with pytest.raises(ConfigError, match="masked needs a trained mask"):
        _fuse(*pair, SOFT, tmp_path / "out")
    with pytest.raises(ConfigError, match="resta needs the unaligned model"):
        _fuse(*pair, FusionSettings(method="resta", gamma=1), tmp_path / "out")
    with pytest.raises(ConfigError, match="random_mask needs a trained mask or a density"):
        _fuse(*pair, FusionSettings(method="random_mask"), tmp_path / "out")
    mask = random_mask(pair[0])
    mask.values["model.layers.8.x"] = torch.zeros(2)
    mask.values["lm_head.weight"] = torch.zeros(2)
    del mask.values["model.norm.weight"]
    with pytest.raises(CheckpointError) as caught:
        _fuse(*pair, SOFT, tmp_path / "out", mask=mask)
    assert "mask: model.layers.8.x is not in the model" in str(caught.value)
    assert "mask: model.norm.weight is not in the mask" in str(caught.value)
    assert "mask: lm_head.weight has 2 elements, 2048 in the model" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_other_architecture_is_refused_before_anything_is_written(
    family: dict[str, Checkpoint], tmp_path: Path
) -> None:
    other = open_checkpoint(save(qwen(0), tmp_path / "qwen"))
    settings = FusionSettings(method="interpolation", alpha=0.5)
    with pytest.raises(CheckpointError, match=r"does not fit .*aligned \(\d+ differences\): config model_type"):
        _fuse(family["aligned"], other, settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_not_finite_inputs_and_overflow_are_named(tmp_path: Path) -> None:
    aligned = open_checkpoint(save(llama(0), tmp_path / "aligned"))
    save(llama(1), tmp_path / "tuned")
    weights = torch.randn(48, 32)
    weights[5, 7] = math.nan
    rewrite(tmp_path / "tuned" / "model.safetensors", model__layers__1__mlp__up_proj__weight=weights)
    settings = FusionSettings(method="interpolation", alpha=0.5)
    bad = r"finetune model: model\.layers\.1\.mlp\.up_proj\.weight\[5, 7\] is nan"
    with pytest.raises(CheckpointError, match=bad):
        _fuse(aligned, open_checkpoint(tmp_path / "tuned"), settings, tmp_path / "out")
    weights[5, 7] = 1e6
    rewrite(tmp_path / "tuned" / "model.safetensors", model__layers__1__mlp__up_proj__weight=weights)
    narrow = FusionSettings(method="interpolation", alpha=0.5, output_dtype="float16")
    with pytest.raises(CheckpointError, match=r"fused model: .*\[5, 7\] is inf; float16 overflows"):
        _fuse(aligned, open_checkpoint(tmp_path / "tuned"), narrow, tmp_path / "out2")


def test_integers_are_carried_and_must_agree() -> None:
    settings = FusionSettings(method="interpolation", alpha=0.5)
    a = MemorySource({"w": torch.zeros(3), "ids": torch.arange(3)})
    same = MemorySource({"w": torch.ones(3), "ids": torch.arange(3)})
    other = MemorySource({"w": torch.ones(3), "ids": torch.arange(3) + 1})
    fused = FusedSource(aligned=a, finetune=same, settings=settings)
    assert fused.read("ids").tolist() == [0, 1, 2]
    assert fused.read("w").tolist() == [0.5] * 3
    with pytest.raises(CheckpointError, match="ids holds integers that differ"):
        FusedSource(aligned=a, finetune=other, settings=settings).read("ids")


def test_a_resta_of_the_config_dtype_key(family: dict[str, Checkpoint], tmp_path: Path) -> None:
    """Old configs say torch_dtype; the fused one keeps that key and is right about the weights."""
    import json

    save(llama(0), tmp_path / "tuned")
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(config))
    edit_json(tmp_path / "tuned" / "config.json", torch_dtype="bfloat16")
    settings = FusionSettings(method="resta", gamma=0.5)
    _fuse(
        family["aligned"],
        open_checkpoint(tmp_path / "tuned"),
        settings,
        tmp_path / "out",
        unaligned=family["unaligned"],
    )
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["torch_dtype"] == "float32"
    assert "dtype" not in written
    a, f, u = (
        read_whole(c.source, "model.norm.weight").double()
        for c in (family["aligned"], open_checkpoint(tmp_path / "tuned"), family["unaligned"])
    )
    got = read_whole(SafetensorsSource(tmp_path / "out"), "model.norm.weight").double()
    assert torch.allclose(got, f + 0.5 * (a - u), rtol=1e-6, atol=1e-7)
