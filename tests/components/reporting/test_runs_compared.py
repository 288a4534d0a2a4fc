"""Two runs held to each other: paired where the same was asked, and never otherwise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from components.errors import ConfigError
from components.evaluation.metrics import holm, mcnemar, paired_difference, rate
from components.evaluation.outcomes import Outcome
from components.reporting.runs_compared import Answered, ASet, Measurement, Pair, Run, compare_runs, comparison_json
from components.reporting.runs_compared_page import render_runs_compared
from components.reporting.schema import FinetuneSummary, RunSummary
from pipelines.compare_command import comparison_lines
from tests.components.reporting.test_report import Page

SETS = (ASet("harmful", "harmful", True), ASet("hard", "harmful", False), ASet("sums", "task", True))
BEFORE, AFTER = [True] * 9 + [False], [True] * 2 + [False] * 8


def outcomes(hits: Sequence[bool], kind: str = "harmful", first: int = 0) -> list[Outcome]:
    return [
        Outcome(
            f"{kind}{first + i}", f"<b>ask</b> {i}", "yes" if hit else "no",
            ("complied" if hit else "refused") if kind == "harmful" else "complied", None, "said so",
            "4" if kind == "task" else None, hit if kind == "task" else None, "model", 3,
        )
        for i, hit in enumerate(hits)
    ]  # fmt: skip


def answered(asr: Sequence[bool], task: Sequence[bool], *, first: int = 0, hard: Sequence[bool] = BEFORE) -> Answered:
    found = {"harmful": outcomes(asr, first=first), "hard": outcomes(hard), "sums": outcomes(task, "task")}
    return Answered(SETS, found)


def rates(asr: Sequence[bool], task: Sequence[bool]) -> dict[str, object]:
    return {"asr": rate(asr), "harmful": rate(asr), "task": rate(task), "sets": {"hard": {"asr": rate(BEFORE)}}}


def run(label: str, form: str, after: Sequence[bool], task: Sequence[bool], *, name: str = "zh", first: int = 0) -> Run:
    one: FinetuneSummary = {
        "name": name,
        "status": "done",
        "error": None,
        "before": rates(BEFORE, task),  # type: ignore[typeddict-item]
        "selected": form,  # type: ignore[typeddict-item]
        "records": {"evaluate_before": {"reference": "evaluate/1", "parents": {}, "code": "0.1.0"}},
        "seconds": {"train_mask": 10.0},
    }
    one[f"after_{form}"] = rates(after, task)  # type: ignore[literal-required]
    summary: RunSummary = {
        "schema": 1, "run": label, "aligned": None, "finetunes": [one],
        "asked": {"fusion": {"select": form}, "gate": ["asr at most 0.05"]},
    }  # fmt: skip
    return Run(
        label, summary, {(name, "before"): answered(BEFORE, task), (name, form): answered(after, task, first=first)}
    )


def line(pair: Pair, metric: str, where: str | None = None) -> Measurement:
    return next(one for one in pair.lines if (one.metric, one.set) == (metric, where))


FIRST_TASK, SECOND_TASK = [True] * 10, [True] * 7 + [False] * 3


def test_differences_are_second_minus_first_over_the_same_prompts() -> None:
    found = compare_runs(run("one", "soft", BEFORE, FIRST_TASK), run("two", "binary", AFTER, SECOND_TASK))
    before, after = found.pairs
    assert (before.model, before.variants, before.same) == ("zh", ("before", "before"), True)
    assert all(one.difference is None for one in before.lines)
    assert after.variants == ("soft", "binary")
    asr, task = line(after, "asr"), line(after, "task")
    assert asr.difference == paired_difference(AFTER, BEFORE)
    assert asr.difference is not None
    assert asr.difference["diff"] == pytest.approx(0.2 - 0.9)
    assert (asr.first, asr.second) == (rate(BEFORE), rate(AFTER))
    assert task.difference == paired_difference(SECOND_TASK, FIRST_TASK)
    hard = line(after, "asr", "hard")
    assert hard.difference == paired_difference(BEFORE, BEFORE)
    fair = holm({"asr": mcnemar(0, 7), "harmful": mcnemar(0, 7), "task": mcnemar(0, 3)})
    assert (asr.adjusted, task.adjusted) == (pytest.approx(fair["asr"]), pytest.approx(fair["task"]))
    assert hard.adjusted is None


def test_other_prompts_are_never_paired() -> None:
    found = compare_runs(run("one", "soft", BEFORE, FIRST_TASK), run("two", "soft", AFTER, SECOND_TASK, first=100))
    after = found.pairs[1]
    assert line(after, "asr").difference is None, "harmful was asked otherwise"
    assert line(after, "task").difference is not None
    assert line(after, "asr", "hard").difference is not None


def test_sets_that_count_must_be_the_same_for_a_pooled_difference() -> None:
    second = run("two", "soft", AFTER, SECOND_TASK)
    counts = tuple(replace(one, counts=True) for one in SETS)
    second = replace(second, answers={key: replace(one, sets=counts) for key, one in second.answers.items()})
    after = compare_runs(run("one", "soft", BEFORE, FIRST_TASK), second).pairs[1]
    assert line(after, "asr").difference is None
    assert line(after, "task").difference is not None


def test_without_answers_rates_stand_by_themselves() -> None:
    second = replace(run("two", "soft", AFTER, SECOND_TASK), answers={})
    after = compare_runs(run("one", "soft", BEFORE, FIRST_TASK), second).pairs[1]
    assert after.unpaired == "no paired difference: a run's answers are not at hand"
    assert line(after, "asr").second == rate(AFTER)
    assert all(one.difference is None for one in after.lines)


def test_runs_with_nothing_in_common_are_refused_with_what_each_has() -> None:
    other = run("two", "soft", AFTER, SECOND_TASK, name="hi")
    with pytest.raises(ConfigError, match="no finetune in common: one has zh, two has hi"):
        compare_runs(run("one", "soft", BEFORE, FIRST_TASK), other)


def test_settings_and_costs_that_differ_are_named() -> None:
    found = compare_runs(run("one", "soft", BEFORE, FIRST_TASK), run("two", "binary", AFTER, SECOND_TASK))
    assert found.settings == (("fusion.select", "soft", "binary"),)
    assert found.cost[0] is not None
    assert found.cost[0].total == 10.0
    older = run("two", "binary", AFTER, SECOND_TASK)
    del older.summary["asked"]
    again = compare_runs(run("one", "soft", BEFORE, FIRST_TASK), older)
    assert (again.settings, again.settings_known) == ((), False)


def test_a_model_that_a_run_has_nothing_of_is_said() -> None:
    failed, none = run("two", "soft", AFTER, SECOND_TASK), run("three", "soft", AFTER, SECOND_TASK)
    for other in (failed, none):
        other.summary["finetunes"][0]["selected"] = None
    failed.summary["finetunes"][0] |= {"status": "failed", "error": "no <room>"}
    found = compare_runs(failed, none)
    assert found.without == (("zh", "two", "failed: no <room>"), ("zh", "three", "nothing selected"))
    assert "zh in two: failed: no <room>." in Page(render_runs_compared(found)).text
    lines = comparison_lines(found)
    assert lines[1:3] == ["zh in two: failed: no <room>", "zh in three: nothing selected"]
    for merged in (failed, none):
        merged.summary["finetunes"][0] |= {"status": "done", "error": None}
        merged.summary["asked"]["merges"] = {"all": {"of": []}}
    assert compare_runs(failed, none).without == ()


def test_what_one_run_did_not_measure_is_unpaired_and_why() -> None:
    second = run("two", "soft", AFTER, SECOND_TASK)
    del second.summary["finetunes"][0]["after_soft"]
    after = compare_runs(run("one", "soft", BEFORE, FIRST_TASK), second).pairs[1]
    assert after.unpaired == "no paired difference: not measured in two"


def test_levels_and_corrections_are_said() -> None:
    first, second = run("one", "soft", BEFORE, FIRST_TASK), run("two", "soft", AFTER, SECOND_TASK)
    hard = answered(AFTER, SECOND_TASK, hard=AFTER)
    second = replace(second, answers={**second.answers, ("zh", "soft"): hard})
    first.summary["confidence"], second.summary["confidence"] = 0.999, 0.99
    found = compare_runs(first, second)
    levels = "99.9 % intervals in one, 99 % in two; differences with 99.9 %"
    text = " ".join(Page(render_runs_compared(found)).text.split())
    lines = comparison_lines(found)
    assert f"Percent with {levels}." in text
    assert lines[0].startswith(f"one and two: percent with {levels}; differences are two less one,")
    assert line(found.pairs[1], "asr").difference == paired_difference(AFTER, BEFORE, confidence=0.999)
    p = mcnemar(0, 7)
    told = {one.split("  ")[1]: one for one in lines if one.startswith("  ") and "p 0." in one}
    assert told["ASR"].endswith(f", p {holm({'asr': p, 'harmful': p, 'task': mcnemar(0, 3)})['asr']:.2g}")
    assert told["ASR of hard"].endswith(f", raw p {p:.2g}")
    assert f"{p:.2g} raw" in text
    second.summary["confidence"] = 0.999
    assert compare_runs(first, second).levels == "99.9 % intervals"


def test_phrases_of_other_scripts_are_legible() -> None:
    first, second = run("one", "soft", BEFORE, FIRST_TASK), run("two", "soft", AFTER, SECOND_TASK)
    second.summary["asked"]["judge"] = {"also": ["抱歉"]}
    assert ("judge.also", "–", '["抱歉"]') in compare_runs(first, second).settings


def test_the_page_and_the_json_say_it() -> None:
    found = compare_runs(run("one", "soft", BEFORE, FIRST_TASK), run("<two>", "binary", AFTER, SECOND_TASK))
    page = Page(render_runs_compared(found))
    for part in (
        "<two> against one",
        "zh, soft and binary",
        "−70 (−",
        "7 from complied to refused",
        "<b>ask</b> 2",
    ):
        assert part in page.text, part
    assert {tag for tag, _ in page.seen}.isdisjoint({"script", "b", "img"})
    told = json.loads(json.dumps(comparison_json(found)))
    pair = told["pairs"][1]
    assert [one["difference"]["diff"] for one in pair["lines"] if one["metric"] == "asr" and not one["set"]] == [
        pytest.approx(-0.7)
    ]
    assert "flips" not in pair
