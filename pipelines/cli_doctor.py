"""`realign doctor` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.interrupts import interruptible


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(doctor)


def doctor(
    config: Annotated[Path | None, typer.Argument(help="A run config, whose needs are looked at, too.")] = None,
    workspace: Annotated[
        Path | None, typer.Option(help="The disk that is tried; by default runs/<name of the run>.")
    ] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(help="Of the MLflow server; by default the config's, or MLFLOW_TRACKING_URI.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Look whether this machine, the workspace and the services are fit for a run, and say what to do where they are not.

    Takes some seconds. Nothing stays behind but, with a config and a tracking server, a run (and an experiment, where the
    config's is not there yet) that MLflow keeps as deleted until `mlflow gc`; what cannot be deleted is said. Exit status 2
    where a run would fail.
    """
    from pipelines.doctor import doctor_json, doctor_lines, examine, fit

    with interruptible("nothing was changed"):
        findings = examine(config, workspace, tracking_uri)
    typer.echo(doctor_json(findings) if as_json else "\n".join(doctor_lines(findings)))
    if not fit(findings):
        raise typer.Exit(2)
