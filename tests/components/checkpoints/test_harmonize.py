"""Real models of unlike tensors brought together, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from components.checkpoints.common import ALIGNED
from components.checkpoints.compare import require_compatible
from components.checkpoints.dtypes import F32
from components.checkpoints.harmonize import harmonize
from components.checkpoints.reference import Checkpoint, open_checkpoint
from components.checkpoints.source import TensorSource, read_whole
from components.checkpoints.writer import CheckpointWriter, copy_side_files
from components.errors import CheckpointError, ConfigError
from components.fusion.merge_settings import MergeSettings
from components.fusion.merging import MergedSource
from tests.components.checkpoints.test_adapters import make_adapter, merged_by_peft
from tests.components.checkpoints.tiny import (
    edit_json,
    llama,
    perturbed,
    qwen,
    rewrite,
    same_bits,
    save,
    save_tokenizer,
)
from tests.components.checkpoints.whole import EMBEDDING, HEAD, MERGES, everyone, filled, fused_by, in_memory
from tests.components.masks.support import moved, tiny_model


def write(source: TensorSource, config_of: Checkpoint, changes: Mapping[str, Any], out: Path) -> Path:
    """A model directory, as a fusion writes it."""
    with CheckpointWriter(out, {name: source.spec(name) for name in source.names()}) as writer:
        for name in source.names():
            writer.write_whole(name, read_whole(source, name))
        writer.finish()
    copy_side_files(model_dir=config_of.model_dir, tokenizer_dir=config_of.tokenizer_dir, out_dir=out, dtype=F32)
    edit_json(out / "config.json", **changes)
    return out


def resized(model: Any, rows: int) -> Any:
    torch.manual_seed(rows)
    model.resize_token_embeddings(rows)
    return model


def test_tied_separate_and_resized_models_end_in_one_that_transformers_loads(tmp_path: Path) -> None:
    paths = {
        ALIGNED: save(qwen(0), tmp_path / "a"),
        "separate": save(perturbed(qwen(0, tie_word_embeddings=False), 1), tmp_path / "b", shard="9KB"),
        "resized": save(perturbed(resized(qwen(0), 72), 2), tmp_path / "c"),
    }
    for path, words in zip(paths.values(), (60, 60, 66), strict=True):
        save_tokenizer(path, words=words)
    models = {label: open_checkpoint(path) for label, path in paths.items()}
    finetunes = {label: models[label] for label in ("separate", "resized")}
    found = harmonize(models[ALIGNED], finetunes, vocabulary="pad")
    assert found.config_changes == {"tie_word_embeddings": False, "vocab_size": 72}
    assert found.tokenizer_of == "resized"
    assert found.notes == [
        "lm_head.weight is tied in aligned, resized and not in others: a tensor of its own in the fused model",
        "the vocabulary has 72 rows; lent to aligned (64), separate (64) where they end earlier",
    ]
    for model in found.finetunes.values():
        require_compatible(found.aligned, model)
    sources = {label: model.source for label, model in found.finetunes.items()}
    merged = MergedSource(found.aligned.source, sources, MergeSettings(method="average"))
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        write(merged, models["resized"], found.config_changes, tmp_path / "out")
    )
    states = {label: AutoModelForCausalLM.from_pretrained(path).state_dict() for label, path in paths.items()}
    whole = filled(states, "pad", "keep")
    reference = qwen(5, vocab_size=72, tie_word_embeddings=False)
    reference.load_state_dict(
        {name: fused_by("average", whole, name).reshape(whole[ALIGNED][name].shape) for name in whole[ALIGNED]}
    )
    assert loaded.config.vocab_size == 72
    assert torch.equal(loaded.lm_head.weight[64:], states["resized"][HEAD][64:])
    ids = torch.arange(0, 72, 3)[None]
    torch.testing.assert_close(loaded(ids).logits, reference(ids).logits, rtol=0, atol=1e-5)
    cut = harmonize(models[ALIGNED], finetunes, vocabulary="truncate")
    assert (cut.tokenizer_of, cut.config_changes["vocab_size"]) == (ALIGNED, 64)
    assert "later ones left out of resized (72)" in cut.notes[-1]
    assert same_bits(read_whole(cut.finetunes["resized"].source, EMBEDDING), states["resized"][EMBEDDING][:64])


def test_what_fits_is_left_as_it_is(tmp_path: Path) -> None:
    """Adapters of two ranks, one with DoRA, and a bf16 model in shards need nothing done; PEFT's merges have the same mean."""
    model = llama(0)
    base = save(model, tmp_path / "base")
    full = save(perturbed(llama(0, torch.bfloat16), 4), tmp_path / "full", shard="20KB")
    lora = make_adapter(llama(0), tmp_path / "lora", base=base, r=2)
    dora = make_adapter(llama(0), tmp_path / "dora", base=base, r=3, use_dora=True, target_modules=["o_proj", "q_proj"])
    aligned = open_checkpoint(base)
    finetunes = {path.name: open_checkpoint(path, base=base) for path in (lora, dora, full)}
    found = harmonize(aligned, finetunes)
    assert (found.config_changes, found.tokenizer_of, found.notes) == ({}, ALIGNED, [])
    assert all(found.finetunes[label].source is model.source for label, model in finetunes.items())
    assert found.aligned.source is aligned.source
    sources = {label: model.source for label, model in found.finetunes.items()}
    merged = MergedSource(aligned.source, sources, MergeSettings(method="average"))
    by_peft = [merged_by_peft(base, path) for path in (lora, dora)]
    for name in aligned.source.names():
        three = [*(state[name].double() for state in by_peft), read_whole(finetunes["full"].source, name).double()]
        torch.testing.assert_close(read_whole(merged, name).double(), sum(three) / 3, rtol=0, atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "whole"), [(llama, True), (llama, False), (qwen, False)], ids=["saved", "lent", "tied"]
)
def test_an_adapter_that_brings_new_tokens(make: Any, whole: bool, tmp_path: Path) -> None:
    """Against PEFT on the base after it was resized. PEFT saves embedding and head with the adapter, or twice where they were
    trained as modules_to_save."""
    base = save(make(0), tmp_path / "base")
    model = resized(make(0), 72)
    model.name_or_path = str(base)
    config = {"modules_to_save": ["embed_tokens", "lm_head"]} if whole else {}
    adapter = make_adapter(model, tmp_path / "adapter", base=base, target_modules=["q_proj"], **config)
    with pytest.raises(CheckpointError, match=r"saves .*embed_tokens.* \(a resized vocabulary is not supported\)"):
        open_checkpoint(adapter, base=base)
    aligned, finetune = open_checkpoint(base), open_checkpoint(adapter, base=base, resized_vocabulary=True)
    with pytest.raises(
        CheckpointError, match=r"embed_tokens\.weight is \[72, 32\], not \[64, 32\] .*adapter_model\.safe"
    ):
        harmonize(aligned, {"a": finetune})
    found = harmonize(aligned, {"a": finetune}, vocabulary="pad")
    want = merged_by_peft(base, adapter, rows=72)
    for name in found.aligned.source.names():
        assert torch.equal(read_whole(found.finetunes["a"].source, name), want[name]), name
    assert torch.equal(read_whole(found.aligned.source, EMBEDDING)[64:], want[EMBEDDING][64:])
    alike = harmonize(finetune, {"b": finetune})
    assert (found.config_changes, alike.config_changes) == ({"vocab_size": 72}, {"vocab_size": 72})


def test_the_base_of_an_adapter_has_the_common_tensors_too(tmp_path: Path) -> None:
    base = save(qwen(0, torch.bfloat16), tmp_path / "base")
    adapter = make_adapter(qwen(0, torch.bfloat16), tmp_path / "lora", base=base, target_modules=["q_proj"])
    full = save(perturbed(qwen(0, torch.bfloat16, tie_word_embeddings=False), 1), tmp_path / "full")
    finetunes = {"lora": open_checkpoint(adapter, base=base), "full": open_checkpoint(full)}
    found = harmonize(open_checkpoint(base), finetunes)
    lora = found.finetunes["lora"]
    assert lora.base is not None
    assert HEAD in lora.base.source.names()
    adapted = [
        n for n in lora.source.names() if not same_bits(read_whole(lora.source, n), read_whole(lora.base.source, n))
    ]
    assert adapted == ["model.layers.0.self_attn.q_proj.weight"]
    for name in lora.base.source.names():
        assert same_bits(read_whole(lora.base.source, name), read_whole(found.aligned.source, name))


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    model = tiny_model("moe", vocabulary=40)
    changed = {label: moved(model, seed=seed) for seed, label in enumerate(("code", "math"), 1)}
    resized(changed["math"], 48)
    aligned = open_checkpoint(save(model, tmp_path / "a"))
    finetunes = {label: open_checkpoint(save(one, tmp_path / label)) for label, one in changed.items()}
    found = harmonize(aligned, finetunes, vocabulary="pad")
    assert (found.config_changes, found.tokenizer_of) == ({"vocab_size": 48}, ALIGNED)  # there is no tokenizer in any
    sources = {label: one.source for label, one in found.finetunes.items()}
    merged = MergedSource(found.aligned.source, sources, MERGES["task_arithmetic"])
    states = {ALIGNED: model.state_dict(), **{label: one.state_dict() for label, one in changed.items()}}
    whole = filled(states, "pad", "keep")
    assert sum(len(found.aligned.source.spec(name).shape) == 3 for name in merged.names()) >= 4
    assert set(merged.names()) == set(whole[ALIGNED])
    for name in merged.names():
        torch.testing.assert_close(
            merged.read(name).double(), fused_by("task_arithmetic", whole, name), rtol=0, atol=1e-5
        )


def test_everything_that_does_not_fit_is_told_at_once_with_shapes_and_files(tmp_path: Path) -> None:
    aligned = save(llama(0), tmp_path / "a", shard="9KB")
    other = save(resized(llama(1, intermediate_size=40, tie_word_embeddings=True), 72), tmp_path / "b")
    rewrite(other / "model.safetensors", model__extra=torch.zeros(3), model__norm__weight=None)
    first, second = open_checkpoint(aligned), open_checkpoint(other)
    with pytest.raises(CheckpointError) as caught:
        harmonize(first, {"billing": second, "same": open_checkpoint(aligned)})
    message = str(caught.value)
    placed = json.loads((aligned / "model.safetensors.index.json").read_text())["weight_map"]
    theirs = other / "model.safetensors"
    for line in (
        f"billing: {EMBEDDING} is [72, 32], not [64, 32] ({theirs} against {aligned / placed[EMBEDDING]})",
        f"billing: {HEAD} is [72, 32], not [64, 32] ({theirs} against {aligned / placed[HEAD]})",
        f"billing: tensor model.norm.weight is missing ({aligned / placed['model.norm.weight']})",
        f"billing: tensor model.extra is extra ({theirs})",
        f"billing: config vocab_size is 72, not 64 ({other})",
        f"billing: model.layers.1.mlp.up_proj.weight is [40, 32], not [48, 32] ({theirs} against "
        f"{aligned / placed['model.layers.1.mlp.up_proj.weight']})",
    ):
        assert line in message
    assert f"these finetunes of {aligned} cannot be fused (12 differences): " in message
    assert "same:" not in message
    assert message.endswith("; give finetunes of that model")  # no policy mends another width
    with pytest.raises(CheckpointError, match=r"cannot be fused \(7 differences\)") as caught:
        harmonize(first, {"billing": second}, vocabulary="pad", one_sided="keep")
    assert EMBEDDING not in str(caught.value)  # what a policy mends is no difference any more
    with pytest.raises(ConfigError, match="cannot be called aligned"):
        harmonize(first, {ALIGNED: second})


def test_a_policy_is_named_where_it_would_help(tmp_path: Path) -> None:
    first = open_checkpoint(save(qwen(0), tmp_path / "a"))
    grown = open_checkpoint(save(resized(qwen(0), 72), tmp_path / "b"))
    with pytest.raises(CheckpointError, match=r"other sizes \(--vocabulary pad or truncate\)$"):
        harmonize(first, {"grown": grown})
    rewrite(tmp_path / "a" / "model.safetensors", model__norm__weight=None)
    with pytest.raises(CheckpointError, match=r"only some models have \(--one-sided keep or drop\)$"):
        harmonize(open_checkpoint(tmp_path / "a"), {"other": first})


def with_tokens(path: Path, tokens: Mapping[str, int]) -> None:
    """A tokenizer that knows `tokens` beside its words."""
    save_tokenizer(path)
    model = json.loads((path / "tokenizer.json").read_text())["model"]
    edit_json(path / "tokenizer.json", model={**model, "vocab": {**model["vocab"], **tokens}})


@pytest.fixture
def vocabularies(tmp_path: Path) -> Callable[..., dict[str, Checkpoint]]:
    def make(**models: tuple[int, dict[str, int]]) -> dict[str, Checkpoint]:
        found = {}
        for seed, (label, (rows, tokens)) in enumerate(models.items()):
            path = save(resized(llama(seed), rows), tmp_path / label)
            with_tokens(path, tokens)
            found[label] = open_checkpoint(path)
        return found

    return make


def test_rows_that_pad_one_model_do_not_water_down_tokens_of_another(
    vocabularies: Callable[..., dict[str, Checkpoint]],
) -> None:
    models = vocabularies(base=(64, {}), padded=(80, {}), taught=(70, {"<tool>": 64, "<done>": 65}))
    found = harmonize(models["base"], {k: models[k] for k in ("padded", "taught")}, vocabulary="pad")
    assert (found.tokenizer_of, found.config_changes) == ("taught", {"vocab_size": 80})
    padded, taught = (read_whole(models[k].source, HEAD) for k in ("padded", "taught"))
    for model in everyone(found).values():
        rows = read_whole(model.source, HEAD)
        assert torch.equal(rows[64:66], taught[64:66])
        torch.testing.assert_close(rows[66:70], (padded[66:70] + taught[66:]) / 2, rtol=0, atol=1e-7)
        assert torch.equal(rows[70:], padded[70:])


def test_padding_to_a_multiple_keeps_the_aligned_tokenizer(
    vocabularies: Callable[..., dict[str, Checkpoint]],
) -> None:
    models = vocabularies(base=(64, {}), padded=(80, {}))
    found = harmonize(models["base"], {"padded": models["padded"]}, vocabulary="pad")
    assert found.tokenizer_of == ALIGNED
    back = harmonize(models["padded"], {"base": models["base"]}, vocabulary="pad")
    assert torch.equal(
        read_whole(back.finetunes["base"].source, HEAD)[64:], read_whole(models["padded"].source, HEAD)[64:]
    )


def test_the_tokenizer_is_of_a_model_that_has_one(vocabularies: Callable[..., dict[str, Checkpoint]]) -> None:
    models = vocabularies(base=(64, {}), bare=(80, {}), other=(72, {}))
    for file in (models["bare"].path / "tokenizer.json", models["bare"].path / "tokenizer_config.json"):
        file.unlink()
    finetunes = {k: models[k] for k in ("bare", "other")}
    assert harmonize(models["base"], finetunes, vocabulary="pad").tokenizer_of == ALIGNED
    for label in ("base", "other"):  # of a format that is not looked into: by rows
        (models[label].path / "tokenizer.json").unlink()
        (models[label].path / "tokenizer.model").write_bytes(label.encode())
    assert harmonize(models["base"], finetunes, vocabulary="pad").tokenizer_of == "other"


def test_two_finetunes_that_gave_one_row_to_different_tokens(
    vocabularies: Callable[..., dict[str, Checkpoint]],
) -> None:
    models = vocabularies(base=(64, {}), one=(70, {"<tool>": 64}), two=(70, {"<user>": 64}))
    finetunes = {k: models[k] for k in ("one", "two")}
    with pytest.raises(CheckpointError) as caught:
        harmonize(models["base"], finetunes, vocabulary="pad")
    assert "two beside one: vocabulary: 1 tokens have other ids ('<user>' None and 64)" in str(caught.value)
    assert harmonize(models["base"], finetunes, vocabulary="truncate").tokenizer_of == ALIGNED


def test_an_embedding_and_a_head_of_unlike_size_are_no_vocabulary() -> None:
    aligned = in_memory("a", {EMBEDDING: torch.zeros(4, 2), HEAD: torch.zeros(4, 2)})
    odd = in_memory("b", {EMBEDDING: torch.zeros(6, 2), HEAD: torch.zeros(4, 2)})
    with pytest.raises(
        CheckpointError, match=r"odd: its embedding and head have .*lm_head\.weight \[4, 2\], .*\[6, 2\]"
    ):
        harmonize(aligned, {"odd": odd}, vocabulary="pad")
    tall = in_memory("a", {EMBEDDING: torch.zeros(6, 2)})
    with_head = in_memory("b", {EMBEDDING: torch.zeros(4, 2), HEAD: torch.zeros(4, 2)})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: no model has rows 4 to 5"):
        harmonize(tall, {"b": with_head}, vocabulary="pad", one_sided="keep")


def test_integers_are_taken_only_where_all_agree() -> None:
    aligned = in_memory("a", {"w": torch.zeros(2)})
    one = in_memory("b", {"w": torch.ones(2), "ids": torch.tensor([1, 2, 3])})
    two = in_memory("c", {"w": torch.ones(2), "ids": torch.tensor([1, 2, 4])})
    agreed = harmonize(aligned, {"one": one, "again": one}, one_sided="keep")
    assert agreed.notes == ["ids is only in one, again"]
    assert torch.equal(agreed.aligned.source.read("ids"), torch.tensor([1, 2, 3]))
    differing = harmonize(aligned, {"one": one, "two": two}, one_sided="keep")
    assert torch.equal(differing.aligned.source.read("ids", 0, 2), torch.tensor([1, 2]))
    with pytest.raises(CheckpointError, match="ids holds integers that differ"):
        differing.aligned.source.read("ids")
    left_out = harmonize(aligned, {"one": one, "two": two}, one_sided="drop")
    assert (left_out.aligned.source.names(), left_out.notes) == (["w"], ["ids is only in one, two: left out"])
    assert left_out.finetunes["one"].source.names() == ["w"]


def test_a_vocabulary_that_is_told_of_in_a_nested_config() -> None:
    def nested(name: str, rows: int) -> Checkpoint:
        made = in_memory(name, {EMBEDDING: torch.zeros(rows, 2)})
        return Checkpoint(**{**vars(made), "config": {"text_config": {"vocab_size": rows, "hidden_size": 2}}})

    found = harmonize(nested("a", 4), {"b": nested("b", 6)}, vocabulary="pad")
    assert found.config_changes == {"text_config": {"vocab_size": 6, "hidden_size": 2}}
    with pytest.raises(CheckpointError, match="no tensor lm_head"):
        found.aligned.source.spec("lm_head.weight")
