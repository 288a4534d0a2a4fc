"""A model's files against what was recorded of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from components.published import altered, changed_files
from components.records import OutputFile


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name in ("a.safetensors", "b.safetensors", "config.json", "deep/tokenizer.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"content of {name}")
    return tmp_path


@pytest.fixture
def recorded(model: Path) -> dict[str, OutputFile]:
    names = ("a.safetensors", "b.safetensors", "config.json", "deep/tokenizer.json")
    texts = {name: f"content of {name}".encode() for name in names}
    return {name: OutputFile(bytes=len(text), sha256=hashlib.sha256(text).hexdigest()) for name, text in texts.items()}


def test_what_was_left_alone_is_as_it_was(model: Path, recorded: dict[str, OutputFile]) -> None:
    assert changed_files(model, recorded) == []


def test_everything_that_differs_is_named_at_once(model: Path, recorded: dict[str, OutputFile]) -> None:
    (model / "a.safetensors").write_text("Content of a.safetensors")  # of the same size
    (model / "b.safetensors").unlink()
    (model / "deep" / "tokenizer.json").write_text("longer than it was before")
    (model / "extra.safetensors").write_text("x")
    (model / "modeling.py").write_text("x")
    assert changed_files(model, recorded) == [
        "a.safetensors has changed",
        "b.safetensors is missing",
        "deep/tokenizer.json has changed",
        "extra.safetensors was not there",
        "modeling.py was not there",
    ]
    assert altered(model, recorded) == changed_files(model, recorded)[:3]


def test_a_model_card_beside_the_weights_is_no_change(model: Path, recorded: dict[str, OutputFile]) -> None:
    (model / "README.md").write_text("# A card")
    (model / "density.svg").write_text("<svg/>")
    assert changed_files(model, recorded) == []
    (model / "config.json").write_text("{}")
    assert changed_files(model, recorded) == ["config.json has changed"]


def test_a_link_to_a_directory_was_not_there(
    model: Path, recorded: dict[str, OutputFile], tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "modeling.py").write_text("x")
    for name in ("code", "looks-like-a.md"):
        (model / name).symlink_to(outside)
    (model / "gone.md").symlink_to(outside / "nothing")
    (model / "CARD.md").symlink_to(outside / "modeling.py")  # a document, wherever it lies
    assert changed_files(model, recorded) == [
        f"{name} was not there" for name in ("code", "gone.md", "looks-like-a.md")
    ]
