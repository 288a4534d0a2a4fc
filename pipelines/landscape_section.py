"""The section `landscape` of a run config: whose landscapes are drawn, and which scans each of them has.

Light on purpose: pydantic only, so that the command line answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from pydantic import Field

from components.evaluation.capability.settings import CapabilitySettings
from components.evaluation.gates import VISAGE, Requirement
from components.evaluation.judges.settings import Judging, OwnModel, judges_in
from components.evaluation.settings import SetSettings
from components.landscape.settings import LandscapeSettings, Scan, TowardsAxis
from pipelines.sections import EvaluationSection, ExecutionSection

Model = Literal["aligned", "finetune", "realigned"]
Drawn = Literal["aligned", "before", "between", "realigned"]
"""Variants of the stage: the aligned model once; the finetune; the aligned model on its way to a finetune and the realigned
model; the realigned model."""
KNOWN: dict[Drawn, tuple[str, ...]] = {
    "aligned": ("unaligned",),
    "before": ("aligned", "unaligned"),
    "between": ("finetune", "realigned", "unaligned"),
    "realigned": ("aligned", "finetune", "unaligned"),
}
"""Variant -> what its axes can lead to. A finetune's knows no realigned model: it would be drawn anew for every mask."""
_CENTRE: dict[Drawn, Model] = {
    "aligned": "aligned",
    "before": "finetune",
    "between": "aligned",
    "realigned": "realigned",
}


class LandscapeSection(LandscapeSettings):
    """What is drawn, and of which of a run's models.

    In a run an axis leads to `aligned`, `finetune`, `realigned` or `unaligned`. A scan is left out for models that it cannot be
    drawn of. From the aligned model to a finetune or a realigned one it is drawn for each finetune, with the others marked in
    it; from a finetune to its realigned model it is not drawn.
    """

    drawn: tuple[Model, ...] = Field(default=get_args(Model), alias="models", min_length=1)
    """Of which models; `realign landscape` draws those on its command line."""

    def scans_of(self, variant: str) -> tuple[Scan, ...]:
        """The scans of a variant of the stage; none where it is not drawn."""
        chosen: Drawn = variant  # type: ignore[assignment]
        if _CENTRE[chosen] not in self.drawn:
            return ()
        return tuple(scan for scan in self.scans if _drawable(scan, chosen))

    def sets_of(self, sets: Sequence[SetSettings], *, whose: str | None) -> list[SetSettings]:
        """Those of a model's test sets that are asked: the named ones, else those that count; of the aligned model (`whose` is
        None) no task sets but named ones: they are the finetunes'."""
        tested = [one for one in sets if one.split == "test"]
        if self.sets:
            return [one for one in tested if one.name in self.sets]
        return [one for one in tested if one.counts and (one.kind != "task" or whose is not None)]

    def capability_of(self, capability: CapabilitySettings | None) -> CapabilitySettings | None:
        """See `named_tasks`."""
        return named_tasks(self.sets, capability)

    @property
    def visage_scan(self) -> Scan | None:
        """The scan whose VISAGE is the model's: the first with random axes alone."""
        return next((one for one in self.scans if not _leads_to(one)), None)


def _leads_to(scan: Scan) -> set[str]:
    return {axis.model for axis in scan.axes if isinstance(axis, TowardsAxis)}


def _drawable(scan: Scan, variant: Drawn) -> bool:
    leads_to = _leads_to(scan)
    if not leads_to <= set(KNOWN[variant]):
        return False
    return variant != "between" or bool(leads_to & {"finetune", "realigned"})


def named_tasks(named: Sequence[str], capability: CapabilitySettings | None) -> CapabilitySettings | None:
    """lm_eval's tasks that a landscape asks at every point: those that `sets` names, for most are too long for that."""
    tasks = tuple(task for task in capability.tasks if task.name in named) if capability is not None else ()
    return capability.model_copy(update={"tasks": tasks}) if capability is not None and tasks else None


def landscape_problems(
    section: LandscapeSection, evaluation: EvaluationSection, execution: ExecutionSection, *, unaligned: bool
) -> list[str]:
    """What a run cannot draw. `unaligned`: whether it has that model."""
    problems = []
    names = sorted({name for names in KNOWN.values() for name in names})
    for scan in section.scans:
        unknown = sorted(_leads_to(scan) - set(names))
        if unknown:
            problems.append(
                f"landscape: scan {scan.name} leads to {', '.join(unknown)}; in a run an axis leads to {', '.join(names)}"
            )
        elif "unaligned" in _leads_to(scan) and not unaligned:
            problems.append(
                f"landscape: scan {scan.name} needs `unaligned`, the model that the aligned one was made from"
            )
        elif not any(scan in section.scans_of(variant) for variant in KNOWN):
            problems.append(
                f"landscape: scan {scan.name} leads to {', '.join(sorted(_leads_to(scan)))} and is drawn of none of the models "
                f"{', '.join(section.drawn)}; a model is not drawn towards itself, nor a finetune towards its realigned model"
            )
    return problems + set_problems(section.sets, evaluation) + _judge_problems(execution, evaluation.judge)


def _judge_problems(execution: ExecutionSection, judge: Judging) -> list[str]:
    """A judge's model that no actor could load: Ray shows GPUs only to those that asked for one."""
    own = any(isinstance(one, OwnModel) for one in judges_in(judge))
    how = execution.landscape
    if not own or execution.judge.device == "cpu" or how.device != "cpu" or how.in_process:
        return []
    return [
        f"execution.judge.device: {execution.judge.device}: every actor of execution.landscape loads the "
        "judge's model and has no GPU; set execution.landscape.device: cuda, or the judge's to cpu"
    ]


def set_problems(named: Sequence[str], evaluation: EvaluationSection) -> list[str]:
    """What is wrong with the sets that a landscape is to ask."""
    tested = {one.name: one for one in evaluation.sets if one.split == "test"}
    tasks = {task.name for task in evaluation.capability.tasks} if evaluation.capability is not None else set()
    problems = []
    unknown = [name for name in named if name not in tested and name not in tasks]
    if unknown:
        problems.append(
            f"landscape.sets: no test set {', '.join(unknown)} (there: {', '.join(sorted([*tested, *tasks]))})"
        )
    elif named and not any(tested[name].kind == "harmful" for name in named if name in tested):
        problems.append("landscape.sets: none of kind harmful; a safety landscape is drawn of harmful requests")
    return problems


def visage_problems(
    gate: Sequence[Requirement], section: LandscapeSection | None, evaluation: EvaluationSection
) -> list[str]:
    """Requirements on VISAGE that no landscape of the run would meet or miss."""
    wanted = [one for one in gate if one.metric == VISAGE]
    if not wanted:
        return []
    if section is None:
        return ["gate: visage needs the section `landscape`"]
    if section.visage_scan is None:
        return ["gate: visage needs a scan of random axes in `landscape`"]
    if section.visage_scan.directions < 2:
        return [
            f"gate: visage needs two or more `directions` of scan {section.visage_scan.name}: one says nothing of others"
        ]
    problems = []
    for one in wanted:
        whose: Model = one.than if one.than in ("aligned", "finetune") else "realigned"
        problems += [
            f"gate: {one} needs landscape.models with {model}"
            for model in dict.fromkeys(("realigned", whose))
            if model not in section.drawn
        ]
        asked = [s.name for s in section.sets_of(evaluation.sets, whose=None) if s.kind == "harmful"]
        if one.set is not None and one.set not in asked:
            problems.append(f"gate: the landscape asks no harmful set {one.set} (it asks {', '.join(asked)})")
    return problems
