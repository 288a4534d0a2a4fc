"""The sections of a run config, each checked by itself: files that exist, values that fit.

Light on purpose: pydantic only, so that the command line answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from components.errors import ConfigError
from components.evaluation.capability.settings import CapabilitySettings, CapabilityTask
from components.evaluation.execution import EvaluationExecution
from components.evaluation.gates import VISAGE, Requirement
from components.evaluation.judges.settings import JudgeExecution, Judging, OwnModel, PhraseSettings, with_each
from components.evaluation.outcomes import NamedSet, metrics_of
from components.evaluation.settings import EvaluationSettings, SetSettings
from components.fusion.merge_settings import MergeSettings
from components.masks.data import PreferenceData
from components.masks.presets import resolve
from components.masks.settings import MaskSettings
from components.masks.zero import MaskExecution
from pipelines.tuned_section import TunedSettings
from ray_jobs.cluster import ClusterExecution


def is_far(info: ValidationInfo) -> bool:
    """Whether the config is one for another machine, whose disks are not looked at."""
    return bool((info.context or {}).get("far"))


def _absolute(path: Path, info: ValidationInfo) -> Path:
    if is_far(info):
        if not path.is_absolute():
            raise ValueError(f"{path} is relative to this file, which stays here: give the path that the cluster has")
        return path
    base: Path = (info.context or {}).get("base", Path())
    return base / path.expanduser()


def _existing_directory(path: Path, info: ValidationInfo) -> Path:
    path = _absolute(path, info)
    if not is_far(info) and not path.is_dir():
        raise ValueError(f"no directory {path}; give the path of a checkpoint directory, relative to the config file")
    return path


def _existing_file(path: Path, info: ValidationInfo) -> Path:
    path = _absolute(path, info)
    if not is_far(info) and not path.is_file():
        raise ValueError(f"no file {path}; give a path relative to the config file")
    return path


CheckpointDirectory = Annotated[Path, AfterValidator(_existing_directory)]
DataFile = Annotated[Path, AfterValidator(_existing_file)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Control = Literal["paper", "interpolation", "resta", "random_mask"]


def is_adapter(path: Path) -> bool:
    """Whether a directory holds a LoRA adapter, not a model."""
    return (path / "adapter_config.json").is_file()


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FinetuneConfig(Section):
    """One finetune of the aligned model."""

    name: Name
    path: CheckpointDirectory
    """A full checkpoint, or a PEFT LoRA adapter directory."""
    base_equal: bool = False
    """Declare that the base which an adapter names is the aligned model under another name."""
    anchor: DataFile | None = None
    """Unlabelled prompts (JSONL, chat `messages`) of what the finetune is used for; the mask is held to its answers there."""
    mask_of: Name | None = None
    """Another finetune of this run whose mask is used here too: nothing is trained for this one (the paper's transfer)."""
    sets: tuple[str, ...] = ()
    """Names of the task sets that measure this finetune's skill."""

    @property
    def is_adapter(self) -> bool:
        """Whether a LoRA adapter lies there."""
        return is_adapter(self.path)


class MergeConfig(MergeSettings):
    """One merge of several finetunes, realigned as one model."""

    name: Name
    of: tuple[Name, ...] = ()
    """Names of the finetunes; all of them where none is named."""


def _existing_data(data: PreferenceData, info: ValidationInfo) -> PreferenceData:
    files = {name: getattr(data, name) for name in ("file", "prompts")}
    found = {name: _existing_file(path, info) for name, path in files.items() if path is not None}
    return data.model_copy(update=found)


Preferences = Annotated[PreferenceData, AfterValidator(_existing_data)]


class MaskSection(Section):
    """Which data the mask is trained on, and how."""

    preset: Literal["realign", "paper"] = "realign"
    track: Literal["weights", "factors"] = "weights"
    """What is masked. weights: every tensor of the model. factors: A and B of LoRA adapters, each by itself; `aligned` is then
    the safety LoRA over `aligned_base`, the finetunes are LoRAs that continued it, and adapters come out."""
    preferences: Preferences
    """Preference pairs: a file of them (JSONL, JSON, CSV, parquet), `{hub: owner/name, revision: commit, split: train}`, or
    `{prompts: file}`, from which the models make pairs. `components/masks/shapes.py` has the columns that are understood."""
    preferences_dev: Preferences | None = None
    """Held-out pairs in any of these ways, measured and never trained on."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Overrides of the preset, e.g. `{steps: 300}`."""

    @model_validator(mode="after")
    def _known_settings(self) -> MaskSection:
        try:
            settings = resolve(self.preset, self.settings)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        made = any(data is not None and data.prompts for data in (self.preferences, self.preferences_dev))
        if made and settings.pair_new_tokens >= settings.max_length:
            raise ValueError(
                f"settings.pair_new_tokens ({settings.pair_new_tokens}) leaves no prompt any room in settings.max_length "
                f"({settings.max_length})"
            )
        return self

    @property
    def resolved(self) -> MaskSettings:
        return resolve(self.preset, self.settings)

    @property
    def published(self) -> MaskSettings:
        """The control `paper`: as published, in the number format that this run's models fit in."""
        return resolve("paper", {"dtype": self.resolved.dtype})


class AdapterSection(Section):
    """The realigned model of a finetune that came as a LoRA adapter leaves as one, too: the selected form's delta by
    truncated SVD, measured by itself."""

    rank: int | None = Field(default=None, ge=1)
    """Its rank; null: that of the finetune's adapter, tensor by tensor."""


class FusionSection(Section):
    """What is fused beside the realigned model, and which form is taken."""

    controls: tuple[Control, ...] = ()
    """Other ways to realign, made and measured the same way: `paper` (the published mask), `interpolation`, `resta` (needs
    `unaligned`), `random_mask` (as dense as the learned one, per tensor)."""
    select: Literal["auto", "soft", "binary", "tuned"] = "auto"
    """The form that is registered. auto: the tuned one where there is one, else the better one on the dev sets."""
    tuned: dict[Name, TunedSettings] = Field(default_factory=dict)
    """Finetune or merge -> settings of its own, made and measured as the form `tuned` beside soft and binary."""
    max_asr: float = Field(default=0.05, ge=0, le=1)
    """Attack success rate on dev that `auto` and the controls' scale search hold to, if any candidate does."""
    candidates: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        default=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), min_length=1
    )
    """Scales that interpolation (α) and RESTA (γ) are tried with on the dev sets."""
    adapter: AdapterSection | None = None
    """Write an adapter beside the full models, of every finetune that came as one."""


def _existing_set(chosen: SetSettings, info: ValidationInfo) -> SetSettings:
    found: dict[str, Any] = {"path": chosen.path and _existing_file(chosen.path, info)}
    if chosen.attack is not None and chosen.attack.path is not None:
        found["attack"] = chosen.attack.model_copy(update={"path": _existing_file(chosen.attack.path, info)})
    return chosen.model_copy(update=found)


def _existing_judge(judge: Judging, info: ValidationInfo) -> Judging:
    def placed(one: Judging) -> Judging:
        if not isinstance(one, OwnModel) or one.directory is None:
            return one
        path = _absolute(one.directory, info)
        if not is_far(info) and not path.is_dir():
            raise ValueError(
                f"judge {one.kind}: no directory {path}; give a model's directory, relative to the config file, or a model of "
                "the hub as owner/name with its revision"
            )
        return one.model_copy(update={"model": str(path)})

    return with_each(judge, placed)


def _existing_tasks(chosen: CapabilitySettings, info: ValidationInfo) -> CapabilitySettings:
    def existing(task: CapabilityTask) -> CapabilityTask:
        found = {
            "path": task.path and _existing_place(task.path, info),
            "train": task.train and _existing_file(task.train, info),
        }
        return task.model_copy(update=found)

    own = chosen.tasks_from and _existing_directory(chosen.tasks_from, info)
    return chosen.model_copy(update={"tasks": tuple(existing(task) for task in chosen.tasks), "tasks_from": own})


def _existing_place(path: Path, info: ValidationInfo) -> Path:
    found = _absolute(path, info)
    return found if found.is_dir() else _existing_file(path, info)


class EvaluationSection(EvaluationSettings):
    """EvaluationSettings, with files that exist and a set that looks at safety."""

    judge: Annotated[Judging, AfterValidator(_existing_judge)] = PhraseSettings()
    sets: tuple[Annotated[SetSettings, AfterValidator(_existing_set)], ...]
    capability: Annotated[CapabilitySettings, AfterValidator(_existing_tasks)] | None = None
    """Tasks of lm_eval, each a test set of kind task."""

    @model_validator(mode="after")
    def _complete(self) -> EvaluationSection:
        names = [(s.split, s.name) for s in self.sets]
        twice = sorted({f"{split} {name}" for split, name in names if names.count((split, name)) > 1})
        if twice:
            raise ValueError(f"sets with the same split and name: {', '.join(twice)}; rename one")
        tasks = {task.name for task in self.capability.tasks} if self.capability else set()
        both = sorted(tasks & {s.name for s in self.sets})
        if both:
            raise ValueError(f"capability tasks with the name of a set: {', '.join(both)}; give them another `name`")
        if not any(s.split == "test" and s.kind == "harmful" and s.counts for s in self.sets):
            raise ValueError(
                "no test set of kind harmful that counts: nobody looks at safety. Sets with an attack or a name that ends in "
                "_hard count with `headline: true` alone"
            )
        return self


def gate_problems(gate: Sequence[Requirement], evaluation: EvaluationSection) -> list[str]:
    """Requirements on sets that are not there, or on what no set measures: they would shut a gate for ever."""
    tested: list[NamedSet] = [one for one in evaluation.sets if one.split == "test"]
    tested += evaluation.capability.tasks if evaluation.capability else ()
    names = [one.name for one in tested]
    unknown = [r.set for r in gate if r.set is not None and r.set.partition("/")[0] not in names]
    problems = []
    if unknown:
        problems.append(f"gate: no test set {', '.join(dict.fromkeys(unknown))} (there: {', '.join(sorted(names))})")
    for one in gate:
        if one.set in unknown or one.metric == VISAGE:
            continue
        asked = [s for s in tested if (s.counts if one.set is None else s.name == one.set.partition("/")[0])]
        there = dict.fromkeys(metric for s in asked for metric in metrics_of(s.kind))
        if one.metric not in there:
            where = f"set {one.set}" if one.set is not None else "any set that counts (`headline`; `set` names another)"
            problems.append(f"gate: {one.metric} is not measured by {where}; there: {', '.join(there) or 'nothing'}")
    return problems


class TrackingSection(Section):
    """MLflow."""

    uri: str | None = None
    """Tracking server; by default the environment's MLFLOW_TRACKING_URI, or else an sqlite file in the workspace."""
    experiment: str | None = None
    """By default the run's name."""
    register_models: bool = Field(default=True, alias="register")
    """Register every realigned finetune as a model version."""
    promote: bool = False
    """Put every version whose gate passed in service (alias `champion`); needs a gate."""
    every_s: float = Field(default=30.0, ge=1)
    """A run that goes on, and what ended in it, is shown within so long, and as often tried again where nobody answers; a model
    whose stages have all ended is shown at once."""
    patience_s: float = Field(default=60.0, ge=0)
    """How long the end of a run waits for a server that is away."""


def _placed(execution: MaskExecution, info: ValidationInfo) -> MaskExecution:
    given = execution.offload_dir
    return execution.model_copy(update={"offload_dir": given and _absolute(given, info)})


class ExecutionSection(Section):
    """How, not what: changes no result beyond floating-point order."""

    threads: int = Field(default=1, ge=1)
    """CPU threads of each stage. Equal bytes are promised for an equal number."""
    workers: int | None = Field(default=None, ge=1)
    """CPUs that stages share; by default all of this machine."""
    batch_size: int = Field(default=256, ge=1)
    """Prompts generated together."""
    evaluation: EvaluationExecution = EvaluationExecution()
    """The processes and devices that answer prompts."""
    landscape: EvaluationExecution = EvaluationExecution()
    """Those that measure a landscape's points, each with a model of its own."""
    sweep: EvaluationExecution = EvaluationExecution()
    """Those that try a sweep's candidates, each with a model of its own."""
    judge: JudgeExecution = JudgeExecution()
    """Where judges with a model of their own run, and how."""
    mask: Annotated[MaskExecution, AfterValidator(_placed)] = MaskExecution()
    """The processes that train a mask together, and what of it each of them keeps."""
    cluster: ClusterExecution = ClusterExecution()
    """How the run shares a Ray cluster, where it is a job of one."""
