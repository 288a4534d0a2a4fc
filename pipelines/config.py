"""The run config: one short YAML. Everything wrong with it is reported together, with line and remedy, before any work.

Light on purpose: pydantic and yaml only, so that the command line answers at once.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from components.errors import ConfigError
from components.evaluation.capability.settings import CapabilitySettings, CapabilityTask
from components.evaluation.execution import EvaluationExecution
from components.evaluation.gates import Requirement
from components.evaluation.judges.settings import KINDS, JudgeExecution
from components.evaluation.outcomes import NamedSet
from components.evaluation.settings import SetSettings
from components.fusion.merge_settings import MergeSettings
from components.fusion.settings import NEEDS_UNALIGNED
from components.landscape.settings import RandomAxis, Scan, TowardsAxis
from components.masks.data import PreferenceData
from components.masks.zero import MaskExecution
from components.sweeps.settings import WAY, Objective, SweepSettings
from components.yaml_lines import LocatedYaml, Location
from pipelines.config_problems import mask_problems, merge_section_problems, track_problems
from pipelines.landscape_section import LandscapeSection, landscape_problems, visage_problems
from pipelines.sections import (
    AdapterSection,
    CheckpointDirectory,
    EvaluationSection,
    ExecutionSection,
    FinetuneConfig,
    FusionSection,
    MaskSection,
    MergeConfig,
    Name,
    Section,
    TrackingSection,
    gate_problems,
    is_far,
)
from pipelines.sweep_section import sweep_problems, sweeps_unaligned
from pipelines.tuned_section import TunedSettings, tuned_problems
from ray_jobs.cluster import ClusterExecution


class RunConfig(Section):
    """A run: the aligned model, its finetunes, and what to do with them."""

    name: Name
    aligned: CheckpointDirectory
    aligned_base: CheckpointDirectory | None = None
    """mask.track factors: the model that the adapters `aligned` and `finetunes` belong to."""
    aligned_base_equal: bool = False
    """Declare that the base which the adapter `aligned` names is `aligned_base` under another name."""
    unaligned: CheckpointDirectory | None = None
    """What the aligned model was made from; RESTA needs it."""
    finetunes: tuple[FinetuneConfig, ...]
    mode: Literal["each", "merge"] = "each"
    """`each`: every finetune is realigned by itself; `merge`: what `merges` makes of them is, under one shared mask."""
    merges: tuple[MergeConfig, ...] = ()
    mask: MaskSection
    fusion: FusionSection = FusionSection()
    evaluation: EvaluationSection
    landscape: LandscapeSection | None = None
    """How safe models stay as their weights move: drawn and scored (VISAGE) where the section is there."""
    sweep: SweepSettings | None = None
    """Which settings `realign sweep` tries. All that a run does with it is to load `unaligned` where a method needs it."""
    gate: Annotated[tuple[Requirement, ...], Field(min_length=1)] | None = None
    """What the selected form of every realigned model must show. A run whose gate is shut for one ends with status 3."""
    tracking: TrackingSection = TrackingSection()
    execution: ExecutionSection = ExecutionSection()

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo) -> RunConfig:
        problems = [] if self.finetunes else ["finetunes is empty: name at least one"]
        names = [f.name for f in self.finetunes]
        problems += [f"finetunes with the same name: {n}" for n in sorted({n for n in names if names.count(n) > 1})]
        problems += merge_section_problems(self)
        tasks = {s.name for s in self.evaluation.sets if s.kind == "task"}
        for finetune in self.finetunes:
            unknown = [s for s in finetune.sets if s not in tasks]
            if unknown:
                there = ", ".join(sorted(tasks)) or "none"
                problems.append(
                    f"finetune {finetune.name} names task sets that are not there: {unknown} (there: {there})"
                )
        if "resta" in self.fusion.controls and self.unaligned is None:
            problems.append("the control resta needs `unaligned`, the model that the aligned one was made from")
        problems += [] if is_far(info) else track_problems(self)
        problems += tuned_problems(self)
        if self.fusion.adapter is not None and not is_far(info) and not any(f.is_adapter for f in self.finetunes):
            problems.append(
                "fusion.adapter: no finetune is a LoRA adapter; remove it, full models leave as full models"
            )
        needs_dev = {"interpolation", "resta"} & set(self.fusion.controls)
        dev_harmful = any(s.split == "dev" and s.kind == "harmful" and s.counts for s in self.evaluation.sets)
        if not dev_harmful and (needs_dev or self.fusion.select == "auto"):
            what = ", ".join(sorted(needs_dev)) or "fusion.select: auto"
            problems.append(
                f"{what} chooses on dev sets: give evaluation.sets one of kind harmful with split dev that counts"
            )
        own = {f.name for f in self.finetunes if f.mask_of is None}
        for finetune in self.finetunes:
            if finetune.mask_of is not None and finetune.mask_of not in own:
                problems.append(
                    f"finetune {finetune.name}: mask_of names {finetune.mask_of}, which trains no mask of its own here "
                    f"(those that do: {', '.join(sorted(own)) or 'none'})"
                )
        problems += gate_problems(self.gate or (), self.evaluation)
        problems += self._promotion_problems()
        problems += visage_problems(self.gate or (), self.landscape, self.evaluation)
        if self.landscape is not None:
            problems += landscape_problems(
                self.landscape, self.evaluation, self.execution, unaligned=self.unaligned is not None
            )
        problems += mask_problems(self)
        if self.sweep is not None and not problems:
            problems = sweep_problems(self)
        if problems:
            raise PydanticCustomError(_PROBLEMS, "{said}", {"said": "; ".join(problems), "each": problems})
        return self

    def _promotion_problems(self) -> list[str]:
        if not self.tracking.promote:
            return []
        missing = ["`gate`, which says when a model may serve"] if self.gate is None else []
        missing += [] if self.tracking.register_models else ["tracking.register: true"]
        return [f"tracking.promote needs {' and '.join(missing)}"] if missing else []

    @property
    def needs_unaligned(self) -> bool:
        """Whether anything is made with the model that the aligned one was made from."""
        leads_to = self.landscape.models if self.landscape is not None else ()
        tuned = any(one.method in NEEDS_UNALIGNED for one in self.fusion.tuned.values())
        tuned = tuned or sweeps_unaligned(self)
        return tuned or "resta" in self.fusion.controls or "unaligned" in leads_to

    @property
    def base(self) -> Path:
        """What a finetune that is an adapter is an adapter of."""
        return self.aligned_base or self.aligned

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of what is realigned: finetunes, or merges of them."""
        return tuple(t.name for t in (self.merges if self.mode == "merge" else self.finetunes))

    def merge_named(self, name: str | None) -> MergeConfig | None:
        """The merge of that name, None where it is a finetune's."""
        return next((m for m in self.merges if m.name == name), None)

    def members(self, name: str) -> tuple[FinetuneConfig, ...]:
        """The finetunes that a target is made of: itself, or those that are merged, in the config's order."""
        merge = self.merge_named(name)
        if merge is None:
            return tuple(f for f in self.finetunes if f.name == name)
        return tuple(f for f in self.finetunes if not merge.of or f.name in merge.of)

    def mask_owner(self, name: str) -> str:
        """The finetune whose mask it takes: itself, unless it says otherwise."""
        return next((f.mask_of for f in self.finetunes if f.name == name and f.mask_of is not None), name)

    def sets_of(self, name: str | None) -> tuple[SetSettings, ...]:
        """Sets that a finetune or merge is measured on; all of them for the aligned model (None)."""
        if name is None:
            return self.evaluation.sets
        own = {s for finetune in self.members(name) for s in finetune.sets}
        return tuple(s for s in self.evaluation.sets if s.kind != "task" or s.name in own)

    def tested_on(self, name: str | None) -> list[NamedSet]:
        """What its rates are over: its test sets, and lm_eval's tasks."""
        capability = self.evaluation.capability
        sets: list[NamedSet] = [s for s in self.sets_of(name) if s.split == "test"]
        return [*sets, *(capability.tasks if capability is not None else ())]


def load_config(path: Path, *, text: str | None = None, far: str | None = None) -> RunConfig:
    """Read and check a run config. Raises one ConfigError that lists everything wrong with it.

    `text`: of one that is in no file; `path` is but its name in messages. `far`: the same of one for another machine. What its
    paths name is not looked for here, so they must be absolute, and nothing is known of adapters.
    """
    text = text if far is None else far
    document = LocatedYaml(path, meant="a run config is a mapping of sections (name, aligned, finetunes, …)", text=text)
    context = {"base": path.resolve().parent} if far is None else {"far": True}
    try:
        return RunConfig.model_validate(document.data, context=context)
    except ValidationError as e:
        raise ConfigError("\n".join(f"{path}:{line}: {text}" for line, text in sorted(_located(document, e)))) from e


T = TypeVar("T", bound=BaseModel)
_PROBLEMS = "problems"
"""Kind of a finding that is several, each in words."""


def load_sections(path: Path, into: type[T]) -> T:
    """Those sections that a command takes (the fields of `into`); the others of a run config are left alone. Raises
    ConfigError that lists everything wrong."""
    document = LocatedYaml(path, meant="give a mapping with a section `evaluation`, as a run config has it")
    known = {field.alias or name for name, field in RunConfig.model_fields.items()}
    data = {key: value for key, value in document.data.items() if key not in known or key in into.model_fields}
    try:
        return into.model_validate(data, context={"base": path.resolve().parent})
    except ValidationError as error:
        problems = _located(document, error)
    raise ConfigError("\n".join(f"{path}:{line}: {text}" for line, text in sorted(problems)))


def _located(document: LocatedYaml, found: ValidationError) -> list[tuple[int, str]]:
    """Line and sentence of everything that is wrong."""
    errors = found.errors()
    said = []
    for one in errors:
        location: Location = tuple(one["loc"])
        inner = [other["loc"][: len(location)] == location for other in errors if other is not one]
        if one["type"] == "too_short" and any(inner):
            continue  # it would be long enough if its parts were right
        if one["type"] == _PROBLEMS:  # each names the place that it speaks of
            each = one["ctx"]["each"]
            said += [(document.line(tuple(problem.partition(": ")[0].split("."))), problem) for problem in each]
        else:
            said.append((document.line(location), sentence(one)))
    return said


def sentence(error: Any) -> str:
    """One of pydantic's findings in words."""
    location: Location = tuple(error["loc"])
    where = ".".join(str(part) for part in location if not str(part).endswith(WAY))
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key{_suggestion(location)}"
    if error["type"] == "missing":
        return f"{where}: missing; add it"
    message = re.sub(r"^Value error, ", "", str(error["msg"])).replace("valid tuple", "list")
    given = "" if error["type"] == "value_error" else f" (given: {error['input']!r})"
    return f"{where}: {message}{given}" if where else f"{message}{given}"


_EXECUTION = {
    "evaluation": EvaluationExecution,
    "landscape": EvaluationExecution,
    "sweep": EvaluationExecution,
    "judge": JudgeExecution,
    "mask": MaskExecution,
    "cluster": ClusterExecution,
}


def _suggestion(location: Location) -> str:
    """` (did you mean 'aligned'?)`, or the keys there are."""
    model: Any = RunConfig
    how = location[:1] == ("execution",)
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        model = {
            "finetunes": FinetuneConfig,
            "merges": MergeConfig,
            "mask": MaskSection,
            "preferences": PreferenceData,
            "preferences_dev": PreferenceData,
            "fusion": FusionSection,
            "adapter": AdapterSection,
            "tuned": TunedSettings,
            "sweep": SweepSettings,
            "objectives": Objective,
            "merge": MergeSettings,
            "evaluation": EvaluationSection,
            "sets": SetSettings,
            "gate": Requirement,
            **KINDS,
            "capability": CapabilitySettings,
            "tasks": CapabilityTask,
            "landscape": LandscapeSection,
            "scans": Scan,
            "random": RandomAxis,
            "towards": TowardsAxis,
            "tracking": TrackingSection,
            "execution": ExecutionSection,
            **(_EXECUTION if how else {}),
        }.get(part, model)
    keys = [field.alias or name for name, field in model.model_fields.items()]
    close = difflib.get_close_matches(str(location[-1]), keys, n=1)
    return f" (did you mean '{close[0]}'?)" if close else f" (there are: {', '.join(keys)})"
