"""What runs after what: one table, from which the driver and the Kubeflow pipeline are both made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipelines.config import RunConfig


@dataclass(frozen=True)
class Step:
    """A row of the table. Its name is also the role under which a child knows its record."""

    name: str
    stage: str
    """The stage (`ray_jobs.<stage>`) or, for an action, the action's name."""
    scope: Literal["run", "finetune"]
    """Once per run, or once per finetune. A run-scope step with finetune-scope parents joins those that succeeded."""
    parents: tuple[str, ...]
    kind: Literal["stage", "action"] = "stage"
    """A stage is skipped when its record exists; an action is always executed."""
    variant: str = ""
    """Which of the models (or masks) this row is about."""
    needs: str = ""
    """The control (or `adapter`) that asks for this row; empty: always there."""


def _fused(variant: str, *parents: str, needs: str = "") -> tuple[Step, Step]:
    """Fuse a variant, then measure what was published."""
    fuse = Step(f"fuse_{variant}", "fuse", "finetune", ("load_aligned", "load", *parents), variant=variant, needs=needs)
    evaluate = Step(f"evaluate_{variant}", "evaluate", "finetune", (fuse.name,), variant=variant, needs=needs)
    return fuse, evaluate


STEPS: tuple[Step, ...] = (
    Step("load_aligned", "load", "run", ()),
    Step("load_unaligned", "load", "run", ("load_aligned",), needs="resta"),
    Step("load", "load", "finetune", ("load_aligned",)),
    # The long ones first: rows are submitted in this order.
    Step("train_mask", "train_mask", "finetune", ("load_aligned", "load")),
    Step("train_mask_paper", "train_mask", "finetune", ("load_aligned", "load"), variant="paper", needs="paper"),
    Step("search_interpolation", "search_scale", "finetune", ("load_aligned", "load"), variant="interpolation",
         needs="interpolation"),
    Step("search_resta", "search_scale", "finetune", ("load_aligned", "load", "load_unaligned"), variant="resta",
         needs="resta"),
    Step("extract_delta", "extract_delta", "finetune", ("load_aligned", "load")),
    Step("compare_deltas", "compare_deltas", "run", ("load_aligned", "load")),
    Step("evaluate_aligned", "evaluate", "run", ("load_aligned",), variant="aligned"),
    Step("evaluate_before", "evaluate", "finetune", ("load_aligned", "load"), variant="before"),
    *_fused("soft", "train_mask"),
    *_fused("binary", "train_mask"),
    *_fused("random_mask", "train_mask", needs="random_mask"),
    *_fused("interpolation", "search_interpolation", needs="interpolation"),
    *_fused("resta", "load_unaligned", "search_resta", needs="resta"),
    *_fused("paper_soft", "train_mask_paper", needs="paper"),
    *_fused("paper_binary", "train_mask_paper", needs="paper"),
    Step("export_adapter", "export_adapter", "finetune",
         ("load_aligned", "load", "fuse_soft", "fuse_binary", "evaluate_soft", "evaluate_binary"), needs="adapter"),
    Step("evaluate_adapter", "evaluate", "finetune", ("load_aligned", "export_adapter"), variant="adapter",
         needs="adapter"),
    Step("register", "register", "finetune", ("fuse_soft", "fuse_binary", "evaluate_soft", "evaluate_binary"), "action"),
)  # fmt: skip


def steps_of(config: RunConfig) -> list[Step]:
    """The rows that this run needs, parents before children."""
    wanted = {"", *config.fusion.controls, *(["adapter"] if config.fusion.adapter is not None else [])}
    return [
        step
        for step in STEPS
        if step.needs in wanted
        and (step.name != "compare_deltas" or len(config.finetunes) > 1)
        and (step.name != "register" or config.tracking.register_models)
    ]


@dataclass(frozen=True)
class Node:
    """A step for one finetune, or once for the run."""

    step: Step
    finetune: str | None
    parents: tuple[tuple[str, str], ...]
    """(role, node id) pairs. A joining step has one for each finetune, with role `<step>:<finetune>`."""

    @property
    def id(self) -> str:
        return f"{self.finetune}/{self.step.name}" if self.finetune else self.step.name

    @property
    def joins(self) -> bool:
        return any(":" in role for role, _ in self.parents)


def expand(config: RunConfig) -> list[Node]:
    """One node per step and finetune, parents before children."""
    steps = {step.name: step for step in steps_of(config)}
    names = [finetune.name for finetune in config.finetunes]
    adapters = {finetune.name for finetune in config.finetunes if finetune.is_adapter}
    nodes: list[Node] = []
    for step in steps.values():
        for finetune in names if step.scope == "finetune" else [None]:
            if step.stage == "train_mask" and finetune is not None and config.mask_owner(finetune) != finetune:
                continue
            if step.needs == "adapter" and finetune not in adapters:
                continue  # it came whole, and leaves whole
            parents: list[tuple[str, str]] = []
            for parent in step.parents:
                if steps[parent].scope == "run":
                    parents.append((parent, parent))
                elif finetune is not None:
                    owner = config.mask_owner(finetune) if steps[parent].stage == "train_mask" else finetune
                    parents.append((parent, f"{owner}/{parent}"))
                else:
                    parents += [(f"{parent}:{name}", f"{name}/{parent}") for name in names]
            nodes.append(Node(step, finetune, tuple(parents)))
    return nodes
