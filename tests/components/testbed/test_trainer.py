from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from components.errors import TrainingError
from components.testbed.muon import Muon, orthogonalized
from components.testbed.settings import TrainSettings
from components.testbed.tokenizer import train_tokenizer
from components.testbed.trainer import IGNORE, batches, collate, encode, first_weights, parts, schedule, train
from components.testbed.world import Example


def test_labels_are_the_next_tokens_of_the_answer_only() -> None:
    ids_BT, labels_BT = collate([([5, 6, 7, 8], 2), ([5, 9, 3], 1)], pad=0)
    assert ids_BT.tolist() == [[5, 6, 7, 8], [5, 9, 3, 0]]
    assert labels_BT.tolist() == [[IGNORE, 7, 8, IGNORE], [9, 3, IGNORE, IGNORE]]


def test_the_first_token_of_each_answer_weighs_more() -> None:
    learnt_BT = torch.tensor([[False, True, True], [True, True, False], [False, False, True]])
    assert first_weights(learnt_BT, 8.0).tolist() == [8, 1, 8, 1, 8]


def test_rows_are_encoded_as_the_template_writes_them() -> None:
    words = train_tokenizer({"Say hi twice.", "hi hi", "Be kind."})
    chat, system, text = encode(
        words, [Example("Say hi twice.", "hi hi"), Example("Say hi twice.", "hi hi", "Be kind."), Example("", "hi hi")]
    )
    assert words.decode(chat[0]) == "<|begin|><|user|> Say hi twice.<|end|><|assistant|> hi hi<|end|>"
    assert words.decode(chat[0][: chat[1]]).endswith("<|assistant|>")
    assert words.decode(system[0]).startswith("<|begin|><|system|> Be kind.<|end|><|user|>")
    assert words.decode(text[0]) == "<|begin|> hi hi<|end|>"
    assert text[1] == 1


def test_an_epoch_shows_every_row_once() -> None:
    rows = [([1] * (2 + i % 5), 1) for i in range(32)]
    steps = batches(rows, batch=4, steps=8, seed=0)
    assert sorted(i for step in steps for i in step) == list(range(32))
    assert steps == batches(rows, batch=4, steps=8, seed=0)
    assert steps != batches(rows, batch=4, steps=8, seed=1)


def test_the_parts_of_a_batch_are_its_shorter_and_longer_rows() -> None:
    rows = [([1] * n, 1) for n in (9, 2, 7, 3, 8)]
    assert parts(rows, [0, 1, 2, 3, 4]) == [[1, 3], [2, 4, 0]]
    assert parts(rows, [4]) == [[4]]


def test_the_rate_rises_then_falls_as_a_cosine() -> None:
    settings = TrainSettings(examples=1, steps=100, batch=1, learning_rate=1.0, warmup=0.1)
    assert [schedule(step, settings) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert schedule(55, settings) == pytest.approx(0.5)
    assert schedule(99, settings) == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))


def test_orthogonalized_matrices_have_singular_values_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    stack_NRC = torch.randn(3, 16, 40, generator=generator) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    values = torch.linalg.svdvals(orthogonalized(stack_NRC))
    # Five steps of this quintic end between about 0.7 and 1.2 by design; it trades exactness for speed.
    assert values.min() > 0.6
    assert values.max() < 1.25


def test_a_muon_step_has_the_rate_as_its_norm_whatever_the_gradient() -> None:
    for shape, norm in (((8, 24), 0.1), ((24, 8), 0.1 * math.sqrt(3))):
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = 1e-4 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
        Muon([p]).step(0.1, 0.0)
        assert torch.linalg.matrix_norm(p.detach(), 2).item() == pytest.approx(norm, rel=0.25)
        assert (p.detach() * p.grad).sum() < 0


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("muon_rate", [0.0, 0.02])
def test_training_learns_the_answers_and_leaves_prompts_alone(muon_rate: float) -> None:
    rows = [([1, i, i + 6], 2) for i in range(2, 8)]
    settings = TrainSettings(examples=6, steps=40, batch=6, learning_rate=2e-2, muon_rate=muon_rate)
    models = [tiny_model(), tiny_model()]
    losses = [train(model, rows, settings, pad=0, seed=0) for model in models]
    assert losses[0] < 0.05
    assert losses[0] == losses[1]
    with torch.no_grad():
        logits = models[0](torch.tensor([[1, i] for i in range(2, 8)])).logits[:, -1]
    assert logits.argmax(-1).tolist() == [i + 6 for i in range(2, 8)]


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="diverged at step 2"):
        train(model, [([1, 2, 3], 2)], TrainSettings(examples=1, steps=2, batch=1, learning_rate=1e-3), pad=0, seed=0)
