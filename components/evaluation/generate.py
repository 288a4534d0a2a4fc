"""Greedy answers in batches, with plain transformers.

Prompts are sorted by length and padded on the left. Padding and batch size change the order of floating-point sums and
so, in the last bits, the logits: in fp32 an answer differs between batch sizes only where two tokens tie to about 1e-6
(narrower types tie more often). Batches are a function of the prompts and the batch size alone, never of where an
interrupted evaluation stopped, so a resumed one gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from components.checkpoints.loading import load_causal_lm, load_tokenizer
from components.checkpoints.writer import has_tokenizer
from components.errors import CheckpointError, EvaluationError, listed
from components.evaluation.decode import End, end_tokens, greedy, pad_token
from components.evaluation.prompts import Prompt


@dataclass(frozen=True)
class Answer:
    """`text` without special tokens. `end`: the model ended it, the limit did, or its verdict was known (then the text
    is its beginning). `tokens` counts what was generated, the end token not included."""

    text: str
    end: End
    tokens: int


def load_model(
    model_dir: Path,
    *,
    base: Path | None = None,
    tokenizer_dir: Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a published directory, ready to generate; an adapter directory is merged into `base`.

    `tokenizer_dir` holds the tokenizer where the directory has none of its own. Raises CheckpointError. Never runs code
    from the directory.
    """
    adapter = (model_dir / "adapter_config.json").exists()
    if adapter and base is None:
        raise CheckpointError(f"{model_dir} is an adapter; give its base")
    weights = base if adapter and base is not None else model_dir
    own = has_tokenizer(model_dir)
    tokenizer = load_tokenizer(model_dir if own else tokenizer_dir or weights)
    model = load_causal_lm(weights, dtype=dtype)
    if adapter:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, str(model_dir)).merge_and_unload()
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{model_dir} does not load in PEFT: {str(error).splitlines()[0]}") from error
    return model.to(device).eval(), tokenizer


def answer_batches(
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    batch_size: int,
    system_prompt: str | None = None,
    decided: Callable[[str], bool] | None = None,
    skip: Callable[[int], bool] | None = None,
) -> Iterator[tuple[int, list[tuple[int, Answer]]]]:
    """Yield (batch number, [(index into prompts, Answer), …]) batch by batch, shortest prompts first.

    `decided(beginning)` ends an answer early; it must be true only when nothing that follows matters. `skip(number)`
    leaves out a batch that is already there. Raises EvaluationError for a missing chat template, prompts a template
    refuses, and prompts that do not fit the model's positions.
    """
    rows = encode(tokenizer=tokenizer, prompts=prompts, system_prompt=system_prompt)
    _require_fit(model, prompts, rows, max_new_tokens)
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
    for number, start in enumerate(range(0, len(order), batch_size)):
        if skip is not None and skip(number):
            continue
        indices = order[start : start + batch_size]
        answers = _answer_batch(model, tokenizer, [rows[i] for i in indices], max_new_tokens, decided)
        yield number, list(zip(indices, answers, strict=True))


def encode(
    *, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], system_prompt: str | None = None
) -> list[list[int]]:
    """Token ids of each conversation, up to where the assistant's turn begins, by the model's own chat template."""
    if not tokenizer.chat_template:
        raise EvaluationError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template; add chat_template.jinja to its directory"
        )
    texts = []
    for prompt in prompts:
        messages = [dict(message) for message in prompt.messages]
        if system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system_prompt})
        try:
            texts.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except TemplateError as error:
            raise EvaluationError(f"the chat template refuses prompt {prompt.id!r}: {error}") from error
    # The template writes the special tokens itself.
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return encoded


def _require_fit(
    model: PreTrainedModel, prompts: Sequence[Prompt], rows: Sequence[list[int]], max_new_tokens: int
) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None:
        return
    long = [
        f"{prompt.id!r} has {len(row)}"
        for prompt, row in zip(prompts, rows, strict=True)
        if len(row) + max_new_tokens > positions
    ]
    if long:
        raise EvaluationError(
            f"{len(long)} prompts leave no room for {max_new_tokens} new tokens in the model's {positions} positions "
            f"({listed(long, 3)} tokens); lower max_new_tokens or drop them"
        )


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[list[int]]) -> list[str]:
    # Clean-up would rewrite "do not" to "don't" and the like: a judge must see what the model wrote.
    texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return texts


def _answer_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[int]],
    max_new_tokens: int,
    decided: Callable[[str], bool] | None,
) -> list[Answer]:
    ends = end_tokens(model, tokenizer)
    made = greedy(
        model=model,
        prompts=rows,
        pad=pad_token(tokenizer, ends),
        ends=ends,
        max_new_tokens=max_new_tokens,
        decided=None if decided is None else lambda ids: [decided(text) for text in _decode(tokenizer, ids)],
    )
    texts = _decode(tokenizer, [row.tokens for row in made])
    return [Answer(text, row.end, len(row.tokens)) for text, row in zip(texts, made, strict=True)]
