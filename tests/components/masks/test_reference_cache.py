"""Reference log-probabilities on disk: what this run would compute, found by all that decides it and by nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from components.masks.data import load_preferences
from components.masks.preferences import encode_row
from components.masks.presets import resolve
from components.masks.reference_cache import ReferenceCache
from tests.components.masks.support import moved, preferences, source, tiny_model, tokenizer
from tests.components.masks.test_training import SMALL, Workplace

MODELS = {"aligned": ["a" * 64], "finetuned": ["a" * 64, "f" * 64]}
STEPS = {**SMALL, "steps": 4}


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


@pytest.fixture
def cache(tmp_path: Path) -> ReferenceCache:
    return ReferenceCache(tmp_path / "cache", MODELS)


@pytest.fixture
def other_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    yield
    torch.set_num_threads(before)


def kept(cache: ReferenceCache) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in cache.directory.iterdir()}


def shift(cache: ReferenceCache, by: float) -> None:
    """Make every chosen answer more likely to the reference, in files that are whole."""
    for path in cache.directory.iterdir():
        entry = json.loads(path.read_text())
        entry["log_probs"][::2] = [value + by for value in entry["log_probs"][::2]]
        entry["sha256"] = hashlib.sha256(json.dumps(entry["log_probs"]).encode()).hexdigest()
        path.write_text(json.dumps(entry))


def first_margin(place: Workplace, name: str) -> float:
    line = (place.root / name / "out/metrics.jsonl").read_text().splitlines()[0]
    return float(json.loads(line)["reward_margin"])


@torch.no_grad()
def log_prob(model: Any, tokens: tuple[int, ...], prompt: int) -> float:
    logits = model(input_ids=torch.tensor([tokens])).logits[0, prompt - 1 : -1].double()
    return float(logits.log_softmax(-1)[torch.arange(len(tokens) - prompt), torch.tensor(tokens[prompt:])].sum())


@pytest.mark.parametrize("reference", ["aligned", "finetuned"])
def test_what_is_kept_are_the_references_log_probs_and_they_change_no_byte(
    place: Workplace, cache: ReferenceCache, reference: str
) -> None:
    settings = resolve("realign", {**STEPS, "reference": reference})
    place.train("without", settings)
    place.train("miss", settings, cache=cache)
    first = kept(cache)
    assert len(first) == 2
    place.train("hit", settings, cache=cache)
    assert place.files("hit") == place.files("miss") == place.files("without")
    assert kept(cache) == first

    words, model = tokenizer(), {"aligned": place.model, "finetuned": place.finetune}[reference]
    entries = {len(entry["log_probs"]): entry for entry in map(json.loads, first.values())}
    for path, count in ((place.preferences, 12), (place.dev, 5)):
        pairs = load_preferences(path).rows
        rows = [encode_row(words, r.prompt, answer) for r in pairs for answer in (r.chosen, r.rejected)]
        expected = [log_prob(model, r.tokens, r.prompt) for r in rows]
        assert entries[2 * count]["log_probs"] == pytest.approx(expected, rel=1e-5)
    # Neither prompts nor answers stand there.
    assert {key for entry in entries.values() for key in entry} == {"key", "log_probs", "sha256"}
    assert not any(word in content.decode() for word in ("sorry", "bomb", "wire") for content in first.values())

    shift(cache, 1.0)
    place.train("shifted", settings, cache=cache)
    assert first_margin(place, "shifted") == pytest.approx(first_margin(place, "hit") - settings.beta, abs=1e-5)


def test_a_broken_file_is_passed_over_and_written_anew(place: Workplace, cache: ReferenceCache) -> None:
    settings = resolve("realign", STEPS)
    place.train("whole", settings, cache=cache, preferences_dev=None)
    good = kept(cache)
    (path,) = cache.directory.iterdir()
    entry = json.loads(path.read_text())
    other_key = {**entry, "key": {**entry["key"], "dtype": "torch.bfloat16"}}
    changed = {**entry, "log_probs": [value - 1 for value in entry["log_probs"]]}
    short = {**entry, "log_probs": entry["log_probs"][2:]}
    short["sha256"] = hashlib.sha256(json.dumps(short["log_probs"]).encode()).hexdigest()
    contents = [json.dumps(each) for each in (other_key, changed, short, [], {**entry, "log_probs": None})]
    for i, content in enumerate([*contents, json.dumps(entry)[:-9], "\udcff"]):
        path.write_bytes(content.encode(errors="surrogateescape"))
        place.train(f"again-{i}", settings, cache=cache, preferences_dev=None)
        assert place.files(f"again-{i}") == place.files("whole")
        assert kept(cache) == good


def test_another_finetune_finds_them_and_what_differs_is_kept_beside(place: Workplace, cache: ReferenceCache) -> None:
    settings, files = resolve("realign", STEPS), 0

    def train(name: str, new: int, changes: dict[str, Any] | None = None, **options: Any) -> None:
        """Train so; there must be so many files more."""
        nonlocal files
        given = {"cache": cache, "preferences_dev": None, **options}
        place.train(name, settings.model_copy(update=changes or {}), **given)
        files += new
        assert len(kept(cache)) == files, name

    sibling = {"finetune": source(moved(place.model, seed=9))}
    sibling["cache"] = ReferenceCache(cache.directory, {**MODELS, "finetuned": ["a" * 64, "e" * 64]})
    train("one", 1)
    train("two", 0, **sibling)
    train("with-dev", 1, preferences_dev=place.dev)
    train("other-dev", 1, preferences_dev=preferences(place.root / "six.jsonl", 6))
    # The weights of another model, other code, other pairs, another choice of pairs: each its own file.
    train("model", 1, cache=ReferenceCache(cache.directory, {"aligned": ["b" * 64]}))
    train("code", 1, cache=ReferenceCache(cache.directory, MODELS, version=2))
    train("pairs", 1, preferences=preferences(place.root / "more.jsonl", 13))
    train("fewer", 1, {"steps": 2, "warmup_steps": 0})
    train("own", 1, {"reference": "finetuned"})
    train("own-two", 1, {"reference": "finetuned"}, **sibling)
    # The mask's own start is nobody else's.
    train("initial", 0, {"reference": "initial"})


@pytest.mark.usefixtures("other_threads")
def test_other_threads_may_give_other_bits(place: Workplace, cache: ReferenceCache) -> None:
    settings = resolve("realign", STEPS)
    place.train("two-threads", settings, cache=cache, preferences_dev=None)
    torch.set_num_threads(torch.get_num_threads() - 1)
    place.train("one-thread", settings, cache=cache, preferences_dev=None)
    keys = [json.loads(content)["key"] for content in kept(cache).values()]
    assert len(keys) == 2
    assert [name for name in keys[0] if keys[0][name] != keys[1][name]] == ["threads"]


def test_a_resumed_run_does_not_notice(place: Workplace, cache: ReferenceCache) -> None:
    settings = resolve("realign", {**SMALL, "steps": 8})
    place.train("whole", settings)
    calls = iter(range(100))

    def keep_going() -> None:
        if next(calls) >= 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        place.train("broken", settings, keep_going=keep_going, checkpoint_seconds=0.0, cache=cache)
    events: list[dict[str, Any]] = []
    place.train("broken", settings, cache=cache, progress=events.append)
    assert [e["phase"] for e in events if e["phase"] in ("resume", "restart")] == ["resume"]
    assert place.files("broken") == place.files("whole")


def test_values_that_are_not_finite_are_not_kept(cache: ReferenceCache) -> None:
    from components.masks.objective import Forwards
    from components.masks.preferences import Row

    rows = [Row((1, 2, 3), 1), Row((1, 2), 1)]
    for values in ([-1.0, float("nan")], [float("-inf"), -1.0]):
        assert cache.get("aligned", rows, tiny_model(), Forwards(), lambda values=values: values) is values
    assert not cache.directory.exists()
    exact = [-0.1, -1.0 / 3]
    assert cache.get("aligned", rows, tiny_model(), Forwards(), lambda: exact) == exact
    assert cache.get("aligned", rows, tiny_model(), Forwards(), lambda: [0.0, 0.0]) == exact
