"""`realign evaluate`: models side by side over the same prompts, a table of every answer, a gate where one is given."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

from pydantic import BaseModel, ConfigDict, Field

from components.errors import ConfigError, GateError, RealignError
from components.evaluation.api import Pressing
from components.evaluation.gates import VISAGE, Decision, Measured, Reference, Requirement, decide
from components.evaluation.judges.panel import AGREEMENT
from components.evaluation.judges.preference import PreferenceSettings
from components.evaluation.outcomes import NamedSet, Outcome, rates_of
from components.evaluation.prompts import PromptSet, load_prompt_set
from components.reporting.comparison import against_first, write_comparison
from components.storage import write_atomic
from pipelines.config import load_sections
from pipelines.evaluate_text import told_lines
from pipelines.evaluated_models import STATE, Named, Runtime, check_models, named_models, outcomes_of, workers
from pipelines.judging import PREFERENCE, compared_lines, judged_lines
from pipelines.sections import EvaluationSection, gate_problems

if TYPE_CHECKING:
    from components.evaluation.capability.settings import CapabilitySettings
    from components.evaluation.capability.tasks import LoadedTask
    from components.reporting.schema import Rates

TABLE, RATES, DECISION, PAGE = "answers.parquet", "rates.json", "decision.json", "comparison.html"


class EvaluateConfig(BaseModel):
    """What `realign evaluate` takes of a file: a run config's `evaluation` section, and a gate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    evaluation: EvaluationSection
    gate: Annotated[tuple[Requirement, ...], Field(min_length=1)] | None = None
    preference: PreferenceSettings | None = None
    """Who compares every further model's answers to harmful prompts with the first model's."""


def load_evaluate_config(path: Path) -> EvaluateConfig:
    """Read and check; other sections of a run config are left alone. Raises ConfigError that lists everything wrong."""
    return load_sections(path, EvaluateConfig)


def evaluate_command(models: Sequence[str], config: Path, out: Path, runtime: Runtime) -> None:
    """Evaluate, write, print. Raises GateError where a model does not pass, and after all that where preferences failed."""
    chosen = load_evaluate_config(config)
    named = named_models(models)
    check_models(named, runtime)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: that is a file; give a directory")
    if chosen.preference is not None and len(named) < 2:
        raise ConfigError("preference compares models with the first one; give two or more, or remove the section")
    if chosen.gate is not None:
        _require_gate_fits(chosen, chosen.gate, named)
    settings = chosen.evaluation.model_copy(update={"dtype": runtime.dtype or chosen.evaluation.dtype})
    sets = [load_prompt_set(one) for one in settings.sets if one.split == "test"]
    asked: list[NamedSet] = [*sets, *(settings.capability.tasks if settings.capability else ())]
    outcomes = _outcomes(chosen, settings, sets, named, out, runtime)
    rates = {
        name: rates_of(asked, found, confidence=settings.confidence, interval=settings.interval)
        for name, found in outcomes.items()
    }
    decisions = _decided(chosen, asked, outcomes)
    others = against_first(asked, outcomes, confidence=settings.confidence)
    about = {
        **{one.name: one.place for one in named},
        "judged by": settings.judge.model_dump_json(exclude_none=True, exclude=set(Pressing.model_fields)),
        "asked and judged as in": str(config),
        "finished": datetime.now(UTC).isoformat(timespec="minutes"),
    }
    told = {name: decision.to_json() for name, decision in decisions.items()}
    _write(out, asked, rates, outcomes, told)
    write_comparison(
        out / PAGE, sets=asked, rates=rates, others=others, decisions=told, confidence=settings.confidence, about=about
    )
    lines = told_lines(settings, sets, rates, outcomes, others, decisions)
    lines += judged_lines(out, outcomes)
    problem: RealignError | None = None
    try:
        lines += compared_lines(out, chosen.preference, sets, outcomes, confidence=settings.confidence)
    except RealignError as error:
        problem = error  # takes no rate and no decision back; the answers are kept, so that the next try compares alone
    sys.stdout.write("\n".join([*lines, str(out / TABLE), str(out / PAGE)]) + "\n")
    if problem is None:
        # Of an interrupted run alone: a place may hold another model later.
        shutil.rmtree(out / STATE, ignore_errors=True)
    failed = [name for name, decision in decisions.items() if not decision.passed]
    if failed:
        shut = f"the gate is shut for {', '.join(failed)}; see {out / DECISION}"
        raise GateError(shut + (f"\npreference: {problem}" if problem else ""))
    if problem is not None:
        raise problem


def _outcomes(
    chosen: EvaluateConfig,
    settings: EvaluationSection,
    sets: Sequence[PromptSet],
    named: Sequence[Named],
    out: Path,
    runtime: Runtime,
) -> dict[str, dict[str, list[Outcome]]]:
    """model -> set -> outcomes, after all that can be known beforehand of judges and tasks."""
    from components.evaluation.judges import make_judge
    from components.evaluation.judges.apis import require_apis

    tasks = _loaded_tasks(settings.capability)
    judge = make_judge(settings.judge, runtime.judging)
    require_apis(settings.judge, chosen.preference)
    for name in (TABLE, RATES, DECISION, PAGE, PREFERENCE, AGREEMENT):
        (out / name).unlink(missing_ok=True)  # what an earlier run said is not said of this one
    with workers(named, runtime):
        return {one.name: outcomes_of(one, settings, sets, tasks, judge, out, runtime) for one in named}


def _require_gate_fits(chosen: EvaluateConfig, gate: Sequence[Requirement], named: Sequence[Named]) -> None:
    """Mistakes that would shut the gate, or leave it unasked, after all is measured. Raises ConfigError that lists them."""
    roles, names = get_args(Reference), [one.name for one in named]
    problems = gate_problems(gate, chosen.evaluation)
    if any(one.metric == VISAGE for one in gate):
        problems.append(
            "gate: visage is of a landscape, which `realign run` draws and this command does not; remove it"
        )
    if all(name in roles for name in names):
        problems.append(f"{', '.join(roles)} are what a gate compares with; name the model that it is for otherwise")
    problems += [
        f"{one.place}: a gate compares with what is called {one.name}; say name={one.place}"
        for one in named
        if one.name in roles and not one.explicit
    ]
    missing = dict.fromkeys(r.than for r in gate if r.than is not None and r.than not in names)
    problems += [f"the gate compares with {than}: give that model too, as {than}=…" for than in missing]
    if problems:
        raise ConfigError("\n".join(problems))


def _loaded_tasks(capability: CapabilitySettings | None) -> list[LoadedTask]:
    if capability is None:
        return []
    from components.evaluation.capability.tasks import load_tasks

    return load_tasks(capability)


def _decided(
    config: EvaluateConfig, sets: Sequence[NamedSet], outcomes: Mapping[str, dict[str, list[Outcome]]]
) -> dict[str, Decision]:
    """Of every model that is no reference by its name."""
    if config.gate is None:
        return {}
    measured = {name: Measured(sets, found) for name, found in outcomes.items()}
    roles = get_args(Reference)
    references = {cast("Reference", name): one for name, one in measured.items() if name in roles}
    confidence = config.evaluation.confidence
    return {
        name: decide(config.gate, one, references, confidence=confidence, interval=config.evaluation.interval)
        for name, one in measured.items()
        if name not in roles
    }


def _write(
    out: Path,
    sets: Sequence[NamedSet],
    rates: Mapping[str, Rates],
    outcomes: Mapping[str, dict[str, list[Outcome]]],
    decisions: Mapping[str, Mapping[str, Any]],
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {one.name: one.kind for one in sets}
    rows = [
        {"model": name, "set": chosen, "kind": kinds[chosen], **asdict(outcome)}
        for name, found in outcomes.items()
        for chosen, some in found.items()
        for outcome in some
    ]
    table = pa.Table.from_pylist(rows)
    if all(row["votes"] is None for row in rows):
        table = table.drop_columns(["votes"])
    pq.write_table(table, out / TABLE)
    (out / RATES).write_text(json.dumps(rates, indent=1, ensure_ascii=False) + "\n")
    if decisions:
        write_atomic(out / DECISION, json.dumps(decisions, indent=1, ensure_ascii=False) + "\n")
