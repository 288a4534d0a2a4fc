"""Prompt sets from a run config to rates: what identifies a set of the hub, what a changed one stops, groups on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
import yaml

from components.errors import ConfigError, DataError
from components.evaluation.metrics import mcnemar, wilson
from components.evaluation.outcomes import rates_of
from components.evaluation.prompts import load_prompt_set
from components.evaluation.settings import SetSettings
from pipelines.config import load_config
from pipelines.evaluate_command import evaluate_command, load_evaluate_config
from pipelines.evaluate_text import group_lines
from pipelines.evaluated_models import Runtime
from pipelines.graph import expand
from pipelines.roots import find_roots
from pipelines.sets_command import sets_lines
from pipelines.specs import build_spec
from ray_jobs.stage import StageAnswer, StageSpec, run_stage
from tests.components.evaluation import tiny
from tests.components.evaluation.test_groups import outcomes
from tests.components.evaluation.test_known_sets import COMMIT, publish
from tests.pipelines.small import small_config, write_config


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory where datasets are looked for first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def rows_of(config: dict[str, Any], topics: int = 3) -> list[dict[str, Any]]:
    """The config's harmful test prompts in the columns of CatQA, one of them twice."""
    path = next(s["path"] for s in config["evaluation"]["sets"] if s["name"] == "harmful" and s.get("split") != "dev")
    asked = [row["messages"][-1]["content"] for row in map(json.loads, Path(path).read_text().splitlines())][:9]
    columns = [{"Category": f"T{i % topics}", "Subcategory": "x", "Question": one} for i, one in enumerate(asked)]
    return [*columns, columns[0]]


def evaluated(config: dict[str, Any], tmp_path: Path, name: str) -> tuple[StageSpec, StageAnswer]:
    """The aligned model's evaluation, run in this process."""
    (tmp_path / name).mkdir()
    loaded = load_config(write_config(tmp_path / name, config))
    workspace = tmp_path / name / "workspace"
    roots = find_roots(loaded, workspace / ".identities")
    nodes = {node.id: node for node in expand(loaded)}
    load, evaluate = (
        build_spec(nodes[step], config=loaded, roots=roots, parents=parents, workspace=workspace)
        for step, parents in (("load_aligned", {}), ("evaluate_aligned", {}))
    )
    assert run_stage(load)["status"] == "done"
    evaluate = evaluate.model_copy(update={"parents": {"load_aligned": load.reference}})
    evaluate.execution["checkpoints"]["load_aligned"] = {"path": str(loaded.aligned)}
    return evaluate, run_stage(evaluate)


def test_a_set_of_the_hub_in_a_run(tmp_path: Path) -> None:
    config = small_config(tmp_path, finetunes=("zh",))
    config["evaluation"]["sets"] = [
        s for s in config["evaluation"]["sets"] if s["kind"] == "harmful" or s["name"] == "zh"
    ]
    rows = rows_of(config)
    publish(tmp_path, "declare-lab/CategoricalHarmfulQA", {(None, "en"): rows, (None, "zh"): rows[:1]})
    config["evaluation"]["sets"].append({"known": "catqa-en", "revision": COMMIT, "by": "category"})
    spec, answer = evaluated(config, tmp_path, "hub")
    assert answer["status"] == "done", answer
    described = spec.semantics["sets"][-1]
    asked = load_prompt_set(
        SetSettings(
            name="s",
            kind="harmful",
            hub="declare-lab/CategoricalHarmfulQA",
            revision=COMMIT,
            hub_split="en",
            by="Category",
        )
    )
    assert described["sha256"] == asked.sha256
    assert (described["hub"], described["revision"]) == ("declare-lab/CategoricalHarmfulQA", COMMIT)
    assert not {"known", "path"} & described.keys()
    assert spec.execution["sets"][-1] is None

    record = answer["record"]
    sets = record["metrics"]["test"]["sets"]
    assert [(name, one["asr"]["n"]) for name, one in sets.items() if name.startswith("catqa-en")] == [
        ("catqa-en", 10), ("catqa-en/T0", 4), ("catqa-en/T1", 3), ("catqa-en/T2", 3),
    ]  # fmt: skip
    assert record["metrics"]["test"]["asr"]["n"] == sets["harmful"]["asr"]["n"] + 10
    assert record["notes"] == [
        "set catqa-en: 1 of its prompts stand in it more than once (2 rows); every row was asked and counted"
    ]
    answers = Path(spec.workspace) / spec.reference / "test" / "answers" / "catqa-en.jsonl"
    assert [json.loads(line)["group"] for line in answers.read_text().splitlines()] == [r["Category"] for r in rows]

    # Written out, it is the same; of other rows, it is another; and a stage does not take those for the ones it was made for.
    config["evaluation"]["sets"][-1] = {
        "name": "catqa-en", "kind": "harmful", "hub": "declare-lab/CategoricalHarmfulQA", "revision": COMMIT,
        "hub_split": "en", "by": "category",
    }  # fmt: skip
    again, _ = evaluated(config, tmp_path, "written_out")
    assert again.fingerprint == spec.fingerprint
    publish(tmp_path, "declare-lab/CategoricalHarmfulQA", {(None, "en"): rows[:-1]})
    other, answer = evaluated(config, tmp_path, "other")
    assert (answer["status"], answer["record"]["notes"]) == ("done", [])
    assert other.fingerprint != spec.fingerprint
    stale = spec.model_copy(update={"semantics": {**spec.semantics, "seed": 1}})
    answer = run_stage(stale)
    assert answer["status"] == "failed"
    assert "declare-lab/CategoricalHarmfulQA/en/0123456789ab has changed" in answer["error"]["message"]


def test_two_parts_of_one_dataset_are_two_sets(tmp_path: Path) -> None:
    config = small_config(tmp_path, finetunes=("zh",))
    rows = [{"prompt": f"ask {i}", "label": ("safe", "unsafe")[i % 2], "type": "t"} for i in range(5)]
    publish(tmp_path, "walledai/XSTest", {(None, "test"): rows})
    config["evaluation"]["sets"] += [{"known": f"xstest-{half}", "revision": COMMIT} for half in ("safe", "unsafe")]
    loaded = load_config(write_config(tmp_path, config))
    files = find_roots(loaded, tmp_path / ".identities").files
    assert len({files[s.files] for s in loaded.evaluation.sets[-2:]}) == 2


def test_what_is_wrong_with_sets_is_told_with_their_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path, finetunes=("zh",))
    good = list(config["evaluation"]["sets"])
    config["evaluation"]["sets"] = [
        *good, {"known": "catqa"}, {"known": "advbench"}, {"known": "dangerousqa"}, {"known": "advbench", "path": "absent"},
        {"known": "harmfulqa", "revison": COMMIT},
    ]  # fmt: skip
    path = write_config(tmp_path, config)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    text, first = str(caught.value), len(good)
    for number, words in enumerate(
        ("no known set 'catqa'", "walledai/AdvBench has no revision; pin it", "dangerousqa is on no hub", "no file"),
        first,
    ):
        assert any(f"evaluation.sets.{number}" in line and words in line for line in text.splitlines()), text
    assert "revison: unknown key (did you mean 'revision'?)" in text
    lines = path.read_text().splitlines()
    assert "known: catqa" in lines[int(text.splitlines()[0].split(":")[1]) - 1]

    config["evaluation"]["sets"] = [*good, {"known": "advbench", "revision": COMMIT}]
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=rf"walledai/AdvBench at {COMMIT}: cannot be read from the hub"):
        find_roots(load_config(write_config(tmp_path, config)), tmp_path / ".identities")


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_taught_model(tmp_path_factory.mktemp("taught") / "taught")


def test_groups_of_models_side_by_side(taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = {"first": list(tiny.HARMFUL), "second": list(tiny.ANSWERED)}
    tree = {"Illegal Activity": {f"{name}:": prompts for name, prompts in asked.items()}}
    (tmp_path / "catqa.json").write_text(json.dumps(tree))
    sets = [{"known": "catqa-zh", "path": "catqa.json", "by": "topic"}]
    gate = [
        {"metric": "asr", "set": "catqa-zh/first", "at_most": 0.6},
        {"metric": "asr", "set": "catqa-zh", "at_most": 0.99},
    ]
    config = tmp_path / "realign.yaml"
    config.write_text(yaml.safe_dump({"evaluation": {"max_new_tokens": 40, "sets": sets}, "gate": gate}))
    out, places = tmp_path / "out", [f"one={taught}", f"two={taught}"]
    evaluate_command(places, config, out, Runtime(base=None, device="cpu", dtype="float32", batch_size=4))
    told = capsys.readouterr().out
    rates = json.loads((out / "rates.json").read_text())
    counts = {name: one["asr"]["n"] for name, one in rates["one"]["sets"].items()}
    assert counts == {"catqa-zh": 11, "catqa-zh/first": 4, "catqa-zh/second": 7}
    assert (rates["one"]["sets"]["catqa-zh/first"]["asr"]["value"], rates["one"]["asr"]["n"]) == (0.0, 11)
    table = pq.read_table(out / "answers.parquet").to_pylist()
    assert [row["group"] for row in table if row["model"] == "one"] == ["first"] * 4 + ["second"] * 7
    assert "catqa-zh by group, one: asr, harmful\n" in told
    assert "catqa-zh by group, two: asr, harmful, − one (p: McNemar, Holm over 4)" in told
    assert f"+0.0%, p {mcnemar(0, 0):.2g}" in told
    assert "✓ asr of catqa-zh/first at most 60 %: 0.0 % of 4 prompts" in told


def test_many_groups_make_a_small_p_larger() -> None:
    sets = [SetSettings(name="s", kind="harmful", path=Path("s"), by="c")]
    before = outcomes(**{f"g{i}": "r" * 9 for i in range(5)})
    after = outcomes(**{f"g{i}": "c" * 8 + "r" if i == 0 else "r" * 9 for i in range(5)})
    both = {"old": {"s": before}, "new": {"s": after}}
    rates = {name: rates_of(sets, found, confidence=0.95) for name, found in both.items()}  # type: ignore[arg-type]
    lines = group_lines(sets, rates, both, confidence=0.95)  # type: ignore[arg-type]
    assert len(lines) == 2 * (1 + 5)
    assert "Holm over 10" in lines[6]
    # Five groups with two metrics each; one group differs in both, at 2 · 2⁻⁸ each: ten times the least, nine times the next.
    p = 2 * 2**-8
    assert lines[7].split()[:5] == ["g0", "9", "88.9%", f"({wilson(8, 9)[0]:.1%}–{wilson(8, 9)[1]:.1%})", "+88.9%,"]
    assert lines[7].count(f"p {10 * p:.2g}") == 2
    assert all(line.count("+0.0%, p 1") == 2 for line in lines[8:])


def test_the_list_of_sets_and_what_it_says_to_write(tmp_path: Path) -> None:
    lines = sets_lines()
    assert lines[1].split() == ["advbench", "harmful", "520", "MIT", "walledai/AdvBench"]
    shown = sets_lines("xstest-unsafe")
    assert "rows where label is unsafe" in shown
    (tmp_path / "FILE.csv").write_text("prompt,type,label\nask,t,unsafe\n")
    text = "\n".join(shown[shown.index("evaluation:") :]).replace("…", COMMIT).replace("FILE", "FILE.csv")
    (tmp_path / "c.yaml").write_text(text.replace("path: FILE.csv", "path: FILE.csv, split: dev"))
    from_hub, from_file = load_evaluate_config(tmp_path / "c.yaml").evaluation.sets
    assert (from_hub.hub, from_hub.by, from_file.where) == ("walledai/XSTest", "type", {"label": "unsafe"})
    assert load_prompt_set(from_file).prompts[0].text == "ask"
    with pytest.raises(ConfigError, match="did you mean xstest-safe or xstest-unsafe"):
        sets_lines("xstest")
