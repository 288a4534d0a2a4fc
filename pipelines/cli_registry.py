"""`realign promote`, `realign rollback` and `realign models`: the registry from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from components.errors import ConfigError
from pipelines.interrupts import interruptible

if TYPE_CHECKING:
    from components.tracking import Registry

Workspace = Annotated[
    Path | None,
    typer.Option(
        help="Where the run's results lie, by default where they were registered; its mlflow.db is the registry."
    ),
]
Uri = Annotated[
    str | None, typer.Option(help="The tracking server; by default MLFLOW_TRACKING_URI, or else the workspace's.")
]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(promote)
    app.command()(rollback)
    app.command()(models)


def promote(
    name: Annotated[str, typer.Argument(help="The registered model; `realign models` lists them.")],
    version: Annotated[int | None, typer.Option(min=1, help="By default the one with alias candidate.")] = None,
    workspace: Workspace = None,
    tracking_uri: Uri = None,
) -> None:
    """Put a version in service (alias champion): its weights are hashed and its gate is decided once more before.

    Exit status 3 where the gate is shut.
    """
    with interruptible("the same command continues"):
        registry = _registry(workspace, tracking_uri)
        from components.tracking import CANDIDATE
        from pipelines.promotion import promote as put_in_service
        from pipelines.registry_text import promoted_line

        done = put_in_service(registry, name, CANDIDATE if version is None else str(version), workspace=workspace)
    typer.echo(promoted_line(done))


def rollback(
    name: Annotated[str, typer.Argument(help="The registered model.")],
    workspace: Workspace = None,
    tracking_uri: Uri = None,
) -> None:
    """Swap champion and previous, once the weights that are to serve again are found as they were registered."""
    with interruptible("look with `realign models` who is in service"):
        registry = _registry(workspace, tracking_uri)
        from pipelines.promotion import roll_back
        from pipelines.registry_text import promoted_line

        done = roll_back(registry, name, workspace=workspace)
    typer.echo(promoted_line(done))


def models(
    name: Annotated[str | None, typer.Argument(help="One of them, with all its versions.")] = None,
    workspace: Workspace = None,
    tracking_uri: Uri = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list, a model an object.")] = False,
) -> None:
    """List registered models: versions, aliases, gate, headline numbers, and where the weights lie."""
    registry = _registry(workspace, tracking_uri)
    from pipelines.registry_text import described, models_json, models_lines

    found = described(registry, name)
    typer.echo(models_json(found) if as_json else "\n".join(models_lines(found)))


def _registry(workspace: Path | None, uri: str | None) -> Registry:
    """The registry that was named. Raises ConfigError where none was, or where there is no such database."""
    from components.tracking import Registry, told_by_environment
    from components.tracking.address import database_of, is_local
    from pipelines.place import settled

    told = uri or told_by_environment()
    if told is None and workspace is None:
        raise ConfigError("which registry? give --workspace of a run, --tracking-uri, or set MLFLOW_TRACKING_URI")
    found = settled(uri, workspace or Path())
    if is_local(found) and not database_of(found).is_file():
        if told is not None:
            raise ConfigError(
                f"there is no database {database_of(found)}; correct --tracking-uri or MLFLOW_TRACKING_URI"
            )
        raise ConfigError(
            f"{workspace} has no mlflow.db; give --workspace of a run, --tracking-uri, or set MLFLOW_TRACKING_URI"
        )
    return Registry(found)
