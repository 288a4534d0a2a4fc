"""What runs after what: one table, from which the driver and the Kubeflow pipeline are both made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipelines.config import RunConfig
from pipelines.tuned_section import inputs_of


@dataclass(frozen=True)
class Step:
    """A row of the table. Its name is also the role under which a child knows its record."""

    name: str
    stage: str
    """The stage (`ray_jobs.<stage>`) or, for an action, the action's name."""
    scope: Literal["run", "finetune", "merge", "model", "target"]
    """Once per run, for each finetune, each merge of finetunes, each of both, or each of those that are realigned. A run-scope
    step with finetune-scope parents joins those that succeeded."""
    parents: tuple[str, ...]
    kind: Literal["stage", "action"] = "stage"
    """A stage is skipped when its record exists; an action is always executed."""
    variant: str = ""
    """Which of the models (or masks) this row is about."""
    needs: str = ""
    """The control (or `adapter`, `gate`, `landscape`, `promote`, `tuned`, `unaligned`) that asks for this row; empty: always
    there."""


def _fused(variant: str, *parents: str, needs: str = "") -> tuple[Step, Step]:
    """Fuse a variant, then measure what was published."""
    fuse = Step(f"fuse_{variant}", "fuse", "target", ("load_aligned", "load", *parents), variant=variant, needs=needs)
    evaluate = Step(f"evaluate_{variant}", "evaluate", "target", (fuse.name,), variant=variant, needs=needs)
    return fuse, evaluate


_TUNED = ("fuse_tuned", "evaluate_tuned")
_CHOSEN = ("fuse_soft", "fuse_binary", "evaluate_soft", "evaluate_binary", *_TUNED)
"""What says which form is selected, and has it."""

STEPS: tuple[Step, ...] = (
    Step("load_aligned", "load", "run", ()),
    Step("load_unaligned", "load", "run", ("load_aligned",), needs="unaligned"),
    Step("load", "load", "finetune", ("load_aligned",)),
    # What a merge's other steps know as their `load`.
    Step("merge", "merge", "merge", ("load_aligned", "load")),
    Step("merge_tuned", "merge", "merge", ("load_aligned", "load"), variant="tuned", needs="tuned"),
    # The long ones first: rows are submitted in this order.
    Step("train_mask", "train_mask", "target", ("load_aligned", "load")),
    Step("train_mask_paper", "train_mask", "target", ("load_aligned", "load"), variant="paper", needs="paper"),
    Step("search_interpolation", "search_scale", "target", ("load_aligned", "load"), variant="interpolation",
         needs="interpolation"),
    Step("search_resta", "search_scale", "target", ("load_aligned", "load", "load_unaligned"), variant="resta",
         needs="resta"),
    Step("extract_delta", "extract_delta", "model", ("load_aligned", "load")),
    Step("compare_deltas", "compare_deltas", "run", ("load_aligned", "load")),
    Step("evaluate_aligned", "evaluate", "run", ("load_aligned",), variant="aligned"),
    Step("evaluate_before", "evaluate", "finetune", ("load_aligned", "load"), variant="before"),
    # A merge without a mask is on nobody's disk yet.
    Step("fuse_before", "fuse", "merge", ("load_aligned", "load"), variant="before"),
    Step("evaluate_before", "evaluate", "merge", ("fuse_before",), variant="before"),
    *_fused("soft", "train_mask"),
    *_fused("binary", "train_mask"),
    *_fused("tuned", "train_mask", "load_unaligned", needs="tuned"),
    *_fused("random_mask", "train_mask", needs="random_mask"),
    *_fused("interpolation", "search_interpolation", needs="interpolation"),
    *_fused("resta", "load_unaligned", "search_resta", needs="resta"),
    *_fused("paper_soft", "train_mask_paper", needs="paper"),
    *_fused("paper_binary", "train_mask_paper", needs="paper"),
    Step("export_adapter", "export_adapter", "target",
         ("load_aligned", "load", *_CHOSEN), needs="adapter"),
    Step("evaluate_adapter", "evaluate", "target", ("load_aligned", "export_adapter"), variant="adapter",
         needs="adapter"),
    Step("landscape_aligned", "landscape", "run", ("load_aligned", "load_unaligned"), variant="aligned",
         needs="landscape"),
    Step("landscape_before", "landscape", "finetune", ("load_aligned", "load", "load_unaligned"), variant="before",
         needs="landscape"),
    Step("landscape_between", "landscape", "target", ("load_aligned", "load", "load_unaligned", *_CHOSEN),
         variant="between", needs="landscape"),
    Step("landscape", "landscape", "target", ("load_aligned", "load", "load_unaligned", *_CHOSEN), variant="realigned",
         needs="landscape"),
    Step("gate", "gate", "target", ("evaluate_aligned", "evaluate_before", "evaluate_soft", "evaluate_binary",
         "evaluate_tuned", "landscape_aligned", "landscape_before", "landscape"), "action", needs="gate"),
    Step("register", "register", "target", _CHOSEN, "action"),
    Step("promote", "promote", "target", ("gate", "register"), "action", needs="promote"),
)  # fmt: skip


def steps_of(config: RunConfig) -> list[Step]:
    """The rows that this run needs, parents before children."""
    wanted = {"", *config.fusion.controls, *(["adapter"] if config.fusion.adapter is not None else [])}
    wanted |= {"tuned"} if config.fusion.tuned else set()
    wanted |= {"gate"} if config.gate is not None else set()
    wanted |= {"promote"} if config.tracking.promote else set()
    wanted |= {"unaligned"} if config.needs_unaligned else set()
    wanted |= {"landscape"} if config.landscape is not None else set()
    return [
        step
        for step in STEPS
        if step.needs in wanted
        and (step.name != "compare_deltas" or len(config.finetunes) > 1)
        and (step.scope != "merge" or config.merges)
        and (step.name != "register" or config.tracking.register_models)
        and (step.stage != "landscape" or _drawn(config, step))
    ]


def _drawn(config: RunConfig, step: Step) -> bool:
    return config.landscape is not None and bool(config.landscape.scans_of(step.variant))


def _is_tuned(config: RunConfig, step: Step, name: str | None) -> bool:
    """Whether a row about tuned settings is one for this finetune or merge."""
    tuned = config.fusion.tuned.get(name or "")
    return tuned is not None and (step.stage != "merge" or tuned.merge is not None)


def _taken(config: RunConfig, step: Step, name: str | None, there: set[str]) -> tuple[str, ...]:
    """Its parents, but for those that the run does not have, that a landscape is not drawn towards, or that tuned settings
    have no use for."""
    leads_to = config.landscape.models if config.landscape is not None else ()
    asked = there if "unaligned" in leads_to or step.stage != "landscape" else there - {"load_unaligned"}
    tuned = config.fusion.tuned.get(name or "")
    if step.name == "fuse_tuned" and tuned is not None:
        asked = asked - {"train_mask", "load_unaligned"} | set(inputs_of(tuned.method))
    elif step.needs != "tuned" and (tuned is None or config.fusion.select not in ("auto", "tuned")):
        asked = asked - set(_TUNED)
    return tuple(parent for parent in step.parents if parent in asked)


@dataclass(frozen=True)
class Node:
    """A step for one finetune or merge, or once for the run."""

    step: Step
    finetune: str | None
    """The finetune's or merge's name."""
    parents: tuple[tuple[str, str], ...]
    """(role, node id) pairs. A joining step has one for each finetune, with role `<step>:<finetune>`."""

    @property
    def id(self) -> str:
        return f"{self.finetune}/{self.step.name}" if self.finetune else self.step.name

    @property
    def joins(self) -> bool:
        return any(":" in role for role, _ in self.parents)


def expand(config: RunConfig, *, far: bool = False) -> list[Node]:
    """One node per step and model, parents before children. `far`: of a config whose models lie elsewhere: what only an adapter
    has is there for every finetune."""
    steps = steps_of(config)
    finetunes, merges = [f.name for f in config.finetunes], [m.name for m in config.merges]
    over: dict[str, Sequence[str | None]] = {
        "run": [None],
        "finetune": finetunes,
        "merge": merges,
        "model": [*finetunes, *merges],
        "target": config.targets,
    }
    once = {step.name for step in steps if step.scope == "run"}
    there = {step.name for step in steps}
    adapters = {finetune.name for finetune in config.finetunes if far or finetune.is_adapter}
    nodes: list[Node] = []
    for step in steps:
        for name in over[step.scope]:
            if step.stage == "train_mask" and name is not None and config.mask_owner(name) != name:
                continue
            if step.needs == "adapter" and name not in adapters:
                continue  # it came whole, and leaves whole
            if step.needs == "tuned" and not _is_tuned(config, step, name):
                continue
            parents = [
                (p, p) if p in once else pair
                for p in _taken(config, step, name, there)
                for pair in _parents(p, step, name, config)
            ]
            nodes.append(Node(step, name, tuple(dict.fromkeys(parents))))
    return nodes


def _parents(parent: str, step: Step, name: str | None, config: RunConfig) -> list[tuple[str, str]]:
    """(role, node id) of what a step takes from the models' own steps."""
    if name is None or step.stage == "merge":
        members = config.finetunes if name is None else config.members(name)
        return [(f"{parent}:{f.name}", f"{f.name}/{parent}") for f in members]
    if parent == "load" and config.merge_named(name):
        tuned = step.variant == "tuned" and config.fusion.tuned[name].merge is not None
        return [(parent, f"{name}/merge_tuned" if tuned else f"{name}/merge")]
    owner = config.mask_owner(name) if parent.startswith("train_mask") else name
    return [(parent, f"{owner}/{parent}")]
