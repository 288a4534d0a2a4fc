"""From a run to the sweeps of its finetunes or merges: what is tried on which models, and what earlier sweeps of them say."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.errors import EvaluationError, StorageError
from components.evaluation.judges.settings import semantics_and_execution
from components.evaluation.prompts import load_prompt_set
from components.evaluation.settings import EvaluationSettings
from components.records import Record
from components.storage import storage_errors, write_atomic
from components.sweeps.front import pareto_front
from components.sweeps.trials import (
    TRIALS_FILE,
    Candidate,
    Scored,
    candidate_key,
    models_identity,
    read_trials,
    study_identity,
)
from pipelines.driver import RunState
from pipelines.graph import Node
from pipelines.specs import place_of
from pipelines.sweep_section import OWN, defaults_of, dev_sets, settings_of, space_of
from ray_jobs.sweep_trials import Sweeping, in_space

SWEEPS = "sweeps"
"""The folder in a workspace."""
_STEPS = ("load_aligned", "load_unaligned", "load", "merge", "train_mask")
_EARLIER_SHARE = 4
"""At most every fourth candidate is one that did well on other prompts."""


@dataclass(frozen=True)
class Target:
    """A finetune or merge that is swept."""

    name: str
    sweeping: Sweeping
    directory: Path
    """Where its candidates are kept."""
    earlier: list[Candidate]
    """What did well on other prompts."""

    def started_ms(self) -> int:
        """When the first try of its candidates began, since the epoch: now, where none has. One process at a time. Raises
        StorageError."""
        path = self.directory / "started"
        with storage_errors(path):
            if not path.exists():
                write_atomic(path, f"{int(time.time() * 1000)}\n")
            said = path.read_text()
        if not said.strip().isdecimal():
            raise StorageError(f"{path}: not a time in milliseconds; remove it")
        return int(said)


def is_needed(node: Node) -> bool:
    """Whether a step of a run makes what sweeps look at."""
    return node.step.kind == "stage" and node.step.name in _STEPS


def target_of(run: RunState, name: str) -> Target:
    """Everything but the model itself. Raises RealignError: of the step that failed, DataError, StorageError."""
    parents = _parents(run, name)
    sweeping = sweeping_of(run, name, parents)
    models = models_identity({role: record.fingerprint for role, record in parents.items()})
    whole = study_identity(models, _asked(run, sweeping))
    folder = run.workspace.root / SWEEPS / name
    return Target(name, sweeping, folder / whole, _earlier(folder, models, whole, sweeping))


def sweeping_of(run: RunState, name: str, parents: Mapping[str, Record]) -> Sweeping:
    """What a process needs to try candidates."""
    config = run.config
    owner = parents["train_mask"]
    evaluation = config.evaluation
    fields = {field: getattr(evaluation, field) for field in EvaluationSettings.model_fields if field != "sets"}
    return Sweeping(
        aligned=place_of(config, None),
        finetunes={one.name: place_of(config, one) for one in config.members(name)},
        unaligned={"path": str(config.unaligned)} if "load_unaligned" in parents else None,
        mask=run.result_dir(owner) / "mask",
        sets=tuple(load_prompt_set(one) for one in dev_sets(config, name)),
        evaluation=EvaluationSettings(**fields),
        sweep=settings_of(config, name),
        space=space_of(config, name),
        defaults=defaults_of(config, name),
        own=OWN,
        batch_size=config.execution.batch_size,
        threads=config.execution.threads,
        judging=config.execution.judge,
    )


def _parents(run: RunState, name: str) -> dict[str, Record]:
    """Records of what is fused, by role."""
    members = [one.name for one in run.config.members(name)]
    wanted = {"load_aligned": (None, "load_aligned"), "train_mask": (run.config.mask_owner(name), "train_mask")}
    wanted |= {f"load:{member}": (member, "load") for member in members}
    if "load_unaligned" in run.nodes:
        wanted["load_unaligned"] = (None, "load_unaligned")
    found = {role: run.record(*place) for role, place in wanted.items()}
    if missing := [role for role, record in found.items() if record is None]:
        failed = [state.complaint for state in run.nodes.values() if state.complaint]
        raise EvaluationError(f"sweep of {name}: {', '.join(missing)} is missing: {'; '.join(failed)}")
    return {role: record for role, record in found.items() if record is not None}


def _asked(run: RunState, sweeping: Sweeping) -> dict[str, Any]:
    """All that decides hits, but for the models and the candidate."""
    settings = sweeping.evaluation.model_dump(mode="json", exclude={"sets", "judge", "confidence", "interval"})
    judge, _ = semantics_and_execution(run.config.evaluation.judge, run.roots.files)
    return {
        "evaluation": {**settings, "judge": judge},
        "questions": sweeping.questions,
        "defaults": sweeping.defaults.model_dump(mode="json"),
    }


def _earlier(folder: Path, models: str, whole: str, sweeping: Sweeping) -> list[Candidate]:
    """The fronts of other sweeps of the same models, each candidate once. Files that are damaged say nothing."""
    found: dict[str, Candidate] = {}
    for path in sorted(folder.glob(f"{models}-*/{TRIALS_FILE}")):
        if path.parent.name == whole:
            continue
        try:
            scored = [one for one in read_trials(path) if one.stopped is None and in_space(one.candidate, sweeping)]
        except StorageError:
            continue
        found |= {candidate_key(one.candidate): one.candidate for one in _front(scored, sweeping) if one.candidate}
    return list(found.values())[: sweeping.sweep.trials // _EARLIER_SHARE]


def _front(scored: list[Scored], sweeping: Sweeping) -> list[Scored]:
    """By those of this sweep's objectives that they were asked."""
    known = [o for o in sweeping.sweep.objectives if all(one.hits.get(o.name) for one in scored)]
    return [scored[i] for i in pareto_front([one.losses(known) for one in scored])] if known else []
