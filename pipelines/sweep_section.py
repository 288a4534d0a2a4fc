"""The section `sweep` of a run config, held against what the run has. Light, so that the command line answers at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from components.evaluation.settings import SetSettings
from components.fusion.merge_settings import MergeSettings
from components.fusion.settings import NEEDS_UNALIGNED
from components.sweeps.checking import Given, complete_space, space_problems
from components.sweeps.settings import Space, SweepSettings, objective_problems
from components.sweeps.space import Tuning
from components.sweeps.trials import Candidate
from pipelines.tuned_section import form_settings

if TYPE_CHECKING:
    from pipelines.config import RunConfig

OWN: tuple[Candidate, ...] = ({}, {"form": "binary"})
"""The run's own two forms, soft and binary: always tried first, and in full."""


def defaults_of(config: RunConfig, name: str) -> Tuning:
    """How a finetune or merge is fused without a sweep: the form soft."""
    merge = config.merge_named(name)
    plain = merge and MergeSettings.model_validate(merge.model_dump(exclude={"name", "of"}))
    return Tuning(fusion=form_settings(config.mask.resolved, "soft"), merge=plain)


def given(config: RunConfig, name: str) -> Given:
    """What there is to fuse."""
    several = config.merge_named(name) is not None
    members = tuple(one.name for one in config.members(name)) if several else ()
    return Given(mask=True, unaligned=config.unaligned is not None, finetunes=members)


def dev_sets(config: RunConfig, name: str) -> list[SetSettings]:
    """What a sweep of a finetune or merge may look at."""
    return [one for one in config.sets_of(name) if one.split == "dev"]


def settings_of(config: RunConfig, name: str) -> SweepSettings:
    """The section, or its defaults; of objectives that nobody asked for those that a dev set measures."""
    section = config.sweep or SweepSettings()
    if "objectives" in section.model_fields_set:
        return section
    sets = dev_sets(config, name)
    measured = tuple(one for one in section.objectives if not objective_problems([one], sets))
    return section.model_copy(update={"objectives": measured}) if measured else section


def space_of(config: RunConfig, name: str) -> Space:
    """Complete: what makes sense for the run where the section says nothing."""
    return complete_space(settings_of(config, name).space, given(config, name), defaults_of(config, name))


def sweep_problems(config: RunConfig) -> list[str]:
    """Everything that keeps the section from being swept, each thing once."""
    if config.mask.track == "factors":
        return [
            "sweep: mask.track: factors is not swept: adapters' factors are not fused in memory; remove the section"
        ]
    problems: list[str] = []
    for name in config.targets:
        section = settings_of(config, name)
        found = space_problems(section.space, given(config, name), defaults_of(config, name))
        problems += [f"sweep.{one}" for one in found]
        problems += [
            f"sweep of {name}: {one}" for one in objective_problems(section.objectives, dev_sets(config, name))
        ]
    return list(dict.fromkeys(problems))


def sweeps_unaligned(config: RunConfig) -> bool:
    """Whether a method is tried that looks at the model which the aligned one was made from."""
    if config.sweep is None or config.unaligned is None:
        return False
    return any(not set(NEEDS_UNALIGNED).isdisjoint(_methods(space_of(config, name))) for name in config.targets)


def _methods(space: Space) -> tuple[object, ...]:
    values = space.get("method", ())
    return values if isinstance(values, tuple) else ()
