"""Opening a model or an adapter by its path, which base an adapter belongs to, and what a model's identity is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from components.checkpoints.identity import identify
from components.checkpoints.reference import open_checkpoint
from components.errors import CheckpointError
from tests.components.checkpoints.test_adapters import make_adapter
from tests.components.checkpoints.tiny import edit_json, llama, rewrite, save, save_tokenizer


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """aligned/ (with a tokenizer), other/ (other weights) and adapter/ over aligned/, named by a relative path."""
    root = tmp_path / "family"
    model = llama(0, torch.bfloat16)
    save(model, root / "aligned")
    save_tokenizer(root / "aligned")
    save(llama(1, torch.bfloat16), root / "other")
    make_adapter(model, root / "adapter", base=root / "aligned")
    edit_json(root / "adapter" / "adapter_config.json", base_model_name_or_path="../aligned")
    return root


def test_full_checkpoint(family: Path) -> None:
    checkpoint = open_checkpoint(family / "aligned")
    assert (checkpoint.kind, checkpoint.base, checkpoint.notes) == ("full", None, ())
    assert checkpoint.model_dir == checkpoint.tokenizer_dir == family / "aligned"
    assert checkpoint.config["model_type"] == "llama"
    names = {f.name for f in checkpoint.files}
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= names


def test_a_finetune_without_a_tokenizer_takes_the_aligned_models(family: Path) -> None:
    lent = open_checkpoint(family / "other", base=family / "aligned")
    assert (lent.kind, lent.model_dir, lent.tokenizer_dir) == ("full", family / "other", family / "aligned")
    assert lent.notes == ("other has no tokenizer; that of aligned is used",)
    assert open_checkpoint(family / "other").tokenizer_dir == family / "other"


def test_what_ends_an_answer_is_part_of_the_identity(family: Path) -> None:
    before = identify(open_checkpoint(family / "aligned")).sha256
    edit_json(family / "aligned" / "generation_config.json", eos_token_id=[1, 2])
    assert identify(open_checkpoint(family / "aligned")).sha256 != before


def test_adapter_takes_config_and_tokenizer_from_its_base(family: Path) -> None:
    checkpoint = open_checkpoint(family / "adapter", base=family / "aligned")
    assert checkpoint.kind == "adapter"
    assert checkpoint.model_dir == checkpoint.tokenizer_dir == family / "aligned"
    assert checkpoint.base is not None
    assert {f.name for f in checkpoint.files} == {"adapter_config.json", "adapter_model.safetensors"}
    save_tokenizer(family / "adapter")
    own = open_checkpoint(family / "adapter", base=family / "aligned")
    assert (own.tokenizer_dir, own.model_dir) == (family / "adapter", family / "aligned")


def test_a_moved_family_still_fits(family: Path, tmp_path: Path) -> None:
    moved = family.rename(tmp_path / "elsewhere")
    assert open_checkpoint(moved / "adapter", base=moved / "aligned").notes == ()


def test_an_equal_copy_of_the_named_base_fits_and_another_model_does_not(family: Path) -> None:
    shutil.copytree(family / "aligned", family / "copy")
    assert open_checkpoint(family / "adapter", base=family / "copy").notes == ()
    with pytest.raises(CheckpointError, match=r"was trained on \.\./aligned, not on .*/other; .*base_equal"):
        open_checkpoint(family / "adapter", base=family / "other")
    declared = open_checkpoint(family / "adapter", base=family / "other", base_declared_equal=True)
    assert declared.notes == ("base other declared equal to the adapter's '../aligned'",)


def test_names_that_cannot_be_looked_up(family: Path, tmp_path: Path) -> None:
    config = family / "adapter" / "adapter_config.json"
    edit_json(config, base_model_name_or_path="some-org/aligned")
    with pytest.raises(CheckpointError, match=r"trained on some-org/aligned, not on .*/aligned"):
        open_checkpoint(family / "adapter", base=family / "aligned")
    hub = tmp_path / "models--some-org--aligned" / "snapshots" / "0"
    shutil.copytree(family / "aligned", hub)
    assert open_checkpoint(family / "adapter", base=hub).notes == ()
    edit_json(config, base_model_name_or_path=None)
    checkpoint = open_checkpoint(family / "adapter", base=family / "aligned")
    assert checkpoint.notes == ("the adapter names no base; aligned was given",)


def test_what_is_no_checkpoint(family: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(family / "nothing")
    with pytest.raises(CheckpointError, match="is a file, not a model directory"):
        open_checkpoint(family / "aligned" / "config.json")
    with pytest.raises(CheckpointError, match="is an adapter; name its base"):
        open_checkpoint(family / "adapter")
    shutil.copy(family / "adapter" / "adapter_config.json", family / "aligned")
    with pytest.raises(CheckpointError, match="keep the adapter in a directory of its own"):
        open_checkpoint(family / "aligned")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(family)


def test_identity_is_of_contents_not_of_places(family: Path, tmp_path: Path) -> None:
    one = identify(open_checkpoint(family / "aligned"))
    shutil.copytree(family / "aligned", tmp_path / "copy")
    edit_json(tmp_path / "copy" / "config.json", _name_or_path="/somewhere/else")
    two = identify(open_checkpoint(tmp_path / "copy"))
    assert one.sha256 == two.sha256
    assert {n: f["sha256"] for n, f in one.files.items()} == {n: f["sha256"] for n, f in two.files.items()}
    assert one.files["model.safetensors"]["bytes"] == (family / "aligned" / "model.safetensors").stat().st_size
    assert identify(open_checkpoint(family / "other")).sha256 != one.sha256


@pytest.mark.parametrize("changed", ["weight", "template", "config"])
def test_identity_changes_with_what_the_model_does(changed: str, family: Path) -> None:
    before = identify(open_checkpoint(family / "aligned")).sha256
    if changed == "weight":
        rewrite(family / "aligned" / "model.safetensors", model__norm__weight=torch.zeros(32).bfloat16())
    elif changed == "template":
        (family / "aligned" / "chat_template.jinja").write_text("{{ 1 }}")
    else:
        edit_json(family / "aligned" / "config.json", rms_norm_eps=1e-3)
    assert identify(open_checkpoint(family / "aligned")).sha256 != before


def test_identity_of_an_adapter_has_its_base(family: Path) -> None:
    one = identify(open_checkpoint(family / "adapter", base=family / "aligned"))
    assert {"adapter_model.safetensors", "base/model.safetensors"} <= set(one.files)
    edit_json(family / "adapter" / "adapter_config.json", base_model_name_or_path=str(family / "aligned"))
    assert identify(open_checkpoint(family / "adapter", base=family / "aligned")).sha256 == one.sha256
    edit_json(family / "adapter" / "adapter_config.json", lora_alpha=1)
    assert identify(open_checkpoint(family / "adapter", base=family / "aligned")).sha256 != one.sha256


def test_identity_cache(family: Path, tmp_path: Path) -> None:
    import os

    cache = tmp_path / "cache"
    weights = family / "aligned" / "model.safetensors"
    fresh = identify(open_checkpoint(family / "aligned"), cache=cache)
    assert not cache.exists() or not list(cache.iterdir())  # too young to be remembered
    for file in (family / "aligned").iterdir():
        os.utime(file, ns=(10**18, 10**18))
    assert identify(open_checkpoint(family / "aligned"), cache=cache) == fresh
    entries = list(cache.iterdir())
    assert len(entries) >= 2
    for entry in entries:  # proof that the cache is used
        entry.write_text("0" * 64)
    assert identify(open_checkpoint(family / "aligned"), cache=cache).files["model.safetensors"]["sha256"] == "0" * 64
    os.utime(weights, ns=(10**18 + 1, 10**18 + 1))
    again = identify(open_checkpoint(family / "aligned"), cache=cache).files["model.safetensors"]
    assert again == fresh.files["model.safetensors"]
