"""MLflow without a server: an sqlite file, and artifacts in a directory beside it."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
import uuid
from pathlib import Path

from components.tracking.address import database_of

ARTIFACTS = "mlartifacts"
_ABANDONED_SECONDS = 600.0
"""Age from which a database that was not finished belongs to a dead process."""
_PLACES = (("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location"))
"""Where MLflow writes down absolutely where artifacts lie."""


def make_database(uri: str) -> None:
    """MLflow builds an sqlite schema in dozens of steps, and a kill between two leaves a file that no later start can use. So
    a new database is built beside its place and gets its name whole."""
    from mlflow import MlflowClient

    path = database_of(uri)
    if not uri.startswith("sqlite:///") or path.exists() or not path.parent.is_dir():
        return
    for old in path.parent.glob(f".{path.name}.*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - old.stat().st_mtime > _ABANDONED_SECONDS:
                old.unlink()
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        MlflowClient(tracking_uri=f"sqlite:///{draft}").search_experiments(max_results=1)
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def move_artifacts(database: Path, old: str, new: str) -> None:
    """Make a database that was moved with its workspace say where the artifacts lie now. MLflow has no call for that, and would
    make the old directory again and write there. `old`, `new`: URIs of directories."""
    with contextlib.closing(sqlite3.connect(database, timeout=60)) as connection, connection:
        for table, column in _PLACES:
            connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                f"WHERE {column} = ? OR substr({column}, 1, ?) = ? || '/'",
                (new, len(old) + 1, old, len(old) + 1, old),
            )
