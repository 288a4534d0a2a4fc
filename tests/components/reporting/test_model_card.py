"""The model card: its metadata as the hub's own classes read it, its words beside the summary's numbers."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCard

from components.reporting.model_card import Source, adapter_card, run_card
from components.reporting.schema import FinetuneSummary, RunSummary
from tests.components.reporting.example import share, summary

SOURCES = [Source("aligned", "chat-7b", "owner/chat-7b", "mit"), Source("zh", "zh", None, "mit")]


def card(found: RunSummary, sources: list[Source] = SOURCES, **more: Any) -> ModelCard:
    return ModelCard(run_card(found, found["finetunes"][0], sources, **more))


def one(found: RunSummary) -> FinetuneSummary:
    return found["finetunes"][0]


def test_every_rate_of_the_selected_form_is_a_result_with_dataset_and_split() -> None:
    found = summary()
    found["asked"]["sets"]["test harmful"] |= {"hub": "owner/harmful", "revision": "c" * 40}
    results = card(found).data.eval_results
    assert results is not None
    rates = one(found)["after_soft"]
    assert rates is not None
    told = {(r.dataset_name, r.metric_type): r for r in results}
    assert len(told) == len(results) == 4 + 2 + 1 + 1 + 1
    for metric in ("asr", "harmful", "over_refusal", "task"):
        assert told["all test sets that count", metric].metric_value == rates[metric]["value"]  # type: ignore[literal-required]
    for name, metrics in rates["sets"].items():
        for metric, interval in metrics.items():
            result = told[name, metric]
            assert result.metric_value == interval["value"]
            assert result.metric_args == {
                "low": interval["low"], "high": interval["high"], "n": interval["n"], "confidence": 0.95,
            }  # fmt: skip
            assert result.dataset_split == "test"
    assert told["harmful", "asr"].dataset_type == "owner/harmful"
    assert told["harmful", "asr"].dataset_revision == "c" * 40
    assert told["hazard", "over_refusal"].dataset_type == "hazard"


def test_visage_is_a_result_where_it_was_drawn() -> None:
    found = summary()
    figure = {"value": 79.5, "low": 75.0, "high": 85.0, "n": 3}
    one(found)["landscape"] = {"realigned": {"path": "landscape/1", "visage": figure}}  # type: ignore[typeddict-item]
    results = card(found).data.eval_results
    assert results is not None
    assert [r.metric_value for r in results if r.metric_type == "visage"] == [79.5]
    assert "realigned 79.5 (75.0 to 85.0)" in card(found).text


def test_base_models_and_license_are_said_where_they_are_known() -> None:
    data = card(summary()).data
    assert (data.base_model, data.license) == (["owner/chat-7b"], "mit")
    assert data.get("base_model_relation") == "merge"
    assert {"realign", "safety"} <= set(data.tags or ())
    other = [SOURCES[0], Source("zh", "zh", None, None)]
    assert card(summary(), other).data.license is None
    assert "License of what it was made from: owner/chat-7b: mit; zh: not stated." in card(summary(), other).text
    unknown = card(summary(), [Source("aligned", "a", None, None), Source("zh", "zh", None, None)])
    assert unknown.data.base_model is None
    adapter = card(summary(), adapter=True).data
    assert (adapter.library_name, adapter.get("base_model_relation")) == ("peft", "adapter")


def test_words_say_numbers_gate_and_lineage_and_stay_words() -> None:
    found = summary()
    text = card(found).text
    for line in (
        "| ASR | 0.5 (0.1–2.8) | 95 (91–97) | 1.5 (0.5–4.3) | 200 |",
        "| task | 1.0 (0.3–2.9) | 93 (90–96) | 92 (88–94) | 300 |",
        "| ASR, set harmful_hard | 10 (4.7–20) | 95 (86–98) | 50 (38–62) | 60 |",
        "Shut: not to be served.",
        "- ✗ asr at most 0.01: 1.5 % of 200 prompts &lt;i>up to&lt;/i> 4.3 %",
        "Registered as demo-zh version 7.",
        "| fuse_soft | `fuse/04` | load, train_mask |",
        f"| load | `load/02`, weights SHA-256 `{'f' * 64}` | load_aligned |",
    ):
        assert line in text, line
    assert "# demo &lt;1>: zh, realigned" in text


def test_a_card_of_a_run_with_nothing_optional_can_be_read() -> None:
    found = summary()
    bare: RunSummary = {"schema": 1, "run": "bare", "aligned": None, "finetunes": []}
    bare["finetunes"] = [
        {"name": "a", "status": "done", "error": None, "selected": "binary", "after_binary": one(found)["after_binary"]}
    ]
    assert len(card(bare).data.eval_results or ()) == 9


def test_the_aligned_model_stands_in_no_row_over_other_tasks() -> None:
    found = summary()
    aligned = found["aligned"]
    assert aligned is not None
    aligned["sets"]["words"] = {"task": share(200, 300)}  # another finetune's
    aligned["task"] = share(203, 600)
    text = card(found).text
    assert "| task | – | 93 (90–96) | 92 (88–94) | 300 |" in text
    assert "| task, set sums | 1.0 (0.3–2.9) | 93 (90–96) | 92 (88–94) | 300 |" in text


def test_sets_may_have_any_name_beside_the_rates_over_all() -> None:
    found = summary()
    figure = {"value": 79.5, "low": 75.0, "high": 85.0, "n": 3}
    one(found)["landscape"] = {"realigned": {"path": "landscape/1", "visage": figure}}  # type: ignore[typeddict-item]
    rates = one(found)["after_soft"]
    assert rates is not None
    for name in ("headline", "landscape"):
        rates["sets"][name] = {"asr": share(1, 2)}
    told = {(r.dataset_name, r.metric_type): r.metric_value for r in card(found).data.eval_results or ()}
    assert told["all test sets that count", "asr"] == rates["asr"]["value"]
    assert told["all harmful test sets that count", "visage"] == 79.5
    assert told["headline", "asr"] == told["landscape", "asr"] == 0.5


def test_what_others_wrote_stays_text() -> None:
    licensed = Source("aligned", "8c22764a7e36", "owner/m", "x\n\n<script>alert(1)</script>\n\n# Gate\n\nPassed.")
    found = summary()
    one(found)["notes"] = ["a \\| b ![x](http://example.com/x.png) `c` # [k](javascript:alert(1))"]
    text = card(found, [licensed, SOURCES[1]]).text
    assert "owner/m: x &lt;script>alert(1)&lt;/script> \\# Gate Passed.; zh: mit." in text
    assert "8c22764a7e36" not in text, "a cache's hash says nothing"
    assert r"- a \\\| b \!\[x\](http://example.com/x.png) \`c\` \# \[k\](javascript:alert(1))" in text
    assert [line for line in text.splitlines() if line.startswith("## Gate")] == ["## Gate"]


def test_notes_that_name_places_on_the_machine_are_counted() -> None:
    found = summary()
    one(found)["notes"] = [
        "gate: /home/me/runs/landscape/ab/points.jsonl: missing or damaged",
        "tracking at sqlite:////srv/w/mlflow.db has no run",
        "see https://example.com/a/b and/or 3/4 of it",
    ]
    text = card(found).text
    assert "/home/me" not in text
    assert "mlflow.db" not in text
    assert "- see https://example.com/a/b and/or 3/4 of it" in text
    assert "- 2 more, which name files of the machine, are in the run's summary.json." in text


def test_an_exported_adapter_has_its_own_rates_and_no_gate_of_its_own() -> None:
    found = summary()
    one(found)["records"] |= {
        "export_adapter": {"reference": "export_adapter/06", "parents": {"fuse_soft": "fuse/04"}, "code": "0.1.1"},
        "evaluate_adapter": {
            "reference": "evaluate/07", "parents": {"export_adapter": "export_adapter/06"}, "code": "0.1.1",
        },
    }  # fmt: skip
    told = ModelCard(adapter_card(found, one(found), SOURCES))
    assert (told.data.library_name, told.data.base_model) == ("peft", ["owner/chat-7b"])
    rates = one(found)["after_adapter"]
    assert {r.metric_value for r in told.data.eval_results or () if r.metric_type == "asr"} == {
        rates["asr"]["value"], rates["sets"]["harmful_hard"]["asr"]["value"],
    }  # fmt: skip
    for line in (
        "A LoRA adapter over owner/chat-7b, exported from the soft form of a safety realignment of",
        "It lacks 23.7 % of what that form changes",
        "| ASR | 0.5 (0.1–2.8) | 95 (91–97) | 5.5 (3.1–9.6) | 200 |",
        "The soft form did not pass its gate; the adapter was held to none.",
        "| evaluate_adapter | `evaluate/07` | export_adapter |",
    ):
        assert line in told.text, line
    assert "## Gate" not in told.text
    del one(found)["after_adapter"]
    assert "It was not measured itself." in adapter_card(found, one(found), SOURCES)
