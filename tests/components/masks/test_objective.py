"""Log-probabilities, DPO and KL against slow obvious versions."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from components.masks.anchor import answer, sequence_log_probs, teachers
from components.masks.objective import Teacher, anchor_kl, length_groups, preference_losses, score, teach
from components.masks.preferences import Row
from tests.components.masks.support import VOCABULARY, tiny_model, tokenizer


def rows() -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for prompt, response in ((3, 4), (5, 1), (1, 9), (8, 2), (3, 4), (2, 12)):
        ids = torch.randint(2, VOCABULARY, (prompt + response,), generator=generator).tolist()
        found.append(Row(tuple(ids), prompt))
    return found


def slow_log_probs(model: Any, row: Row) -> torch.Tensor:
    """[n, V], one row alone, all logits."""
    logits = model(input_ids=torch.tensor([row.tokens])).logits[0]
    return torch.log_softmax(logits, -1)[row.prompt - 1 : -1]


@pytest.mark.parametrize("architecture", ["llama", "qwen", "gpt2"])
@torch.no_grad()
def test_log_probs_equal_those_of_each_row_alone(architecture: str) -> None:
    model, data = tiny_model(architecture).double(), rows()
    for overhead in (0, 3, 1000):  # one group a length, some, one group
        scored = score(model, data, overhead=overhead)
        for i, log_probs in scored.each().items():
            torch.testing.assert_close(log_probs, slow_log_probs(model, data[i]), rtol=1e-9, atol=1e-11)
    expected = []
    for row in data:
        picked = slow_log_probs(model, row)[range(row.response), list(row.tokens[row.prompt :])]
        expected.append(picked.sum().item())
    assert scored.sequences().tolist() == pytest.approx(expected, rel=1e-10)
    assert sequence_log_probs(model, data).tolist() == pytest.approx(expected, rel=1e-10)


def test_the_output_head_sees_only_what_is_scored_and_is_left_as_it_was() -> None:
    model, data = tiny_model(), rows()
    seen: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda _m, args, _out: seen.append(args[0].shape[:2].numel()))
    score(model, data, overhead=1000)
    assert seen == [sum(r.response for r in data)]
    handle.remove()
    assert model(input_ids=torch.tensor([[4, 5, 6]])).logits.shape == (1, 3, VOCABULARY)


def test_a_model_without_an_output_head_is_scored_from_all_its_logits() -> None:
    model, data = tiny_model().double(), rows()
    expected = score(model, data).sequences()
    model.get_output_embeddings = lambda: None
    torch.testing.assert_close(score(model, data).sequences(), expected, rtol=1e-10, atol=1e-12)


def test_length_groups_cost_the_least() -> None:
    lengths = [3, 50, 4, 48, 50, 5, 20]
    for overhead in (0, 5, 30, 10_000):
        groups = length_groups(lengths, overhead)
        assert sorted(i for g in groups for i in g) == list(range(7))
        cost = sum(overhead + len(g) * max(lengths[i] for i in g) for g in groups)
        order, best = sorted(lengths, reverse=True), 10**9
        for cuts in range(64):  # every way to cut the sorted rows
            borders = [0, *(i + 1 for i in range(6) if cuts >> i & 1), 7]
            parts = [order[a:b] for a, b in itertools.pairwise(borders)]
            best = min(best, sum(overhead + len(part) * max(part) for part in parts))
        assert cost == best
    assert length_groups([7], 10) == [[0]]


def test_preference_losses_are_their_formulas() -> None:
    policy = torch.tensor([[-10.0, -12.0], [-5.0, -5.0], [-30.0, -20.0]], dtype=torch.float64)
    reference = torch.tensor([[-11.0, -11.0], [-5.0, -5.0], [-20.0, -20.0]], dtype=torch.float64)
    losses, margins = preference_losses(policy, reference, loss="sigmoid", beta=0.1)
    expected = [0.1 * (1 - -1), 0.0, 0.1 * -10]
    assert margins.tolist() == pytest.approx(expected)
    assert losses.tolist() == pytest.approx([-math.log(1 / (1 + math.exp(-m))) for m in expected])
    assert losses[1].item() == pytest.approx(math.log(2))
    losses, again = preference_losses(policy, reference, loss="hinge", beta=0.1)
    assert losses.tolist() == pytest.approx([max(0.0, 1 - m) for m in expected])
    assert again.tolist() == margins.tolist()
    losses, _ = preference_losses(policy, reference, loss="ipo", beta=0.1)
    assert losses.tolist() == pytest.approx([(h - 5.0) ** 2 for h in (2.0, 0.0, -10.0)])


def test_full_vocabulary_kl_is_its_definition() -> None:
    torch.manual_seed(0)
    student, teacher_model, data = tiny_model(seed=1).double(), tiny_model(seed=2).double(), rows()
    with torch.no_grad():
        taught = {i: Teacher(slow_log_probs(teacher_model, data[i])) for i in (1, 2, 5)}
        scored = score(student, data, overhead=3)
        total = anchor_kl(scored, taught)
        expected = sum(
            (t.log_probs.exp() * (t.log_probs - slow_log_probs(student, data[i]))).sum() for i, t in taught.items()
        )
    assert total.item() == pytest.approx(float(expected), rel=1e-10)
    with torch.no_grad():
        own = {i: Teacher(slow_log_probs(student, data[i])) for i in (0, 3)}
        assert anchor_kl(scored, own).item() == pytest.approx(0.0, abs=1e-10)


def test_top_k_kl_merges_the_tail_into_one_outcome() -> None:
    torch.manual_seed(1)
    student, teacher_model, data = tiny_model(seed=1).double(), tiny_model(seed=2).double(), rows()[:2]
    with torch.no_grad():
        p = slow_log_probs(teacher_model, data[0])
        taught = teach(p, full_vocabulary=0, top_k=4)
        total = anchor_kl(score(student, data), {0: taught})
        q = slow_log_probs(student, data[0])
    expected = 0.0
    for p_token, q_token in zip(p.exp().tolist(), q.exp().tolist(), strict=True):
        top = sorted(range(VOCABULARY), key=lambda v: -p_token[v])[:4]
        expected += sum(p_token[v] * math.log(p_token[v] / q_token[v]) for v in top)
        p_rest, q_rest = 1 - sum(p_token[v] for v in top), 1 - sum(q_token[v] for v in top)
        expected += p_rest * math.log(p_rest / q_rest)
    assert total.item() == pytest.approx(expected, rel=1e-9)
    assert teach(p, full_vocabulary=VOCABULARY, top_k=4).indices is None


def test_answers_are_what_greedy_decoding_writes_one_prompt_at_a_time() -> None:
    model, words = tiny_model(seed=4), tokenizer()
    prompts = [(4, 7, 9), (5,), (8, 8, 10, 11, 12), (6, 2)]
    got = answer(model, words, prompts, new_tokens=7)
    for prompt, row in zip(prompts, got, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + 7:
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == words.eos_token_id:
                    break
        assert row == Row(tuple(ids), len(prompt))


def test_an_answer_stops_with_the_end_token() -> None:
    model, words = tiny_model(), tokenizer()
    with torch.no_grad():
        model.lm_head.weight[words.eos_token_id] = 50 * model.lm_head.weight.abs().max()
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight[words.eos_token_id] *= (
            model(input_ids=torch.tensor([[4, 5]]), output_hidden_states=True).hidden_states[-1][0, -1].sum().sign()
        )
    [row] = answer(model, words, [(4, 5)], new_tokens=6)
    assert row == Row((4, 5, words.eos_token_id), 2)


@torch.no_grad()
def test_teachers_are_the_models_own_distributions() -> None:
    model, data = tiny_model(), rows()
    for row, teacher in zip(data, teachers(model, data, full_vocabulary=4096, top_k=8), strict=True):
        torch.testing.assert_close(teacher.log_probs, slow_log_probs(model, row), rtol=1e-4, atol=1e-5)
