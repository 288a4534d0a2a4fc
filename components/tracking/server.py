"""A connection to MLflow: a server, or a local sqlite file; and its errors in words."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import sqlite3
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from components.errors import TrackingError
from components.tracking.address import CREDENTIALS, checked, is_local, is_server, shown
from components.tracking.local import make_database
from components.tracking.process import held, restore

_NO_SUCH_HOST = "Invalid Host header"
"""What MLflow says with 403 to requests that call it by another name than it knows."""
_ADDRESSES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
_CROWDED = ("UNIQUE constraint", "duplicate key", "Duplicate entry", "database is locked", "Giving up after", "eadlock")
_TRIES = 8
_PAUSE_S = 0.2


class TrackingUnavailableError(TrackingError):
    """The tracking server does not answer now; the same may work later."""


class Server:
    """An open connection. Opening it may take seconds: mlflow does."""

    uri: str
    """For showing: the address, without a database's password."""

    def __init__(self, uri: str) -> None:
        """Raises TrackingError when the server is out of reach, of another major version, or does not let us in."""
        self._address = checked(uri)
        self.uri = shown(uri)
        self.client: Any = None
        require_reachable(uri)
        with talking(self.uri):
            import mlflow

            _require_version(uri, mlflow.__version__)
            try:
                make_database(uri)
                self.client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
            except (ImportError, ValueError) as error:  # a database's driver; what is no port
                raise TrackingError(
                    f"tracking at {self.uri} failed: {first_line(error)}; install what is missing, or correct the address"
                ) from error

    @contextlib.contextmanager
    def as_default(self) -> Iterator[None]:
        """mlflow's module functions talk to a process-wide address; lend them ours and put theirs back."""
        import mlflow

        tracking, registry = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
        given = {key: os.environ.get(key) for key in _ADDRESSES}
        mlflow.set_tracking_uri(self._address)
        mlflow.set_registry_uri(self._address)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(tracking)
            mlflow.set_registry_uri(registry)
            restore(given)  # mlflow writes them there, too, and every process that is started inherits them

    def upload(self, run_id: str, path: Path) -> None:
        """Log a file as an artifact. Raises TrackingError for whatever keeps their store from taking it: each has errors of its
        own."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.log_artifact(run_id, str(path))
        except (MlflowException, OSError):  # told as everything else
            raise
        except Exception as error:
            raise TrackingError(
                f"the artifacts of {self.uri} do not take {path.name}: {type(error).__name__}: {first_line(error)}; give what "
                "their store asks for (a package, credentials), or have the server take them (--artifacts-destination)"
            ) from error


def require_reachable(uri: str, *, tries: int = 3, wait_s: float = 1.0) -> None:
    """mlflow itself retries for minutes before it says that nobody is there. Raises TrackingUnavailableError."""
    if not is_server(uri):
        return
    for left in reversed(range(tries)):
        try:
            # Whether somebody is there; nothing secret is sent, and whose certificate it is, mlflow checks as it is set to.
            with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=10, context=_unverified(uri)):
                return
        except urllib.error.HTTPError as error:
            if error.code not in (502, 503, 504):
                return  # somebody is there; whether it is MLflow, and lets us in, the first real request says
            reason: Exception = error
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = error
        if left == 0:
            raise TrackingUnavailableError(
                f"no tracking server answers at {uri} ({first_line(reason)}); start it or correct tracking.uri"
            ) from reason
        time.sleep(wait_s)


def _unverified(uri: str) -> ssl.SSLContext | None:
    return ssl._create_unverified_context() if uri.startswith("https://") else None


def _require_version(uri: str, ours: str) -> None:
    """Another major version has other routes and other meanings. A server that does not say its version is left to show by
    its answers what it is."""
    if not is_server(uri):
        return
    from mlflow.utils.rest_utils import http_request

    answer = http_request(_credentials(uri), "/version", "GET", raise_on_status=False)
    if answer.status_code in (401, 403):
        raise _refused(uri, "", answer.status_code, answer.text)
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


def _refused(uri: str, about: str, status: int, said: str) -> TrackingError:
    """Of 401 and 403."""
    if _NO_SUCH_HOST in said:
        return TrackingError(
            f"{uri} does not know itself by this name (403); start `mlflow server` with --allowed-hosts that has it"
        )
    given = _credentials(uri)
    if status == 403:
        return TrackingError(
            f"{uri} denies {given.username or 'you'} the rights on {about or 'what was asked'} (403); have EDIT on it granted, "
            f"or set {CREDENTIALS} of somebody who has it"
        )
    if given.username or given.token:
        who = f"name and password of {given.username}" if given.username else "token"
        return TrackingError(f"{uri} does not take the {who} (401); correct {CREDENTIALS}")
    return TrackingError(f"{uri} asks who you are (401); set {CREDENTIALS}")


@contextlib.contextmanager
def talking(uri: str, about: str = "") -> Iterator[None]:
    """Around every exchange with MLflow: quiet, with an end to waiting, and with errors as TrackingError. `about` says for
    what one needs rights (`the model demo-zh`)."""
    with held(), _explained(uri, about):
        yield


@contextlib.contextmanager
def _explained(uri: str, about: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, sqlite3.Error) as error:
        raise TrackingError(
            f"tracking at {uri} failed: {first_line(error)}; free some space if the disk is full, and remove a local "
            "database that is broken: the run is shown anew"
        ) from error
    except RequestException as error:  # artifacts go past mlflow's own errors
        status = error.response.status_code if error.response is not None else 503
        raise _in_words(uri, about, status, first_line(error)) from error
    except MlflowException as error:
        raise _in_words(uri, about, error.get_http_status_code(), first_line(error), error.error_code) from error
    except OSError as error:
        if isinstance(error, ConnectionError | TimeoutError) and not is_local(uri):
            raise _in_words(uri, about, 503, first_line(error)) from error
        # Of a disk: a database's, or that of artifacts.
        raise TrackingError(
            f"tracking at {uri} failed: {first_line(error)}; free some space, or get rights there: the run is shown anew"
        ) from error


def first_line(error: Exception) -> str:
    """The first line of what an error says."""
    said = str(error).strip()
    return shown(said.splitlines()[0]) if said else type(error).__name__


def _in_words(uri: str, about: str, status: int, first: str, code: str = "") -> TrackingError:
    """`status`: of HTTP. To mlflow a server that gives no answer has answered 500, as one that lost its database does."""
    if status in (401, 403):
        return _refused(uri, about, status, first)
    if not is_local(uri) and (status == 429 or status >= 500):
        return TrackingUnavailableError(
            f"the tracking server at {uri} went away: {first}; nothing is lost: run again when it is back"
        )
    remedy = "nothing is lost: run again when it is mended"
    if code == "RESOURCE_DOES_NOT_EXIST":
        remedy = "was it deleted, or does MLFLOW_RUN_ID name a run of another server?"
    return TrackingError(f"tracking at {uri} failed: {first}; {remedy}")


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
