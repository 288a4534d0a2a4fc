"""`realign sweep` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.interrupts import interruptible


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(sweep)


def sweep(
    config: Annotated[Path, typer.Argument(help="The run config (YAML), perhaps with a section `sweep`.")],
    workspace: Annotated[
        Path | None, typer.Option(help="Where results are kept; by default runs/<name of the run>.")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Candidates for each target; as the config says, or 60.")
    ] = None,
    actors: Annotated[
        int | None,
        typer.Option(min=1, help="Processes (Ray actors), each with a model; on the CPU as many as CPUs, on cuda 1."),
    ] = None,
    only: Annotated[
        bool, typer.Option("--only", help="Find settings and write tuned.yaml, and do not run it.")
    ] = False,
) -> None:
    """Find the fusion settings that keep most skill at the demanded safety, then run with them.

    Candidates are fused in memory and scored on dev sets alone; those that cannot win are stopped early. The same command goes
    on after an interruption, with nothing tried twice.
    """
    with interruptible("the same command continues"):
        from pipelines.sweep_command import sweep_command

        failures = sweep_command(config, workspace, trials=trials, actors=actors, full=not only)
    if failures:
        raise typer.Exit(2)
