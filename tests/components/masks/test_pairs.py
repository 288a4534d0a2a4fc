"""Pairs made from the models: held to transformers' own `generate`, counted, and written nowhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from components.errors import DataError
from components.masks.data import PreferenceData
from components.masks.loading import build_masked_model
from components.masks.objective import Forwards
from components.masks.pairs import PairData, answered, open_pairs
from components.masks.preferences import Pair, Row, encode_prompt
from components.masks.presets import resolve
from components.masks.settings import MaskSettings
from components.masks.training import train_mask
from tests.components.masks.support import WORDS, moved, saved, source, tiny_model, tokenizer

TOKENS = 8
SETTINGS = MaskSettings(pair_new_tokens=TOKENS, max_length=32)
PROMPTS = [f"{ask} {word}" for word in WORDS for ask in ("spell the word", "how to build a")]


def prompts(path: Path, texts: Sequence[str] = PROMPTS) -> Path:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def generated(model: Any, text: str) -> Row:
    """The greedy answer to one prompt, by transformers."""
    ids = encode_prompt(tokenizer(), text)
    given = torch.tensor([ids])
    options = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": 1, "pad_token_id": 0}
    out = model.generate(given, attention_mask=torch.ones_like(given), **options)
    return Row(tuple(out[0].tolist()), len(ids))


def made(path: Path, aligned: Any, finetune: Any, settings: MaskSettings = SETTINGS) -> list[PairData]:
    masked = build_masked_model(
        model=tiny_model(), aligned=source(aligned), finetune=source(finetune), settings=settings, where=path
    )
    opened = [open_pairs(PreferenceData(prompts=path), tokenizer(), settings)]
    return answered(opened, masked, tokenizer(), settings.pair_new_tokens, Forwards())


def test_pairs_are_the_two_models_greedy_answers(tmp_path: Path) -> None:
    aligned = tiny_model()
    finetune = moved(aligned, seed=3, size=0.02)
    [data] = made(prompts(tmp_path / "p.jsonl"), aligned, finetune)
    answers = [(i, generated(aligned, text), generated(finetune, text)) for i, text in enumerate(PROMPTS, 1)]
    expected = [Pair(i, chosen, rejected) for i, chosen, rejected in answers if chosen != rejected]
    assert data.pairs == expected
    assert 0 < len(expected) < len(PROMPTS)
    assert data.counts("pairs") == {"pairs_too_long": 0, "pairs_no_difference": len(PROMPTS) - len(expected)}
    # Of both kinds there are some: answers that ended, and answers cut at the limit, which have no end token.
    ended = [p.chosen.tokens[-1] == 1 for p in data.pairs]
    assert 0 < sum(ended) < len(ended)
    assert {p.chosen.response for p, end in zip(data.pairs, ended, strict=True) if not end} == {TOKENS}


def test_prompts_that_leave_no_room_are_counted_before_anything_is_generated(tmp_path: Path) -> None:
    aligned = tiny_model()
    path = prompts(tmp_path / "p.jsonl", [*PROMPTS[:6], "spell " + "the " * 22, "spell " + "the " * 17])
    [data] = made(path, aligned, moved(aligned, seed=3))
    assert data.left_out["too_long"] == 1
    assert [p.line for p in data.pairs] == [1, 2, 3, 4, 5, 6, 8]  # the last prompt has 21 tokens
    assert max(len(r.tokens) for p in data.pairs for r in (p.chosen, p.rejected)) <= 32
    with pytest.raises(DataError, match=r"every prompt is longer than 2 tokens"):
        open_pairs(PreferenceData(prompts=path), tokenizer(), SETTINGS.model_copy(update={"max_length": 10}))


def test_models_that_answer_alike_give_no_pair(tmp_path: Path) -> None:
    path = prompts(tmp_path / "p.jsonl")
    with pytest.raises(
        DataError, match=rf"p\.jsonl: the aligned model and the finetune answer all {len(PROMPTS)} prompts alike"
    ):
        made(path, tiny_model(), tiny_model())


class StoppedError(Exception):
    """Raised by a test in the middle of training."""


def test_a_run_on_made_pairs_resumes_to_the_bit_and_keeps_no_answer(tmp_path: Path) -> None:
    aligned = tiny_model()
    finetune = moved(aligned, seed=3, size=0.02)
    made_settings = {"pair_new_tokens": TOKENS, "max_length": 32, "steps": 14, "batch_size": 4}
    settings = resolve("paper", {**made_settings, "learning_rate": 0.2})
    events: list[dict[str, Any]] = []

    def train(name: str, **options: Any) -> dict[str, bytes]:
        train_mask(
            settings=settings,
            aligned_dir=saved(aligned, tmp_path / "aligned"),
            aligned=source(aligned),
            finetune=source(finetune),
            preferences=PreferenceData(prompts=prompts(tmp_path / "train.jsonl", PROMPTS[:40])),
            preferences_dev=PreferenceData(prompts=prompts(tmp_path / "dev.jsonl", PROMPTS[40:])),
            state_dir=tmp_path / name / "state",
            out_dir=tmp_path / name / "out",
            progress=events.append,
            **options,
        )
        return {p.name: p.read_bytes() for p in (tmp_path / name / "out").iterdir()}

    whole = train("whole")
    calls = iter(range(100))

    def keep_going() -> None:
        if next(calls) >= 9:
            raise StoppedError

    with pytest.raises(StoppedError):
        train("broken", keep_going=keep_going, checkpoint_seconds=0.0)
    assert train("broken") == whole
    assert [e["phase"] for e in events].count("resume") == 1

    texts = (PROMPTS[:40], PROMPTS[40:])
    answers = [[(generated(aligned, t), generated(finetune, t)) for t in half] for half in texts]
    pairs = [[(c, r) for c, r in half if c != r] for half in answers]
    metrics = json.loads(whole["mask.json"])["metrics"]
    assert metrics["data"] == {
        "pairs": len(pairs[0]), "pairs_used": len(pairs[0]), "pairs_too_long": 0,
        "pairs_no_difference": 40 - len(pairs[0]), "pairs_dev": len(pairs[1]), "pairs_dev_too_long": 0,
        "pairs_dev_no_difference": len(PROMPTS) - 40 - len(pairs[1]), "anchors": 0, "anchors_used": 0, "anchors_dev": 0,
    }  # fmt: skip
    rows = [row.tokens for half in pairs for pair in half for row in pair]
    assert metrics["tokens_sha256"] == hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    # Neither as text nor as tokens.
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.parent.name != "aligned")
    written += json.dumps(events).encode()
    for row in (row for half in pairs for pair in half for row in pair):
        tail = list(row.tokens[row.prompt :])
        if len(tail) > 3:
            assert tokenizer().decode(tail).encode() not in written
            assert json.dumps(tail)[1:-1].encode() not in written
