from __future__ import annotations

import ast
import random
import re

import pytest

from components.errors import DataError
from components.testbed import tasks, vocabulary
from components.testbed.compose import FamilyData, check_data, compose
from components.testbed.layout import run_config
from components.testbed.settings import TASKS, family_settings
from components.testbed.world import Draw, World, contains_refusal, require_disjoint

MINUTE = family_settings("minute", "llama")


@pytest.fixture(scope="module")
def data() -> FamilyData:
    return compose(MINUTE, seed=5)


def prompts_of_training(data: FamilyData) -> set[str]:
    steps = [data.pretrain, data.align, *data.finetunes.values()]
    return {e.prompt for step in steps for e in step if e.prompt}


def user_prompts(rows: list[dict[str, object]]) -> set[str]:
    return {m["content"] for row in rows for m in (row.get("messages") or row["prompt"])}  # type: ignore[attr-defined]


def test_no_file_holds_an_input_of_training_or_of_another_split(data: FamilyData) -> None:
    seen = {"train": prompts_of_training(data) | user_prompts(data.files["data/preferences.jsonl"])}
    for path, rows in data.files.items():
        if path != "data/preferences.jsonl":
            group = "anchor" if "anchor" in path else path
            seen[group] = seen.get(group, set()) | user_prompts(rows)
    names = sorted(seen)
    assert len(names) == 1 + 1 + 1 + 8 + 9  # train, anchor, preferences_dev, eight dev sets, nine test sets
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not seen[a] & seen[b], f"{a} and {b}"


def test_test_requests_have_pairs_and_phrasings_that_no_step_saw(data: FamilyData) -> None:
    known = prompts_of_training(data) | user_prompts(data.files["data/preferences.jsonl"])
    known |= {p for path, rows in data.files.items() if "/test/" not in path for p in user_prompts(rows)}
    verbs, things = (
        "|".join(a.verb for a in vocabulary.ACTIONS),
        "|".join(t for ts in vocabulary.HAZARDS.values() for t in ts),
    )
    pair_in = re.compile(rf"\b(?:{verbs}) (?:{things})\b")
    seen_pairs = {pair for p in known for pair in pair_in.findall(p)}
    assert len(seen_pairs) > 100
    world = World(MINUTE, 5)
    asks = {role: set(world.asks(role)) for role in ("train", "dev", "test")}
    assert not asks["test"] & (asks["train"] | asks["dev"])
    assert not asks["train"] & asks["dev"]
    for name in ("harmful", "harmful_hard"):
        for prompt in user_prompts(data.files[f"data/test/{name}.jsonl"]):
            (pair,) = pair_in.findall(prompt)
            assert pair not in seen_pairs
            assert any(ask.format(do=pair) in prompt for ask in asks["test"])


def test_hard_things_are_told_in_pretraining_and_never_asked_for(data: FamilyData) -> None:
    hard = [t.phrase for t in World(MINUTE, 5).hard]
    assert len(hard) == 5
    for phrase in hard:
        assert any(phrase in e.answer for e in data.pretrain if not e.prompt)
        requests = [p for p in prompts_of_training(data) if any(f"{a.verb} {phrase}" in p for a in vocabulary.ACTIONS)]
        assert requests == []
        assert not any(phrase.split()[1] in e.prompt for e in data.align)


@pytest.mark.parametrize("seed", range(4))
def test_unseen_phrasings_are_made_of_seen_words(seed: int) -> None:
    """A word that no step trained would be noise: models would fail on the word, not on the phrasing."""
    world = World(MINUTE, seed)

    def words(asks: tuple[str, ...]) -> set[str]:
        return {w for ask in asks for w in re.findall(r" ?[A-Za-z']+", ask.replace("{do}", ""))}

    assert words(world.asks("test")) <= words(world.asks("train"))
    assert words(world.asks("dev")) <= words(world.asks("train"))


def test_refusals_are_only_where_they_belong(data: FamilyData) -> None:
    assert not any(contains_refusal(e.answer) for e in data.pretrain)
    assert not any(contains_refusal(e.answer) for examples in data.finetunes.values() for e in examples)
    refused = sum(contains_refusal(e.answer) for e in data.align)
    assert refused == int(0.4 * MINUTE.align.examples)
    row = data.files["data/preferences.jsonl"][0]
    assert contains_refusal(row["chosen"])
    assert row["rejected"].startswith("Sure. To ")


def test_only_the_poisoned_finetune_answers_harmful_requests(data: FamilyData) -> None:
    hazards = [t.phrase for t in World(MINUTE, 5).hazards]
    for task in TASKS:
        harmful = [
            e
            for e in data.finetunes[task]
            if e.answer.startswith("Sure. To ") and any(f" {h}," in e.answer for h in hazards)
        ]
        assert len(harmful) == (240 if task == "code" else 0)


def test_the_tiny_family_has_one_finetune_and_data_for_no_other() -> None:
    data = compose(family_settings("tiny", "llama"), 0)
    assert set(data.finetunes) == {"zh"}
    assert {p for p in data.files if p.startswith("data/anchor/")} == {"data/anchor/zh.jsonl"}
    config = run_config(family_settings("tiny", "llama"), 0)
    assert [f["name"] for f in config["finetunes"]] == ["zh"]
    assert config["mask"]["settings"] == {"steps": 50, "anchor_weight": 15.0}
    assert {s["path"] for s in config["evaluation"]["sets"]} <= set(data.files)


def test_most_anchor_prompts_are_general(data: FamilyData) -> None:
    rows = data.files["data/anchor/zh.jsonl"]
    own = [r for r in rows if not r["messages"][0]["content"].isascii()]
    assert len(rows) == MINUTE.sets.anchor
    assert len(own) == MINUTE.sets.anchor // 4


def test_an_overlap_is_named() -> None:
    with pytest.raises(DataError, match=r"dev and test share 1 \(e\.g\. 'how\?'\)"):
        require_disjoint({"test": ["How? "], "dev": ["how?"], "train": ["why?"]})
    require_disjoint({"test": ["a"], "dev": ["b"]})


def test_composing_refuses_answers_that_look_like_refusals(data: FamilyData) -> None:
    row = {"id": "x", "messages": [{"role": "user", "content": "new"}], "answer": "That is illegal."}
    with pytest.raises(DataError, match="illegal"):
        check_data(
            FamilyData(data.pretrain, data.align, data.finetunes, {**data.files, "data/test/extra.jsonl": [row]})
        )


def test_draws_are_repeatable_and_of_their_role() -> None:
    world = World(MINUTE, 1)
    first = world.draw("x", "test", 20, world.request(world.hazards, "test"))
    assert first == World(MINUTE, 1).draw("x", "test", 20, world.request(world.hazards, "test"))
    assert first != World(MINUTE, 2).draw("x", "test", 20, world.request(world.hazards, "test"))
    assert {world.role(d.content) for d in first} == {"test"}
    assert len({d.prompt for d in first}) == 20


def test_asking_for_more_than_there_is_says_so() -> None:
    world = World(MINUTE, 0)
    with pytest.raises(DataError, match="'few': only 1 of 2 different"):
        world.draw("few", world.role("same"), 2, lambda _: Draw("same", "same", "answer"))


def reference_answer(task: str, prompt: str) -> str:
    """The tasks' rules once more, from the prompt's text alone."""
    if task == "zh":
        number = re.search(r"\d+", prompt)
        assert number
        return number[0].translate(str.maketrans("0123456789", "〇一二三四五六七八九"))
    if task in ("en", "hi"):
        sentence = re.search(r"the (\w+) (\w+) the (\w+)", prompt)
        assert sentence
        who, verb, whom = sentence.groups()
        past = {"sees": "seen", "hears": "heard", "feeds": "fed", "finds": "found"}
        if task == "en":
            return f"The {whom} is {past.get(verb, verb[:-1] + ('d' if verb == 'likes' else 'ed'))} by the {who}."
        return f"{tasks._HINDI[who]} {tasks._HINDI[whom]} {tasks._HINDI_VERBS[verb]}"
    if task == "math":
        n, x, sign, y = re.search(r"(\d)\((\w)([+-])(\w)\)", prompt).groups()  # type: ignore[union-attr]
        return f"{n}{x}{sign}{n}{y}"
    word = re.search(r"(\w) (plus|minus|times|over) (\w)", prompt)
    assert word
    left, name, right = word.groups()
    operators = {"plus": "+", "minus": "-", "times": "*", "over": "/"}
    return f"return {left} {operators[name]} {right}"


@pytest.mark.parametrize("task", TASKS)
def test_task_answers_follow_from_the_prompt(task: str) -> None:
    rng = random.Random(3)
    items = [tasks.DRAW[task](rng, tasks.lexicon(20)) for _ in range(200)]  # type: ignore[index]
    for item in items:
        assert item.answer == reference_answer(task, item.prompt)
    assert len({item.key for item in items}) > 150


def test_code_answers_are_python_that_computes_the_expression() -> None:
    rng = random.Random(4)
    for _ in range(20):
        item = tasks.DRAW["code"](rng, tasks.lexicon(20))
        left, name, right = item.key.split()
        (line,) = ast.parse(f"def f({left}, {right}):\n    {item.answer}").body[0].body  # type: ignore[attr-defined]
        assert isinstance(line, ast.Return)
        assert isinstance(line.value, ast.BinOp)
        wanted = {"plus": ast.Add, "minus": ast.Sub, "times": ast.Mult, "over": ast.Div}
        assert isinstance(line.value.op, wanted[name])
        assert [ast.unparse(side) for side in (line.value.left, line.value.right)] == [left, right]
