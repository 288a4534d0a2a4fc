"""Where MLflow is: the one order in which an address is looked for, and what of it may be shown."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from components.errors import TrackingError

VARIABLE = "MLFLOW_TRACKING_URI"
CREDENTIALS = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
_SECRETS = re.compile(r"(?<=://)(?:[^\s/:@]*:\S*|[^\s/:@]+)(?=@)|(?<=password=)[^&\s'\")]+")


def address_of(named: str | None, workspace: Path) -> str:
    """What was named (a config's `tracking.uri`, `--tracking-uri`), else the environment's MLFLOW_TRACKING_URI, else sqlite in
    the workspace. Raises TrackingError for what is no address."""
    return checked(named or told_by_environment() or default_uri(workspace))


def told_by_environment() -> str | None:
    """MLFLOW_TRACKING_URI, where it says something."""
    return os.environ.get(VARIABLE) or None


def default_uri(workspace: Path) -> str:
    """Where runs are tracked when no server is named."""
    return f"sqlite:///{workspace.resolve() / 'mlflow.db'}"


def is_local(uri: str) -> bool:
    return uri.startswith("sqlite:")


def is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def database_of(uri: str) -> Path:
    """The file of an sqlite address."""
    return Path(uri.removeprefix("sqlite:///"))


def checked(uri: str) -> str:
    """The address. Raises TrackingError for a server's that cannot be one, or that has a name or a password in it: addresses of
    servers are shown, and end up in histories and logs."""
    if not is_server(uri):
        return uri
    try:
        parts = urlsplit(uri)
        bad = None if parts.hostname and not re.search(r"\s", uri) else "no host has such a name"
        _ = parts.port
    except ValueError as error:
        bad = str(error)
    if bad is None and parts.username is None:
        return uri
    if bad is None:
        raise TrackingError(
            f"{shown(uri)}: an address is shown and logged, so no name and no password may be in it; set {CREDENTIALS}"
        )
    raise TrackingError(f"{shown(uri)} is no address of a tracking server ({bad}); give one like http://mlflow:5000")


def shown(text: str) -> str:
    """An address, or a message with some, without passwords: a database's address needs one."""
    return _SECRETS.sub("…", text)
