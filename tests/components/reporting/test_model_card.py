"""The model card: its metadata as the hub's own classes read it, its words beside the summary's numbers."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCard

from components.reporting.model_card import Source, run_card
from components.reporting.schema import FinetuneSummary, RunSummary
from tests.components.reporting.example import summary

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
    assert len(told) == len(results) == 4 + 2 + 1 + 1
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
    assert "License of what it was made from: chat-7b: mit; zh: not stated." in card(summary(), other).text
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
        "| ASR, harmful_hard | 10 (4.7–20) | 95 (86–98) | 50 (38–62) | 60 |",
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
    assert len(card(bare).data.eval_results or ()) == 8
