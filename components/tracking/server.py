"""A connection to MLflow: a server, or a local sqlite file; and its errors in words."""

from __future__ import annotations

import contextlib
import json
import os
import random
import ssl
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from components.errors import TrackingError

CREDENTIALS = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
_ABANDONED_SECONDS = 600.0
"""Age from which a database that was not finished belongs to a dead process."""
_REQUESTS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
"""mlflow by itself asks a server that is gone for four minutes; whoever sets these gets what they set."""


_ADDRESSES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
_CROWDED = ("UNIQUE constraint", "duplicate key", "Duplicate entry", "database is locked", "Giving up after", "eadlock")
_TRIES = 8
_PAUSE_S = 0.2


class TrackingUnavailableError(TrackingError):
    """The tracking server does not answer now; the same may work later."""


class Server:
    """An open connection. Opening it may take seconds: mlflow does."""

    def __init__(self, uri: str) -> None:
        """Raises TrackingError when the server is out of reach, of another major version, or does not let us in."""
        self.uri = uri
        self.client: Any = None
        require_reachable(uri)
        with talking(uri):
            import mlflow

            _require_version(uri, mlflow.__version__)
            _make_database(uri)
            self.client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)

    @contextlib.contextmanager
    def as_default(self) -> Iterator[None]:
        """mlflow's module functions talk to a process-wide address; lend them ours and put theirs back."""
        import mlflow

        tracking, registry = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
        given = {key: os.environ.get(key) for key in _ADDRESSES}
        mlflow.set_tracking_uri(self.uri)
        mlflow.set_registry_uri(self.uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(tracking)
            mlflow.set_registry_uri(registry)
            _restore(given)  # mlflow writes them there, too, and every process that is started inherits them


def default_uri(workspace: Path) -> str:
    """Where runs are tracked when no server is named."""
    return f"sqlite:///{workspace.resolve() / 'mlflow.db'}"


def is_local(uri: str) -> bool:
    return uri.startswith("sqlite:")


def database_of(uri: str) -> Path:
    """The file of an sqlite address."""
    return Path(uri.removeprefix("sqlite:///"))


def _make_database(uri: str) -> None:
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


def require_reachable(uri: str, *, tries: int = 3, wait_s: float = 1.0) -> None:
    """mlflow itself retries for minutes before it says that nobody is there. Raises TrackingUnavailableError."""
    if not uri.startswith(("http://", "https://")):
        return
    for left in reversed(range(tries)):
        try:
            # Whether somebody is there; nothing secret is sent, and whose certificate it is, mlflow checks as it is set to.
            with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=10, context=_unverified(uri)):
                return
        except urllib.error.HTTPError as error:
            if error.code == 403:
                raise TrackingError(
                    f"{uri} answers 403: start `mlflow server` with --allowed-hosts that has this host's name"
                ) from error
            if error.code not in (502, 503, 504):
                return  # somebody is there; whether it is MLflow, the first real request says
            reason: Exception = error
        except (urllib.error.URLError, TimeoutError, OSError) as error:
            reason = error
        if left == 0:
            raise TrackingUnavailableError(
                f"no tracking server answers at {uri} ({reason}); start it or correct tracking.uri"
            ) from reason
        time.sleep(wait_s)


def _unverified(uri: str) -> ssl.SSLContext | None:
    return ssl._create_unverified_context() if uri.startswith("https://") else None


def _require_version(uri: str, ours: str) -> None:
    """Another major version has other routes and other meanings. A server that does not say its version is left to show by
    its answers what it is."""
    if not uri.startswith(("http://", "https://")):
        return
    from mlflow.utils.rest_utils import http_request

    answer = http_request(_credentials(uri), "/version", "GET", raise_on_status=False)
    if answer.status_code == 401:
        raise TrackingError(_not_let_in(uri))
    theirs = answer.text.strip() if answer.status_code == 200 else ""
    major = theirs.split(".")[0]
    if major.isdigit() and major != ours.split(".")[0]:
        raise TrackingError(
            f"{uri} is MLflow {theirs[:20]}, and this is MLflow {ours}: their major versions must be one; "
            "upgrade the older of the two"
        )


def _credentials(uri: str) -> Any:
    """What mlflow itself would send: of the environment, or of its credentials file."""
    from mlflow.tracking._tracking_service.utils import get_default_host_creds

    return get_default_host_creds(uri)


def _not_let_in(uri: str) -> str:
    given = _credentials(uri)
    if given.username or given.token:
        who = f"name and password of {given.username}" if given.username else "token"
        return f"{uri} does not take the {who} (401); correct {CREDENTIALS}"
    return f"{uri} asks who you are (401); set {CREDENTIALS}"


@contextlib.contextmanager
def talking(uri: str, about: str = "") -> Iterator[None]:
    """Around every exchange with MLflow: quiet, with an end to waiting, and with errors as TrackingError. `about` says for
    what one needs rights (`the model demo-zh`)."""
    with _quiet(), _bounded(), _explained(uri, about):
        yield


@contextlib.contextmanager
def _explained(uri: str, about: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except SQLAlchemyError as error:
        first = str(error).splitlines()[0]
        raise TrackingError(
            f"tracking at {uri} failed: {first}; free some space if the disk is full, and remove a local database that is "
            "broken: the run is shown anew"
        ) from error
    except RequestException as error:  # artifacts go past mlflow's own errors
        status = error.response.status_code if error.response is not None else 503
        raise _in_words(uri, about, status, _first(error)) from error
    except MlflowException as error:
        raise _in_words(uri, about, error.get_http_status_code(), _first(error), error.error_code) from error


def _first(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _in_words(uri: str, about: str, status: int, first: str, code: str = "") -> TrackingError:
    """`status`: of HTTP. To mlflow a server that gives no answer has answered 500, as one that lost its database does."""
    if status == 401:
        return TrackingError(_not_let_in(uri))
    if status == 403:
        who = _credentials(uri).username or "you"
        return TrackingError(
            f"{uri} denies {who} the rights on {about or 'what was asked'} (403); have EDIT on it granted, or set "
            f"{CREDENTIALS} of somebody who has it"
        )
    if not is_local(uri) and (status == 429 or status >= 500):
        return TrackingUnavailableError(
            f"the tracking server at {uri} went away: {first}; nothing is lost: run again when it is back"
        )
    remedy = "nothing is lost: run again when it is mended"
    if code == "RESOURCE_DOES_NOT_EXIST":
        remedy = "was it deleted, or does MLFLOW_RUN_ID name a run of another server?"
    return TrackingError(f"tracking at {uri} failed: {first}; {remedy}")


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """mlflow reads these of the environment at each request."""
    given = {key: os.environ.get(key) for key in _REQUESTS}
    os.environ.update({key: value for key, value in _REQUESTS.items() if given[key] is None})
    try:
        yield
    finally:
        _restore(given)


def _restore(given: Mapping[str, str | None]) -> None:
    for key, value in given.items():
        if value is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """mlflow writes its progress (tables made, versions created) to stderr through a stream of its own: hold it closed
    here and leave it afterwards as it was."""
    from mlflow.utils.logging_utils import MLFLOW_LOGGING_STREAM

    shown = MLFLOW_LOGGING_STREAM.enabled
    MLFLOW_LOGGING_STREAM.enabled = False
    try:
        yield
    finally:
        MLFLOW_LOGGING_STREAM.enabled = shown


def again(action: Callable[[], None]) -> None:
    """Do what may be done twice, and once more where it met another who wrote the same: MLflow looks first whether a tag or an
    alias is there and then inserts it, and of two who do so at once one is refused by the database."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    for left in reversed(range(_TRIES)):
        try:
            return action()
        except (MlflowException, SQLAlchemyError) as error:
            if left == 0 or not crowded(error):
                raise
        time.sleep(random.uniform(0, _PAUSE_S))
    return None


def crowded(error: Exception) -> bool:
    """Whether a write failed for no other reason than that others wrote at the same time."""
    return any(sign in str(error) for sign in _CROWDED)


def error_code(error: Exception) -> str:
    """MLflow's word for an error, e.g. RESOURCE_DOES_NOT_EXIST; empty for any other exception."""
    return str(getattr(error, "error_code", ""))


def as_json(value: Any) -> str:
    """Compact JSON, for a tag."""
    return json.dumps(value, separators=(",", ":"), sort_keys=True, allow_nan=False)
