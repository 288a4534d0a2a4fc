"""`realign landscape`: how safe models stay as their weights move: figures, pictures, and where the models lie."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from components.errors import CheckpointError, ConfigError
from components.evaluation.execution import EvaluationExecution
from components.evaluation.outcomes import NamedSet
from components.evaluation.settings import EvaluationSettings
from components.landscape.settings import Scan
from pipelines.config import load_sections
from pipelines.display import teller
from pipelines.evaluated_models import Named, Runtime, check_models, named_models
from pipelines.landscape_axes import Options, asked_settings, scans_of, with_targets
from pipelines.landscape_files import RESULT, forget, remove_earlier, require_apart, state_dir, write_result
from pipelines.landscape_section import LandscapeSection, named_tasks, set_problems
from pipelines.sections import EvaluationSection

if TYPE_CHECKING:
    from components.checkpoints.reference import Checkpoint
    from components.checkpoints.source import TensorSource
    from components.evaluation.capability.settings import CapabilitySettings
    from components.evaluation.prompts import PromptSet
    from components.landscape.schema import LandscapeResult


class LandscapeConfig(BaseModel):
    """What `realign landscape` takes of a file: a run config's `evaluation` section, and `landscape` where it is there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    evaluation: EvaluationSection
    landscape: LandscapeSection | None = None


@dataclass(frozen=True)
class _Drawing:
    """All that is drawn, of all models."""

    given: Sequence[Named]
    models: Sequence[Named]
    """Those, and what else axes lead to."""
    scans: Sequence[Scan]
    sets: Sequence[PromptSet]
    settings: EvaluationSettings
    capability: CapabilitySettings | None
    runtime: Runtime
    out: Path

    @property
    def measured(self) -> list[NamedSet]:
        """All that a point says something of."""
        return [*self.sets, *(self.capability.tasks if self.capability is not None else ())]

    @property
    def drawn(self) -> list[Named]:
        """The models that have a landscape; the others are marked in theirs."""
        return [one for one in self.given if scans_of(self.scans, one.name)]

    def others(self, one: Named) -> list[Named]:
        """What axes lead to, or is marked, in a model's landscape."""
        return [other for other in self.models if other is not one]

    def state_dir(self, one: Named) -> Path:
        """See `landscape_files.state_dir`."""
        return state_dir(self.out, [one, *self.others(one)], self.runtime, self.settings.judge)


def landscape_command(
    models: Sequence[str], config: Path, out: Path, options: Options, runtime: Runtime, *, actors: int | None = None
) -> None:
    """Measure, write, print. `actors`: None takes as many as there are CPUs, on the CPU. Raises RealignError."""
    drawing = _prepared(models, config, out, options, runtime, actors)
    states = {one.name: drawing.state_dir(one) for one in drawing.drawn}
    remove_earlier(out, drawing.drawn, drawing.scans)
    from ray_jobs.submit import processes

    how = _execution(drawing.runtime)
    with processes(how):
        found = {one.name: _drawn(one, drawing, how, states[one.name]) for one in drawing.drawn}
    results = {name: result for name, (result, _) in found.items()}
    notes = [f"{name}, {note}" for name, (_, some) in found.items() for note in some]
    from components.reporting.landscape_page import write_pictures
    from pipelines.landscape_text import told_lines

    pictures = write_pictures(out, results, title=", ".join(results))
    paths = [str(out / name / RESULT) for name in results]
    sys.stdout.write("\n".join([*told_lines(results), *notes, *paths, *map(str, pictures)]) + "\n")
    forget(list(states.values()))


def _prepared(
    models: Sequence[str], config: Path, out: Path, options: Options, runtime: Runtime, actors: int | None
) -> _Drawing:
    """Everything that can be known before a model is loaded. Raises RealignError."""
    chosen = load_sections(config, LandscapeConfig)
    given = named_models(models)
    served = [one.place for one in given if one.served]
    if served:
        raise ConfigError(
            f"{', '.join(served)}: a landscape moves a model's weights, so they must lie in a directory here"
        )
    settings = asked_settings(options, chosen.landscape)
    problems = set_problems(settings.sets, chosen.evaluation)
    if problems:
        raise ConfigError("\n".join(problems))
    scans, named = with_targets(settings, given, Path() if options.axes else config.parent)
    drawn = [one for one in given if scans_of(scans, one.name)]
    if not drawn:
        raise ConfigError("nothing to draw: every axis leads to the only model there is; give another one")
    require_apart(out, drawn, named, runtime.base)
    runtime = replace(runtime, actors=actors or 1)
    _check_device(runtime)
    check_models(named, runtime)
    opened = _comparable(named, runtime)
    sets = _prompts(chosen.evaluation, settings.sets, settings.limit)
    fields = {name: getattr(chosen.evaluation, name) for name in EvaluationSettings.model_fields if name != "sets"}
    asked = EvaluationSettings(**{**fields, "dtype": runtime.dtype or chosen.evaluation.dtype})
    _require_judge(asked, runtime)
    capability = named_tasks(settings.sets, chosen.evaluation.capability)
    _require_tasks(capability)
    if actors is None:
        runtime = replace(runtime, actors=_default_actors(runtime, scans, opened, asked))
    return _Drawing(given, named, scans, sets, asked, capability, runtime, out)


def _default_actors(runtime: Runtime, scans: Sequence[Scan], model: Checkpoint, settings: EvaluationSettings) -> int:
    """On the CPU as many as there are CPUs, points, and room in the memory for: each has a judge of its own, and the model
    twice, as it came and as it is moved."""
    if runtime.device != "cpu":
        return 1
    import torch

    from components.evaluation.judges.models import resident_bytes
    from components.limits import available_cpus, available_memory
    from components.masks.memory import PROCESS_HOST

    points: int = sum(scan.directions * scan.points ** len(scan.axes) for scan in scans)
    numel = sum(model.source.spec(name).numel for name in model.source.names())
    dtype: torch.dtype = getattr(torch, settings.dtype)
    each = PROCESS_HOST + 2 * numel * dtype.itemsize + resident_bytes(settings.judge)
    return max(1, min(available_cpus(), points, available_memory() // each))


def _check_device(runtime: Runtime) -> None:
    if runtime.device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {runtime.device}: points are measured on cpu or cuda, which of the GPUs Ray says")


def _comparable(models: Sequence[Named], runtime: Runtime) -> Checkpoint:
    """The first of models with the same tensors. Raises CheckpointError with all that keeps models from lying in one landscape:
    an axis, or a mark, is a difference."""
    from components.checkpoints.compare import compare

    opened = [(one.name, _checkpoint(Path(one.place).resolve(), runtime.base)) for one in models]
    (first, reference), *others = opened
    differing = {name: found for name, other in others if (found := compare(reference, other))}
    if differing:
        told = [
            f"{name} and {first} do not lie in one landscape: {'; '.join(found[:8])}"
            for name, found in differing.items()
        ]
        raise CheckpointError("\n".join(told))
    return reference


def _prompts(evaluation: EvaluationSection, names: Sequence[str], limit: int | None) -> list[PromptSet]:
    from components.evaluation.prompts import load_prompt_set
    from ray_jobs.landscape_trials import shortened

    tested = [one for one in evaluation.sets if one.split == "test"]
    asked = [one for one in tested if (one.name in names if names else one.counts)]
    return list(shortened([load_prompt_set(one) for one in asked], limit))


def _require_judge(settings: EvaluationSettings, runtime: Runtime) -> None:
    from components.evaluation.judges import make_judge
    from components.evaluation.judges.apis import require_apis

    make_judge(settings.judge, runtime.judging)
    require_apis(settings.judge)


def _require_tasks(capability: CapabilitySettings | None) -> None:
    if capability is not None:
        from components.evaluation.capability.tasks import load_tasks

        load_tasks(capability)


def _execution(runtime: Runtime) -> EvaluationExecution:
    device: Any = runtime.device
    return EvaluationExecution(actors=runtime.actors, device=device, devices=runtime.devices)


def _drawn(one: Named, drawing: _Drawing, how: EvaluationExecution, state: Path) -> tuple[LandscapeResult, list[str]]:
    """One model's landscape, which is written when it is whole, and what else is to be said of it."""
    import torch

    from components.landscape.points import unscored_notes
    from components.landscape.result import landscape_result
    from ray_jobs.actors import Place
    from ray_jobs.landscape_trials import Surveying, survey_points

    runtime, path = drawing.runtime, Path(one.place).resolve()
    base = runtime.base.resolve() if runtime.base is not None else None
    scans = scans_of(drawing.scans, one.name)
    points, marks = survey_points(
        Surveying(
            place=Place(path, base=base, tokenizer_dir=_checkpoint(path, base).tokenizer_dir),
            sources={other.name: partial(_source, Path(other.place).resolve(), base) for other in drawing.others(one)},
            scans=scans,
            sets=tuple(drawing.sets),
            settings=drawing.settings,
            batch_size=runtime.batch_size,
            threads=max(1, torch.get_num_threads() // runtime.actors),  # of those that this process was given
            judging=runtime.judging,
            capability=drawing.capability,
        ),
        how,
        state_dir=state,
        progress=teller(one.name, "points"),
    )
    result = landscape_result(
        model=one.name,
        scans=scans,
        points=points,
        sets=drawing.measured,
        marks=marks,
        confidence=drawing.settings.confidence,
    )
    write_result(drawing.out, one.name, result, points)
    return result, unscored_notes(points)


def _checkpoint(path: Path, base: Path | None) -> Checkpoint:
    from components.checkpoints.reference import open_checkpoint

    # Whoever gives a base says that adapters are over it, whatever name they have for it.
    return open_checkpoint(path, base=base, base_declared_equal=True)


def _source(path: Path, base: Path | None) -> TensorSource:
    """A model's weights, in whichever process asks."""
    return _checkpoint(path, base).source
