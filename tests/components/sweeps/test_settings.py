"""What a sweep is told: ranges, objectives and their contradictions. Light: no torch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from components.evaluation.settings import SetSettings
from components.sweeps.settings import DEFAULT_OBJECTIVES, Objective, Range, SweepSettings, objective_problems

DEV = [
    SetSettings(name="harmful", kind="harmful", split="dev", path="h.jsonl"),  # type: ignore[arg-type]
    SetSettings(name="harmful_hard", kind="harmful", split="dev", path="hh.jsonl"),  # type: ignore[arg-type]
    SetSettings(name="zh", kind="task", split="dev", path="z.jsonl"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"space": {"scale": {"low": 2, "high": 1}}}, "low 2 is above high 1"),
        ({"space": {"scale": {"low": 0, "high": 1, "log": True}}}, "low 0 has no logarithm"),
        ({"objectives": []}, "at least 1 item"),
        ({"objectives": [{"metric": "speed"}]}, "'asr', 'harmful', 'over_refusal'"),
        (
            {"objectives": [{"metric": "task", "at_most": 0.9}]},
            "objective task is to grow and cannot be held to at_most 0.9",
        ),
        (
            {"objectives": [{"metric": "asr", "at_least": 0.1}]},
            "objective asr is to fall and cannot be held to at_least 0.1",
        ),
        (
            {"objectives": [{"metric": "asr", "at_most": 0.1}, {"metric": "asr", "at_least": 0.2}]},
            "objective asr is named 2 times: at most 0.1 and at least 0.2 exclude each other",
        ),
        (
            {"objectives": [{"metric": "asr", "at_most": 0.1}, {"metric": "asr", "at_most": 0.2}]},
            "objective asr is named 2 times: keep one of them",
        ),
        ({"objectives": [{"metric": "asr", "at_most": 1.5}]}, "less than or equal to 1"),
        ({"pick": "best"}, "'skill', 'knee' or 'safest'"),
        ({"trials": 0}, "greater than or equal to 1"),
    ],
)
def test_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        SweepSettings(**given)
    assert message in str(caught.value)


def test_a_space_is_flat_and_keeps_the_order_of_patterns() -> None:
    settings = SweepSettings(
        space={  # type: ignore[arg-type]
            "method": "masked",
            "form": ["soft", "binary"],
            "layers": {"*.mlp.*": {"low": 0, "high": 1.5}, "*": [0.5, 1]},
            "merge.weights": {"zh": {"low": 0.3, "high": 1}},
            "scale": {"low": 0.5, "high": 2, "log": True},
        }
    )
    assert list(settings.space.items()) == [
        ("method", ("masked",)),
        ("form", ("soft", "binary")),
        ("layers.*.mlp.*", Range(low=0, high=1.5)),
        ("layers.*", (0.5, 1.0)),
        ("merge.weights.zh", Range(low=0.3, high=1)),
        ("scale", Range(low=0.5, high=2, log=True)),
    ]
    assert SweepSettings(**settings.model_dump()) == settings


def test_losses_and_demands_are_turned_so_that_less_is_better() -> None:
    asr, task, refusal = DEFAULT_OBJECTIVES
    assert (asr.loss(0.2), asr.most_loss, task.loss(0.2), task.most_loss) == (0.2, 0.05, 0.8, 1.0)
    assert (refusal.name, refusal.demand) == ("over_refusal", None)
    wanted = Objective(metric="task", set="zh", at_least=0.75)
    assert (wanted.name, wanted.demand, wanted.most_loss) == ("task/zh", 0.75, 0.25)


def test_an_objective_counts_the_sets_that_headlines_count_or_the_one_it_names() -> None:
    assert [s.name for s in Objective(metric="asr").sets(DEV)] == ["harmful"]
    assert [s.name for s in Objective(metric="harmful", set="harmful_hard").sets(DEV)] == ["harmful_hard"]
    assert [s.name for s in Objective(metric="incoherent").sets(DEV)] == ["harmful", "zh"]


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (Objective(metric="over_refusal"), "measures it (measured: asr, harmful, incoherent, unscored, task)"),
        (Objective(metric="asr", set="zh"), "no dev set measures it (measured: task, incoherent, unscored)"),
        (Objective(metric="asr", set="benign"), "no dev set benign (there: harmful, harmful_hard, zh)"),
    ],
)
def test_objectives_that_nobody_measures(objective: Objective, message: str) -> None:
    (problem,) = objective_problems([objective, Objective(metric="task")], DEV)
    assert message in problem


def test_no_torch_no_optuna() -> None:
    code = "import sys, components.sweeps.checking; print({'torch', 'optuna', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
