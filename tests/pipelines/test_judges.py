"""Judges as a run config and `realign evaluate` name them: what they are known by, what stops a run, what comes out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from components.errors import ConfigError, DataError, EvaluationError, GateError, RealignError
from components.evaluation.judges import make_judge
from components.evaluation.judges.models import resident_bytes
from components.evaluation.judges.settings import JudgeExecution
from components.evaluation.settings import EvaluationSettings
from pipelines.config import load_config
from pipelines.evaluate_command import evaluate_command
from pipelines.evaluated_models import Runtime
from pipelines.graph import expand
from pipelines.roots import find_roots
from pipelines.specs import build_spec
from ray_jobs.stage import StageSpec, run_stage
from tests.components.evaluation import tiny
from tests.components.evaluation.judges.asked import asked
from tests.components.evaluation.judges.served import Reply, serving

RUNTIME = Runtime(base=None, device="cpu", dtype="float32", batch_size=4)
LABELS = {"NORMAL": "complied", "REJECTION": "refused"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model to evaluate, and a classifier of random weights."""
    root = tmp_path_factory.mktemp("made")
    tiny.build_taught_model(root / "taught")
    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(0)
    LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            initializer_range=1.0, pad_token_id=0, id2label=dict(enumerate(LABELS)), max_position_embeddings=128,
        )
    ).save_pretrained(root / "classifier")  # fmt: skip
    tokenizer.save_pretrained(root / "classifier")
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """Models and data that a test may change."""
    for name in ("taught", "classifier"):
        shutil.copytree(made / name, tmp_path / name)
    rows = [{"prompt": prompt, "chosen": "no", "rejected": "yes"} for prompt in tiny.HARMFUL]
    for name in ("pairs", "harmful"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def written(place: Path, judge: Any, **more: Any) -> Path:
    sets = [
        {"name": "harmful", "kind": "harmful", "path": "harmful.jsonl", "split": split} for split in ("test", "dev")
    ]
    data = {
        "name": "judged", "aligned": "taught", "finetunes": [{"name": "one", "path": "taught"}],
        "mask": {"preferences": "pairs.jsonl", "settings": {"anchor_weight": 0}},
        "evaluation": {"max_new_tokens": 30, "sets": sets, "judge": judge}, **more,
    }  # fmt: skip
    (place / "realign.yaml").write_text(yaml.safe_dump(data))
    return place / "realign.yaml"


def classifier(model: str = "classifier", **more: Any) -> dict[str, Any]:
    return {"kind": "classifier", "model": model, "labels": LABELS, **more}


def spec(config: Path) -> StageSpec:
    """Of the aligned model's evaluation, its parent made."""
    loaded = load_config(config)
    workspace = config.parent / "workspace"
    workspace.mkdir(exist_ok=True)
    roots = find_roots(loaded, workspace / ".identities")
    nodes = {node.id: node for node in expand(loaded)}
    load = build_spec(nodes["load_aligned"], config=loaded, roots=roots, parents={}, workspace=workspace)
    assert run_stage(load)["status"] == "done"
    parents = {"load_aligned": load.reference}
    return build_spec(nodes["evaluate_aligned"], config=loaded, roots=roots, parents=parents, workspace=workspace)


def after_the_first(body: tuple[int, bytes]) -> Reply:
    """An API that answers what tries it, and then fails."""
    return lambda text, _: "yes" if text == "Reply with the word yes." else body


def but_for_bombs(body: tuple[int, bytes]) -> Reply:
    """One that fails for all prompts but one."""
    fails = after_the_first(body)
    return lambda text, n: "refusal: 1\nconvincing: 1\nspecific: 1" if "build a bomb" in text else fails(text, n)


def test_a_moved_judge_is_the_same_and_a_changed_one_another(place: Path) -> None:
    first = spec(written(place, classifier()))
    assert "classifier" not in json.dumps({**first.semantics, "evaluation": {}})
    assert str(place) not in json.dumps(first.semantics["evaluation"])
    assert first.execution["judges"] == [{"model": str(place / "classifier")}]
    assert first.execution["judge_models"] == 1
    (place / "elsewhere").mkdir()
    (place / "classifier").rename(place / "elsewhere" / "moved")
    moved = classifier("elsewhere/moved")
    second = spec(written(place, moved, execution={"judge": {"batch_size": 3}}))
    assert second.fingerprint == first.fingerprint
    assert second.execution["judge"]["batch_size"] == 3

    config = json.loads((place / "elsewhere/moved/config.json").read_text())
    (place / "elsewhere/moved/config.json").write_text(json.dumps({**config, "_name_or_path": "/somewhere/else"}))
    (place / "elsewhere/moved/README.md").write_text("a model")
    assert spec(written(place, moved)).fingerprint == first.fingerprint
    weights = place / "elsewhere/moved/model.safetensors"
    tensors = load_file(weights)
    tensors["score.weight"][0, 0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    assert spec(written(place, moved)).fingerprint != first.fingerprint
    (place / "elsewhere" / "moved").rename(place / "classifier")
    halves = [spec(written(place, classifier(dtype=dtype))).fingerprint for dtype in ("float32", "bfloat16")]
    assert halves[0] != halves[1]
    # How an API is pressed and by which key is no part of what a judge says; whom it asks is.
    api = {"kind": "rubric", "url": "http://127.0.0.1:9/v1", "model": "m"}
    prints = [
        spec(written(place, {**api, **more})).fingerprint
        for more in ({}, {"retries": 9, "key_variable": "K"}, {"model": "n"})
    ]
    assert prints[0] == prints[1] != prints[2]


def test_a_search_judges_by_it_and_a_plan_counts_its_memory(place: Path) -> None:
    fusion = {"controls": ["interpolation"], "candidates": [0.5], "max_asr": 1.0}
    config = load_config(written(place, classifier(), fusion=fusion))
    workspace = place / "workspace"
    workspace.mkdir()
    roots = find_roots(config, workspace / ".identities")
    specs: dict[str, StageSpec] = {}
    for node in expand(config):
        if node.id in ("load_aligned", "one/load", "one/search_interpolation"):
            parents = {role: specs[parent].reference for role, parent in node.parents}
            specs[node.id] = build_spec(node, config=config, roots=roots, parents=parents, workspace=workspace)
            answer = run_stage(specs[node.id])
            assert answer["status"] == "done", answer
    # The model refuses all; the classifier has its own opinion, which is what the search went by.
    alone = make_judge(config.evaluation.judge).judge(asked(*tiny.HARMFUL), [tiny.REFUSAL] * 4)
    assert answer["record"]["metrics"]["dev"]["asr"] == sum(one.label != "refused" for one in alone) / 4
    tensors = load_file(place / "classifier" / "model.safetensors").values()
    numel = sum(tensor.numel() for tensor in tensors)
    judge = config.evaluation.judge
    assert resident_bytes(judge) == 4 * numel
    half = judge.model_copy(update={"dtype": "bfloat16"})
    both = EvaluationSettings.model_validate({"judge": {"kind": "panel", "members": [judge, half, "phrases"]}}).judge
    assert resident_bytes(both) == (4 + 2) * numel


def test_a_stage_judges_with_the_model_that_was_hashed(place: Path) -> None:
    made = spec(written(place, {"kind": "panel", "members": ["phrases", classifier()]}))
    answer = run_stage(made)
    assert answer["status"] == "done", answer
    out = Path(made.workspace) / made.reference / "test"
    outcomes = [json.loads(line) for line in (out / "answers" / "harmful.jsonl").read_text().splitlines()]
    judge = make_judge(
        EvaluationSettings.model_validate({"judge": classifier(str(place / "classifier"))}).judge, JudgeExecution()
    )
    alone = judge.judge(asked(*tiny.HARMFUL), [one["answer"] for one in outcomes])
    assert [one["votes"] for one in outcomes] == [
        {"phrases": "refused", "classifier": verdict.label} for verdict in alone
    ]
    agreed = json.loads((out / "agreement.json").read_text())
    assert agreed["pairs"][0]["same"] == sum(verdict.label == "refused" for verdict in alone) / 4

    later = spec(written(place, classifier()))
    (place / "classifier" / "config.json").write_text((place / "classifier" / "config.json").read_text() + " ")
    assert run_stage(later)["status"] == "done"
    another = spec(written(place, classifier(too_long="cut")))
    tensors = load_file(place / "classifier" / "model.safetensors")
    save_file({**tensors, "score.weight": -tensors["score.weight"]}, place / "classifier" / "model.safetensors")
    answer = run_stage(another)
    assert answer["status"] == "failed"
    assert "(judge classifier) has changed since this run began" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        ({"kind": "clasifier"}, "evaluation.judge: Input tag 'clasifier'"),
        (classifier("nowhere"), "judge classifier: no directory"),
        (classifier("owner/name", revision="main"), "evaluation.judge.classifier.revision: String should match"),
        (classifier(lables={}), "evaluation.judge.classifier.lables: unknown key (did you mean 'labels'?)"),
        (
            {"kind": "guard", "format": "wildguard", "model": "a", "url": "http://a/v1", "dtype": "float16"},
            "dtype: for a guard in this process",
        ),
        ({"kind": "guard", "format": "wildguard", "model": "a", "retries": 1}, "retries: for a guard behind an API"),
        (
            {"kind": "guard", "format": "wildguard", "model": "o/m", "revision": COMMIT, "url": "http://a/v1"},
            "a model behind an API has no revision",
        ),
        (classifier("a/b/c", revision=COMMIT), "a model with a revision is one of the hub"),
        ({"kind": "panel", "members": ["phrases"]}, "evaluation.judge.panel.members: "),
        ({"kind": "perplexity", "of": "phrases", "model": "taught"}, "max_perplexity: missing"),
        ({"kind": "panel", "members": ["phrases", {"kind": "rubric", "url": "ftp://x", "model": "m"}]}, "rubric.url"),
    ],
)
def test_settings_that_are_wrong_are_told(place: Path, judge: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(written(place, judge))
    assert words in str(caught.value), str(caught.value)


def test_judges_that_cannot_judge_stop_a_run_before_it_begins(place: Path, tmp_path: Path) -> None:
    panel = {"kind": "panel", "members": [classifier("taught"), classifier(labels={"NORMAL": "complied"})]}
    with pytest.raises(DataError) as caught:
        find_roots(load_config(written(place, panel)), tmp_path / "identities")
    assert "is LlamaForCausalLM, and a …ForSequenceClassification is needed" in str(caught.value)
    assert "REJECTION has no meaning" in str(caught.value)
    out = tmp_path / "out"
    config = written(place, {"kind": "perplexity", "of": "phrases", "model": "classifier", "max_perplexity": 9})
    with pytest.raises(EvaluationError, match="is LlamaForSequenceClassification, and a …ForCausalLM is needed"):
        evaluate_command([f"one={place / 'taught'}"], config, out, RUNTIME)
    assert not (out / "one").exists()


def test_evaluate_judges_by_several_and_compares(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPARE_KEY", "secret")
    out = tmp_path / "out"
    places = [f"{name}={place / 'taught'}" for name in ("aligned", "new", "other")]
    with serving(lambda *_: "TIE") as served:
        preference = {"url": served.url, "model": "m", "key_variable": "COMPARE_KEY", "retries": 0}
        panel = {"kind": "panel", "members": ["phrases", classifier(), {"kind": "phrases", "lists": ["zh"]}]}
        evaluate_command(places, written(place, panel, preference=preference), out, RUNTIME)
        assert len(served.seen) == 1 + 2 * 2 * 4
        assert {request["key"] for request in served.seen} == {"Bearer secret"}
    told = capsys.readouterr().out
    found = json.loads((out / "preference.json").read_text())
    assert found["reference"] == "aligned"
    assert {name: one["harmful"]["tied"] for name, one in found["models"].items()} == {"new": 4, "other": 4}
    assert "new preferred to aligned on harmful: +0.0 (+0.0 to +0.0); 0 won, 0 lost, 4 tied (0 inconsistent)" in told
    rows = pq.read_table(out / "answers.parquet").to_pylist()
    assert all(set(row["votes"]) == {"phrases", "classifier", "phrases_2"} for row in rows)
    pairs = json.loads((out / "agreement.json").read_text())["pairs"]
    same = sum(row["votes"]["phrases"] == row["votes"]["classifier"] for row in rows) / len(rows)
    assert (pairs[0]["same"], pairs[0]["n"]) == (same, 12)
    assert "judges phrases and phrases_2: agree on 0.0% of 12, Cohen's κ 0.00" in told

    with pytest.raises(ConfigError, match="preference compares models with the first one"):
        evaluate_command(places[:1], written(place, "phrases", preference=preference), out, RUNTIME)
    evaluate_command(places[:1], written(place, "phrases"), out, RUNTIME)
    assert not (out / "preference.json").exists()
    assert not (out / "agreement.json").exists()


def test_what_nobody_could_score_is_said(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(but_for_bombs((500, b"{}"))) as served:
        rubric = {"kind": "rubric", "url": served.url, "model": "m", "retries": 0}
        evaluate_command([f"one={place / 'taught'}"], written(place, rubric), tmp_path / "out", RUNTIME)
        made = spec(written(place, rubric))
        answer = run_stage(made)
    assert "one: 3 of 4 answers unscored, the first for: the judge's API: status 500" in capsys.readouterr().out
    rates = json.loads((tmp_path / "out" / "rates.json").read_text())["one"]
    assert [rates["sets"]["harmful"][metric]["value"] for metric in ("harmful", "unscored")] == [0.75, 0.75]
    notes = [note.split(":")[0] for note in answer["record"]["notes"]]
    assert [note for note in notes if "set" in note] == ["test set 'harmful'"]
    assert "3 of 4 answers unscored, the first for: the judge's API: status 500" in answer["record"]["notes"][-1]


def test_a_judge_that_scores_nothing_is_no_measurement(place: Path, tmp_path: Path) -> None:
    with serving(after_the_first((500, b"{}"))) as served:
        rubric = {"kind": "rubric", "url": served.url, "model": "m", "retries": 0}
        config = written(place, rubric)
        with pytest.raises(
            EvaluationError, match=r"'harmful' .*not one answer was judged .the judge's API: status 500"
        ):
            evaluate_command([f"one={place / 'taught'}"], config, tmp_path / "out", RUNTIME)
        answer = run_stage(spec(config))
    assert answer["status"] == "failed"
    assert "not one answer was judged" in answer["error"]["message"]


@pytest.mark.parametrize("status", [401, 404, 503])
def test_apis_are_tried_before_anything_is_generated(place: Path, tmp_path: Path, status: int) -> None:
    out = tmp_path / "out"
    with serving(lambda *_: (status, b"{}")) as served:
        api = {"url": served.url, "model": "m", "retries": 0}
        guard = {"kind": "guard", "format": "wildguard", **api}
        panel = {"kind": "panel", "members": ["phrases", {"kind": "rubric", **api}, guard]}
        places = [f"{name}={place / 'taught'}" for name in ("one", "two")]
        with pytest.raises(EvaluationError, match="check url, model and key") as caught:
            evaluate_command(places, written(place, panel, preference=api), out, RUNTIME)
        assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
            "judge rubric", "judge guard", "preference"
        ]  # fmt: skip
        assert [request["path"] for request in served.seen] == [
            "/v1/chat/completions", "/v1/completions", "/v1/chat/completions"
        ]  # fmt: skip
        assert run_stage(spec(written(place, panel)))["status"] == "failed"
    with pytest.raises(EvaluationError, match=r"judge rubric: .*onnection"):
        evaluate_command(places, written(place, {"kind": "rubric", **api}), out, RUNTIME)
    assert not out.exists() or not list(out.rglob("*.jsonl"))


@pytest.mark.parametrize("at_most", [0.0, 1.0])
def test_a_comparison_that_fails_takes_no_decision_back(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], at_most: float
) -> None:
    out = tmp_path / "out"
    places = [f"{name}={place / 'taught'}" for name in ("aligned", "new")]
    gate = [{"metric": "asr", "at_most": at_most}]
    with serving(after_the_first((401, b"{}"))) as served:
        preference = {"url": served.url, "model": "m", "retries": 0}
        config = written(place, {"kind": "phrases", "lists": ["zh"]}, preference=preference, gate=gate)
        with pytest.raises(EvaluationError if at_most else GateError, match="check url, model and key") as caught:
            evaluate_command(places, config, out, RUNTIME)
    assert ("the gate is shut for new" in str(caught.value)) == (at_most == 0)
    assert json.loads((out / "decision.json").read_text())["new"]["passed"] == bool(at_most)
    assert (out / "rates.json").is_file()
    assert str(out / "answers.parquet") in capsys.readouterr().out
    assert list((out / ".state").rglob("*.jsonl"))
    with serving(lambda *_: "TIE") as served:
        preference = {"url": served.url, "model": "m", "retries": 0}
        config = written(place, {"kind": "phrases", "lists": ["zh"]}, preference=preference)
        evaluate_command(places, config, out, RUNTIME)
    assert not (out / ".state").exists()
    assert (out / "preference.json").is_file()


def test_answers_outlive_a_judge_that_fails(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    places = [f"one={place / 'taught'}"]
    with serving(after_the_first((401, b"{}"))) as served:
        rubric = {"kind": "rubric", "url": served.url, "model": "m", "retries": 0}
        with pytest.raises(RealignError, match="check url, model and key"):
            evaluate_command(places, written(place, rubric), out, RUNTIME)
    [state] = (out / ".state").rglob("test-harmful.jsonl")
    lines = state.read_text().splitlines()
    assert sum(len(json.loads(line)) for line in lines[1:]) == 4
    changed = [json.loads(line) for line in lines[1:]]
    changed[0][0][1]["text"] = "kept from before"
    state.write_text("\n".join([lines[0], *map(json.dumps, changed)]) + "\n")
    with serving(lambda *_: "refusal: 1\nconvincing: 1\nspecific: 1") as served:
        evaluate_command(places, written(place, {**rubric, "url": served.url}), out, RUNTIME)
    answers = (out / "one" / "answers" / "harmful.jsonl").read_text()
    assert "kept from before" in answers
    assert all(json.loads(line)["verdict"] == "refused" for line in answers.splitlines())
