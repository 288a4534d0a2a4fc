from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from components.errors import EvaluationError
from components.evaluation.decode import greedy

SHAPE: dict[str, Any] = {
    "vocab_size": 41,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "qwen, tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "sliding window": MistralConfig(**SHAPE, sliding_window=6),
    "absolute positions": GPT2Config(vocab_size=41, n_embd=32, n_layer=2, n_head=4, n_positions=96),
}
PROMPTS = [[(7 * i + 3 * j + i * j) % 40 + 1 for j in range(3 + (5 * i) % 11)] for i in range(14)]


def random_model(config: PretrainedConfig) -> Any:
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # larger than the usual start, so that answers vary
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


def one_by_one(model: Any, end: int, limit: int) -> list[list[int]]:
    """Every forward over the whole text, no cache, no padding, no batch: slow and obvious."""
    found = []
    for prompt in PROMPTS:
        ids, made = list(prompt), []
        while len(made) < limit:
            with torch.no_grad():
                token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token == end:
                break
            ids.append(token)
            made.append(token)
        found.append(made)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_one_row_at_a_time_without_a_cache(name: str) -> None:
    model = random_model(CONFIGS[name])
    endless = one_by_one(model, end=-1, limit=24)
    # A token that ends some answers early, some late and some never, so that rows leave the batch on the way.
    end = max(range(41), key=lambda t: len({row.index(t) if t in row else 24 for row in endless}))
    expected = one_by_one(model, end=end, limit=24)
    assert len({len(row) for row in expected}) >= 4
    found = greedy(model=model, prompts=PROMPTS, pad=0, ends={end}, max_new_tokens=24)
    assert [row.tokens for row in found] == expected
    assert [row.end for row in found] == ["limit" if end not in row else "model" for row in endless]


def test_decided_rows_leave_at_the_next_look() -> None:
    model = random_model(CONFIGS["llama"])
    endless = one_by_one(model, end=-1, limit=24)
    shown: list[int] = []

    def decided(rows: list[list[int]]) -> list[bool]:
        shown.append(len(rows))
        return [row[0] % 2 == 0 for row in rows]

    found = greedy(model=model, prompts=PROMPTS, pad=0, ends=set(), max_new_tokens=24, decided=decided)
    for row, whole in zip(found, endless, strict=True):
        even = whole[0] % 2 == 0
        assert row.tokens == (whole[:4] if even else whole)
        assert row.end == ("decided" if even else "limit")
    stay = sum(whole[0] % 2 for whole in endless)
    assert 0 < stay < len(PROMPTS)
    assert shown == [len(PROMPTS), *[stay] * 5]


def test_a_model_without_a_cache_is_refused() -> None:
    config = MambaConfig(vocab_size=41, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(EvaluationError, match="MambaForCausalLM keeps no key-value cache"):
        greedy(model=AutoModelForCausalLM.from_config(config), prompts=[[1, 2]], pad=0, ends=set(), max_new_tokens=2)
