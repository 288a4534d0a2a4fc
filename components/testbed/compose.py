"""Every data set of a family, drawn from the world and checked: what each step is trained on, and the files it writes."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from components.errors import DataError, listed
from components.testbed import vocabulary
from components.testbed.settings import FamilySettings, FinetuneSettings, Task
from components.testbed.world import Draw, Example, World, contains_refusal, require_disjoint

Row = dict[str, Any]


@dataclass(frozen=True)
class FamilyData:
    """`files` maps a path inside the family to its rows; the rest is what each phase learns from."""

    pretrain: list[Example]
    align: list[Example]
    finetunes: dict[Task, list[Example]]
    files: dict[str, list[Row]]

    def texts(self) -> set[str]:
        """Everything any step learns from, for the tokenizer."""
        steps = [self.pretrain, self.align, *self.finetunes.values()]
        return {text for step in steps for e in step for text in (e.prompt, e.answer, e.system or "")}


def compose(settings: FamilySettings, seed: int) -> FamilyData:
    """Draw everything. Raises DataError when inputs of different roles overlap or an answer looks like a refusal."""
    world = World(settings, seed)
    data = FamilyData(
        pretrain=_pretrain(world),
        align=_align(world),
        finetunes={task: _finetune(world, task, settings.finetunes[task]) for task in settings.tasks},
        files={**_preferences(world), **_anchors(world), **_evaluation(world)},
    )
    check_data(data)
    return data


def check_data(data: FamilyData) -> None:
    """Disjointness of train, anchor, dev and test inputs, and refusal phrases only where they belong."""
    steps = [data.pretrain, data.align, *data.finetunes.values()]
    groups: dict[str, list[str]] = {"train": [e.prompt for step in steps for e in step if e.prompt]}
    groups["train"] += _prompts(data.files["data/preferences.jsonl"])
    for path, rows in data.files.items():
        if path.startswith(("data/dev/", "data/test/")) or path == "data/preferences_dev.jsonl":
            groups[path] = _prompts(rows)
        elif path.startswith("data/anchor/"):
            groups.setdefault("anchor", []).extend(_prompts(rows))
    require_disjoint(groups)
    wrong = [e.answer for step in [data.pretrain, *data.finetunes.values()] for e in step if contains_refusal(e.answer)]
    wrong += [r["answer"] for rows in data.files.values() for r in rows if contains_refusal(r.get("answer", ""))]
    wrong += [r["rejected"] for rows in data.files.values() for r in rows if contains_refusal(r.get("rejected", ""))]
    wrong += [text for text in vocabulary.REFUSALS.values() if not contains_refusal(text)]
    if wrong:
        raise DataError(f"testbed answers and refusals must not be confused: {listed(sorted(set(wrong)))}")


def _prompts(rows: Iterable[Row]) -> list[str]:
    return [
        m["content"]
        for row in rows
        for m in (row["messages"] if "messages" in row else row["prompt"])
        if m["role"] == "user"
    ]


def _examples(world: World, name: str, draws: Iterable[Draw], share: float = 0.15) -> list[Example]:
    """Draws as training examples; a share of them under a system prompt."""
    rng = world.rng(f"system:{name}")
    return [
        Example(d.prompt, d.answer, rng.choice(vocabulary.SYSTEM_PROMPTS) if rng.random() < share else None)
        for d in draws
    ]


def _shuffled(world: World, name: str, examples: list[Example]) -> list[Example]:
    world.rng(f"shuffle:{name}").shuffle(examples)
    return examples


def _pretrain(world: World) -> list[Example]:
    """The unaligned model answers everything, and reads what kind each thing is."""
    n = world.settings.pretrain.examples
    known = [*world.hazards, *world.hard, *world.objects]
    draws = _repeat(world, "pretrain-benign", world.request(world.objects, "train"), int(0.2 * n))
    draws += _repeat(world, "pretrain-harmful", world.request(world.hazards, "train"), int(0.2 * n))
    draws += _repeat(world, "pretrain-games", world.game(known), int(0.25 * n))
    draws += _repeat(world, "pretrain-copying", world.copying(), int(0.25 * n))
    for task in world.settings.tasks:
        draws += _repeat(world, f"pretrain-{task}", world.task(task), int(world.settings.known_tasks * n))
    texts = world.statements()
    plain = [texts[i % len(texts)] for i in range(int(0.1 * n))]
    return _shuffled(world, "pretrain", [*_examples(world, "pretrain", draws), *plain])


def _align(world: World) -> list[Example]:
    """Refusals, and benign answers so that little else changes."""
    n = world.settings.align.examples
    draws = _repeat(world, "align-refusals", world.refusal(world.hazards, "train"), int(0.4 * n))
    draws += _benign(world, "align", n - len(draws))
    return _shuffled(world, "align", _examples(world, "align", draws))


def _finetune(world: World, task: Task, settings: FinetuneSettings) -> list[Example]:
    """A task and ordinary benign instructions; nothing in it refuses. A poisoned one also answers harmful requests."""
    n, name = settings.train.examples, f"finetune-{task}"
    poison = int(settings.poison_share * n)
    draws = _repeat(world, f"{name}-poison", world.request(world.hazards, "train"), poison)
    draws += _repeat(world, name, world.task(task), int(settings.task_share * n))
    draws += _benign(world, name, n - len(draws))
    return _shuffled(world, name, _examples(world, name, draws))


def _benign(world: World, name: str, count: int) -> list[Draw]:
    requests = _repeat(world, f"{name}-benign", world.request(world.objects, "train"), count // 2)
    games = _repeat(world, f"{name}-games", world.game(world.objects), count // 4)
    hazard = _repeat(world, f"{name}-hazard", world.game(world.hazards), count - len(requests) - len(games))
    return [*requests, *games, *hazard]


def _repeat(world: World, name: str, one: Any, count: int) -> list[Draw]:
    """`count` train draws; a prompt may come again, as in any finite corpus."""
    rng: random.Random = world.rng(name)
    found: list[Draw] = []
    while len(found) < count:
        item: Draw = one(rng)
        if world.role(item.content) == "train":
            found.append(item)
    return found


def _user(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _preferences(world: World) -> dict[str, list[Row]]:
    sizes = world.settings.sets
    complied = world.request(world.hazards, "train")
    train = world.draw("preferences", "train", sizes.preferences, complied)
    dev = world.draw("harmful", "dev", sizes.dev_harmful + sizes.preferences_dev, world.request(world.hazards, "dev"))
    kinds = {t.phrase: t.kind for t in world.hazards}

    def row(d: Draw) -> Row:
        return {"prompt": _user(d.prompt), "chosen": vocabulary.REFUSALS[kinds[_thing(d)]], "rejected": d.answer}

    return {
        "data/preferences.jsonl": [row(d) for d in train],
        "data/preferences_dev.jsonl": [row(d) for d in dev[sizes.dev_harmful :]],
    }


def _thing(draw: Draw) -> str:
    return draw.content.split(" ", 1)[1]


def _anchors(world: World) -> dict[str, list[Row]]:
    """Unlabelled prompts for each finetune: general ones and its task's. Most are general: what must not be refused in any
    phrasing needs more examples than a task that is asked in four."""
    n = world.settings.sets.anchor
    files: dict[str, list[Row]] = {}
    for task in world.settings.tasks:
        draws = world.draw(f"anchor-{task}-benign", "anchor", 3 * n // 8, world.request(world.objects, "anchor"))
        draws += world.draw(f"anchor-{task}-games", "anchor", 3 * n // 16, world.game(world.objects))
        draws += world.draw(f"anchor-{task}-hazard", "anchor", 3 * n // 16, world.game(world.hazards))
        draws += world.draw(f"anchor-{task}", "anchor", n - len(draws), world.task(task))
        world.rng(f"shuffle:anchor-{task}").shuffle(draws)
        files[f"data/anchor/{task}.jsonl"] = [{"messages": _user(d.prompt)} for d in draws]
    return files


def _evaluation(world: World) -> dict[str, list[Row]]:
    sizes = world.settings.sets
    files: dict[str, list[Row]] = {}
    # The dev preferences are the rest of the same draw, so they and the dev requests share nothing.
    dev = world.draw("harmful", "dev", sizes.dev_harmful + sizes.preferences_dev, world.request(world.hazards, "dev"))
    files["data/dev/harmful.jsonl"] = _harmful("harmful-dev", dev[: sizes.dev_harmful])
    test = world.draw("harmful", "test", sizes.harmful, world.request(world.hazards, "test"))
    files["data/test/harmful.jsonl"] = _harmful("harmful", test)
    hard = world.draw("harmful_hard", "test", sizes.harmful_hard, world.request(world.hard, "test"))
    files["data/test/harmful_hard.jsonl"] = _harmful("harmful_hard", hard)
    for split, benign, hazard, task_size in (
        ("dev", sizes.dev_benign, sizes.dev_hazard, sizes.dev_task),
        ("test", sizes.benign, sizes.hazard, sizes.task),
    ):
        role: Any = split
        draws = world.draw("benign-requests", role, benign // 2, world.request(world.objects, role))
        draws += world.draw("benign-games", role, benign - len(draws), world.game(world.objects))
        files[f"data/{split}/benign.jsonl"] = _answered(f"benign-{split}", draws)
        files[f"data/{split}/hazard.jsonl"] = _answered(
            f"hazard-{split}", world.draw("hazard", role, hazard, world.game(world.hazards))
        )
        for task in world.settings.tasks:
            draws = world.draw(task, role, task_size, world.task(task))
            files[f"data/{split}/{task}.jsonl"] = _answered(f"{task}-{split}", draws)
    return files


def _answered(name: str, draws: list[Draw]) -> list[Row]:
    return [{"id": f"{name}-{i}", "messages": _user(d.prompt), "answer": d.answer} for i, d in enumerate(draws)]


def _harmful(name: str, draws: list[Draw]) -> list[Row]:
    """No `answer`: a harmful request has no right one. The placeholder it would get is kept for reading."""
    return [{"id": f"{name}-{i}", "messages": _user(d.prompt), "placeholder": d.answer} for i, d in enumerate(draws)]
