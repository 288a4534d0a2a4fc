"""The command `realign compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add_to(app: typer.Typer) -> None:
    """Register it."""
    app.command()(compare)


def compare(
    first: Annotated[Path, typer.Argument(help="A run: its workspace, or its summary.json.")],
    second: Annotated[Path, typer.Argument(help="Another run, which is held to the first.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, rates as shares.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write a page too, with prompts whose verdict flipped: up to 50 of each kind.")
    ] = None,
) -> None:
    """Compare two runs: rates of the models that both have, paired differences, settings, cost.

    Differences are paired where the workspaces have answers to the same prompts.
    """
    from pipelines.compare_command import compare_command

    compare_command(first, second, as_json=as_json, html=html)
