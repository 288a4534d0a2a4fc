from __future__ import annotations

import functools
import inspect
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
from components.evaluation import decode as decode_module
from components.evaluation.decode import Limits, Row, Work, decode, greedy
from components.evaluation.sampling import drawn
from components.evaluation.settings import Sampling

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


@functools.cache
def endless(name: str) -> list[list[int]]:
    """24 tokens for each prompt; every forward over the whole text, no cache, no padding, no batch: slow and obvious."""
    model = random_model(CONFIGS[name])
    found = []
    for prompt in PROMPTS:
        ids = list(prompt)
        while len(ids) < len(prompt) + 24:
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        found.append(ids[len(prompt) :])
    return found


def ending(name: str) -> tuple[int, list[list[int]]]:
    """A token that ends some answers early, some late and some never, so that rows leave on the way; the answers up to it."""
    whole = endless(name)
    end = max(range(41), key=lambda t: len({row.index(t) if t in row else 24 for row in whole}))
    return end, [row[: row.index(end)] if end in row else row for row in whole]


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_one_row_at_a_time_without_a_cache(name: str) -> None:
    model = random_model(CONFIGS[name])
    end, expected = ending(name)
    assert len({len(row) for row in expected}) >= 4
    found = greedy(model=model, prompts=PROMPTS, pad=0, ends={end}, max_new_tokens=24)
    assert [row.tokens for row in found] == expected
    assert [row.end for row in found] == ["limit" if len(row) == 24 else "model" for row in expected]


def test_decided_rows_leave_at_the_next_look() -> None:
    model = random_model(CONFIGS["llama"])
    shown: list[int] = []

    def decided(rows: list[list[int]]) -> list[bool]:
        shown.append(len(rows))
        return [row[0] % 2 == 0 for row in rows]

    found = greedy(model=model, prompts=PROMPTS, pad=0, ends=set(), max_new_tokens=24, decided=decided)
    for row, whole in zip(found, endless("llama"), strict=True):
        even = whole[0] % 2 == 0
        assert row.tokens == (whole[:4] if even else whole)
        assert row.end == ("decided" if even else "limit")
    stay = sum(whole[0] % 2 for whole in endless("llama"))
    assert 0 < stay < len(PROMPTS)
    assert shown == [len(PROMPTS), *[stay] * 5]


def test_a_model_without_a_cache_is_refused() -> None:
    config = MambaConfig(vocab_size=41, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(EvaluationError, match="MambaForCausalLM keeps no key-value cache"):
        greedy(model=AutoModelForCausalLM.from_config(config), prompts=[[1, 2]], pad=0, ends=set(), max_new_tokens=2)


def decoded(model: Any, places: int, *, work: Work | None = None, **limits: Any) -> list[Row]:
    """All rows, in the prompts' order; each must have come once."""
    options = Limits(**{"ends": set(), "max_new_tokens": 24, **limits})
    groups = list(decode(model=model, prompts=PROMPTS, pad=0, limits=options, places=places, work=work))
    rows = sorted((row for group in groups for row in group), key=lambda row: row.index)
    assert [row.index for row in rows] == list(range(len(PROMPTS)))
    return rows


@pytest.mark.parametrize("places", [1, 3, 4, 13, 99])
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_that_join_a_batch_under_way_are_the_same(name: str, places: int) -> None:
    end, expected = ending(name)
    rows = decoded(random_model(CONFIGS[name]), places, ends={end})
    assert [row.tokens for row in rows] == expected
    assert [row.end for row in rows] == ["limit" if len(row) == 24 else "model" for row in expected]


@pytest.mark.parametrize("slack", [1, 2, 7])
def test_columns_that_nobody_needs_are_forgotten(slack: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_module, "_SLACK", slack)
    moved = []
    forget = decode_module._Batch._forget
    monkeypatch.setattr(decode_module._Batch, "_forget", lambda batch: (moved.append(1), forget(batch)))
    model = random_model(CONFIGS["llama"])
    expected = endless("llama")

    def short(rows: list[list[int]]) -> list[bool]:
        return [len(row) >= 4 + row[0] % 5 * 4 for row in rows]

    rows = decoded(model, 3, decided=short)
    assert moved
    for row, whole in zip(rows, expected, strict=True):
        assert row.tokens == whole[: len(row.tokens)]
        assert len(row.tokens) == min(24, 4 + whole[0] % 5 * 4)


def test_freed_places_are_filled() -> None:
    model = random_model(CONFIGS["llama"])
    work = Work()

    def decided(rows: list[list[int]]) -> list[bool]:
        return [row[0] % 2 == 0 for row in rows]

    rows = decoded(model, 4, decided=decided, work=work)
    needed = sum(len(row.tokens) for row in rows)
    assert needed <= work.rows < 1.4 * needed
    in_batches = Work()
    for start in range(0, len(PROMPTS), 4):
        some = PROMPTS[start : start + 4]
        options = Limits(set(), 24, decided)
        list(decode(model=model, prompts=some, pad=0, limits=options, places=4, work=in_batches))
    assert work.passes < in_batches.passes


def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(CONFIGS["llama"])
    expected = endless("llama")
    forward, largest = model.forward, 3

    def small(*args: Any, **kwargs: Any) -> Any:
        rows, columns = kwargs["attention_mask"].shape
        if rows * columns > largest * 20:
            raise torch.OutOfMemoryError("no room")
        return forward(*args, **kwargs)

    small.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(model, "forward", small)
    assert [row.tokens for row in decoded(model, 8)] == expected
    largest = 1
    with pytest.raises(torch.OutOfMemoryError):
        decoded(model, 8)


def test_draws_follow_the_probabilities_of_the_nucleus() -> None:
    likely = torch.tensor([0.05, 0.4, 0.2, 0.3, 0.05])
    for top_p, wanted in ((1.0, likely), (0.85, torch.tensor([0, 4 / 9, 2 / 9, 3 / 9, 0])), (0.4, torch.eye(5)[1])):
        sampling = Sampling(temperature=0.5, top_p=top_p, seed=4)
        logits = (likely.log() * 0.5)[None].expand(20_000, -1)
        rows = [Row(index=i) for i in range(20_000)]
        found = drawn(sampling, [f"p{i}" for i in range(20_000)])(logits, rows).bincount(minlength=5) / 20_000
        assert torch.allclose(found, wanted, atol=0.012), top_p
        assert all(found[i] == 0 for i in range(5) if wanted[i] == 0)


def test_positions_of_rows_that_have_ended_stay_within_the_models() -> None:
    config = GPT2Config(vocab_size=41, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    model = random_model(config)
    prompts = [[1 + (i + j) % 40 for j in range(20)] for i in range(16)]

    def staggered(rows: list[list[int]]) -> list[bool]:
        return [len(row) >= 4 + 4 * (row[0] % 3) for row in rows]

    options = Limits(set(), 12, staggered)
    rows = [row for group in decode(model=model, prompts=prompts, pad=0, limits=options, places=8) for row in group]
    assert len(rows) == 16


class TestNumbersThatAreNone:
    """A token whose embedding is NaN or infinite breaks the rows that come by it, and no other row."""

    def token(self, name: str) -> int:
        """One that some rows say early, some late and some never."""

        def lengths(token: int) -> set[int]:
            return {row.index(token) for row in endless(name) if token in row[:-1]}

        some = [
            t
            for t in range(41)
            if 4 <= sum(t in p or t in w for p, w in zip(PROMPTS, endless(name), strict=True)) <= 10
        ]
        return max(some, key=lambda t: len(lengths(t)))

    def broken_model(self, name: str, value: float = float("nan")) -> Any:
        model = random_model(CONFIGS[name])
        head = model.get_output_embeddings()
        if head.weight is model.get_input_embeddings().weight:
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
        with torch.no_grad():
            model.get_input_embeddings().weight[self.token(name)] = value
        return model

    def expected(self, name: str) -> list[tuple[list[int], str]]:
        found, token = [], self.token(name)
        for prompt, whole in zip(PROMPTS, endless(name), strict=True):
            if token in prompt:
                found.append(([], "broken"))
            elif token in whole[:-1]:
                found.append((whole[: whole.index(token) + 1], "broken"))
            else:
                found.append((whole, "limit"))
        assert 3 <= sum(end == "broken" for _, end in found) <= len(PROMPTS) - 3
        assert len({len(tokens) for tokens, end in found if end == "broken"}) >= 2
        return found

    @pytest.mark.parametrize("places", [1, 3, 4, 99])
    @pytest.mark.parametrize("name", ["llama", "sliding window", "absolute positions"])
    def test_end_the_answer_and_leave_the_others_alone(self, name: str, places: int) -> None:
        rows = decoded(self.broken_model(name), places)
        assert [(row.tokens, row.end) for row in rows] == self.expected(name)

    def test_of_infinite_size(self) -> None:
        model = self.broken_model("llama", float("inf"))
        assert [(row.tokens, row.end) for row in decoded(model, 4)] == self.expected("llama")

    def test_a_row_that_broke_after_its_end_leaves_a_clean_place(self) -> None:
        """Decided before it breaks, it is carried on until another takes its place."""
        model = self.broken_model("llama")

        def decided(rows: list[list[int]]) -> list[bool]:
            return [len(row) == 4 for row in rows]

        rows = decoded(model, 3, decided=decided)
        for row, (tokens, end) in zip(rows, self.expected("llama"), strict=True):
            assert (row.tokens, row.end) == (tokens[:4], "broken" if end == "broken" and len(tokens) < 4 else "decided")

    @pytest.mark.parametrize("top_p", [1.0, 0.7])
    def test_sampling_goes_on_for_the_others(self, top_p: float) -> None:
        choose = drawn(Sampling(temperature=0.9, top_p=top_p, seed=1), [f"p{i}" for i in range(len(PROMPTS))])
        found, token = [], self.token("llama")
        for model in (random_model(CONFIGS["llama"]), self.broken_model("llama")):
            groups = decode(model=model, prompts=PROMPTS, pad=0, limits=Limits(set(), 24), places=4, choose=choose)
            found.append(sorted((row for group in groups for row in group), key=lambda row: row.index))
        ends = []
        for prompt, whole, row in zip(PROMPTS, *found, strict=True):
            way = [*prompt, *whole.tokens[:-1]]
            cut = max(0, way.index(token) + 1 - len(prompt)) if token in way else 24
            assert row.tokens == whole.tokens[:cut]
            ends.append(row.end)
            assert row.end == ("limit" if token not in way else "broken")
        assert {"limit", "broken"} == set(ends)
