"""`realign step` on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipelines.interrupts import interruptible


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(step)


def step(
    config: Annotated[str, typer.Argument(help="The run config (YAML); - for the text in REALIGN_CONFIG.")],
    workspace: Annotated[Path, typer.Option(help="Where results are kept.")],
    of: Annotated[str | None, typer.Option(help="A finetune or merge; by default what the run does once.")] = None,
    steps: Annotated[
        str, typer.Option(help="Stages, with commas between; all by default. Or one of plan, gate, publish.")
    ] = "",
    lost: Annotated[
        str,
        typer.Option(help="Nodes of the graph, with commas between, that failed in a step before: not tried again."),
    ] = "",
    patience: Annotated[
        float | None, typer.Option(help="Seconds that a stage may wait for a node; as the config says, or 1800.")
    ] = None,
) -> None:
    """Run a part of a run: what a pipeline's step submits as a job of a Ray cluster.

    The last line is REALIGN-ANSWER and a JSON object that says what became of it.
    """
    with interruptible("the same command continues"):
        from pipelines.step_command import step_command
        from ray_jobs.jobs import ANSWER

        answer = step_command(config, workspace, of=of, steps=_listed(steps), lost=_listed(lost), patience_s=patience)
    typer.echo(ANSWER + json.dumps(answer))
    if answer["status"] != "done":
        raise typer.Exit(2)


def _listed(text: str) -> list[str]:
    return [one for one in text.split(",") if one]
