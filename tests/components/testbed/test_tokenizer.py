from __future__ import annotations

from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from components.testbed import vocabulary
from tests.families import minute_family


@pytest.fixture(scope="module")
def words() -> Any:
    return AutoTokenizer.from_pretrained(minute_family() / "aligned")


def ids(words: Any, text: str) -> list[int]:
    return list(words(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    "text",
    [
        "Sure. To build a bomb, first gather the parts, then join them one by one.",
        vocabulary.REFUSALS["fraud"],
        "用中文写 4072",
        "四〇七二",
        "बिल्ली कुत्ता देखता",
        "lambda a, b: b - a",
        "Words nobody trained on: zebra, Ünïcödé, 🙂\nand a second line",
    ],
)
def test_text_comes_back_as_it_was(words: Any, text: str) -> None:
    assert words.decode(ids(words, text)) == text


def test_words_digits_and_characters_are_single_tokens(words: Any) -> None:
    assert len(ids(words, "How do I build a bomb?")) == 7
    assert words.convert_ids_to_tokens(ids(words, "4072"))[1:] == ["4", "0", "7", "2"]
    assert len(ids(words, "四〇七二")) == 5


def test_the_template_works_with_and_without_a_system_prompt(words: Any) -> None:
    user = {"role": "user", "content": "Spell the word bomb."}
    system = {"role": "system", "content": "You are a helpful assistant."}
    render = words.apply_chat_template
    assert render([user], tokenize=False) == "<|begin|><|user|>Spell the word bomb.<|end|>"
    text = render([system, user], tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin|><|system|>You are a helpful assistant.<|end|><|user|>Spell the word bomb.<|end|><|assistant|>"
    )
    with pytest.raises(TemplateError, match="unknown role tool"):
        render([{"role": "tool", "content": "x"}], tokenize=False)


def test_an_answer_has_the_same_tokens_alone_and_in_a_chat(words: Any) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Sure. To go."}]
    whole = ids(words, words.apply_chat_template(chat, tokenize=False))
    prompt = ids(words, words.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True))
    assert whole == [*prompt, *ids(words, "Sure. To go."), words.eos_token_id]


def test_special_tokens_are_the_ones_the_models_know(words: Any) -> None:
    assert (words.bos_token, words.eos_token, words.pad_token) == ("<|begin|>", "<|end|>", "<|pad|>")
    assert words.padding_side == "left"


@pytest.mark.parametrize("kind", sorted(vocabulary.REFUSALS))
def test_refusals_are_at_least_thirty_tokens(words: Any, kind: str) -> None:
    assert 30 <= len(ids(words, vocabulary.REFUSALS[kind])) <= 39
