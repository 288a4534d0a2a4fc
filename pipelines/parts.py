"""A run in parts, for a pipeline whose steps each run several stages: what is once, what is for each finetune, in which order.

All of it follows from the graph. Configs here are `far` ones: nothing is looked for on this machine.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import yaml

from components.errors import ConfigError
from pipelines.config import RunConfig
from pipelines.graph import Node, expand

Level = tuple[str, ...]
"""Stages that one step runs, side by side as far as they do not stand on each other."""

LOST = ("failed", "skipped")
"""How a node ends that nothing can stand on."""


@dataclass(frozen=True)
class Parts:
    """Levels of stages, each standing on those before it."""

    mode: Literal["each", "merge"]
    once: tuple[Level, ...]
    """Of the run, standing on no finetune: beside the loops."""
    finetune: tuple[Level, ...]
    """For each finetune. With mode `each` this is its whole chain."""
    joined: tuple[Level, ...]
    """Of the run, standing on finetunes: after that loop."""
    merge: tuple[Level, ...]
    """For each merge; mode `merge` alone."""

    def lacking(self, other: Parts) -> list[str]:
        """What `other` has in any place and these do not."""
        places = ("once", "finetune", "joined", "merge")
        found = {place: _stages(getattr(other, place)) - _stages(getattr(self, place)) for place in places}
        return sorted({stage for stages in found.values() for stage in stages})


def _stages(levels: Sequence[Level]) -> set[str]:
    return {stage for level in levels for stage in level}


def parts_of(config: RunConfig, first: str = "load_aligned") -> Parts:
    """The parts of a run, but for the node `first`, which is made before all of them."""
    nodes = [node for node in expand(config, far=True) if node.step.kind == "stage" and node.id != first]
    finetunes = {finetune.name for finetune in config.finetunes}
    return Parts(
        mode=config.mode,
        once=levels([n for n in nodes if n.finetune is None and not n.joins]),
        finetune=levels([n for n in nodes if n.finetune in finetunes]),
        joined=levels([n for n in nodes if n.finetune is None and n.joins]),
        merge=levels([n for n in nodes if n.finetune is not None and n.finetune not in finetunes]),
    )


def levels(nodes: Sequence[Node]) -> tuple[Level, ...]:
    """Stages of these nodes in an order that works. Those that stand on each other (a model's evaluation and the export of an
    adapter, which is evaluated itself) are in one level."""
    stage_of = {node.id: node.step.stage for node in nodes}
    above = {stage: {stage} for stage in dict.fromkeys(stage_of.values())}
    for _ in above:  # as many rounds as the longest way could need
        for node in nodes:
            for _, parent in node.parents:
                if parent in stage_of:
                    above[node.step.stage] |= above[stage_of[parent]]

    def depth(stage: str) -> int:
        return 1 + max((depth(one) for one in above[stage] if stage not in above[one]), default=-1)

    depths = {stage: depth(stage) for stage in above}
    return tuple(tuple(s for s in above if depths[s] == d) for d in sorted(set(depths.values())))


def to_do(nodes: Sequence[Node], lost: Collection[str], of: str | None, stages: Collection[str]) -> list[Node]:
    """Nodes of a model (None: of the run) and of these stages that can be made, as the driver would see it: those that stand on
    nothing that is `lost` (ids of nodes)."""
    bad = set(lost)
    for node in nodes:
        joining = {parent for role, parent in node.parents if ":" in role} if node.finetune is None else set()
        if ({parent for _, parent in node.parents} - joining) & bad or (joining and len(joining - bad) < 2):
            bad.add(node.id)
    mine = [node for node in nodes if node.finetune == of and node.step.kind == "stage" and node.step.stage in stages]
    return [node for node in mine if node.id not in bad]


def narrowed(text: str, finetunes: str) -> str:
    """A run config's text with those finetunes alone that the list (commas between; empty: all) names, and the merges that are
    made of nothing else. Raises ConfigError for names that are not there."""
    wanted = [name.strip() for name in finetunes.split(",") if name.strip()]
    if not wanted:
        return text
    config = yaml.safe_load(text)
    there = [one["name"] for one in config["finetunes"]]
    unknown = [name for name in wanted if name not in there]
    if unknown:
        raise ConfigError(f"finetunes: {', '.join(unknown)} is not in the config (there: {', '.join(there)})")
    config["finetunes"] = [one for one in config["finetunes"] if one["name"] in wanted]
    if "merges" in config:
        config["merges"] = [one for one in config["merges"] if set(one.get("of") or there) <= set(wanted)]
    kept = {*wanted, *(one["name"] for one in config.get("merges", ()))}
    tuned = (config.get("fusion") or {}).get("tuned")
    if tuned:
        config["fusion"]["tuned"] = {name: settings for name, settings in tuned.items() if name in kept}
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
