"""Object stores through fsspec: one file system a process, transient errors tried again, the rest said in a sentence.

Credentials and endpoints come from the environment (AWS_PROFILE, AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, …; fsspec's own settings
as FSSPEC_S3_ANON) and are never part of a reference, a message or a record.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from components.errors import CheckpointError, RealignError, StorageError

ATTEMPTS = 4
"""Tries of one request, beside those that the store's library makes itself."""
FIRST_WAIT = 0.3
"""Seconds before the second try; each further one waits three times as long."""
_S3 = ("s3", "s3a")
_S3_OPTIONS = {
    "use_listings_cache": False,  # what others write meanwhile must be seen
    "config_kwargs": {"connect_timeout": 10, "read_timeout": 60, "retries": {"mode": "standard", "max_attempts": 3}},
}
_LASTING = {errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG}
_CREDENTIALS = (
    "NoCredentials",
    "PartialCredentials",
    "CredentialRetrieval",
    "TokenRetrieval",
    "SSO",
    "DefaultCredentials",
)
_CONNECTION = ("EndpointConnection", "ConnectTimeout", "ConnectionRefused", "ClientConnector", "ProxyConnection")

Doing = Literal["read", "write"]
_T = TypeVar("_T")
_opened: dict[tuple[int, str, str], Any] = {}
"""(process, protocol, environment) -> file system: none survives a fork, and none outlives the credentials it was made with."""


def filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path that it knows the URL by. Safe in threads and in forked processes.

    Raises CheckpointError for a protocol that is unknown, cannot list, or whose library is not installed.
    """
    import fsspec

    protocol = urlsplit(url).scheme
    key = (os.getpid(), protocol, _environment())
    try:
        kind = fsspec.get_filesystem_class(protocol)
        if key not in _opened:
            options = _S3_OPTIONS if protocol in _S3 else {}
            _opened[key] = fsspec.filesystem(protocol, skip_instance_cache=True, **options)
    except (ValueError, ImportError) as error:
        raise CheckpointError(
            f"{url}: no way to {protocol}:// ({_first_line(error)}); use s3://, install what it needs, or copy the model here"
        ) from error
    return _opened[key], str(kind._strip_protocol(url))


def check_url(url: str) -> str:
    """The URL without a trailing slash. Raises CheckpointError for one that carries a secret or names no directory."""
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise CheckpointError(
            f"{parts.scheme}://…@{parts.netloc.rsplit('@', 1)[1]}: a URL must hold no credentials; set AWS_PROFILE, or "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if parts.scheme in ("http", "https"):
        raise CheckpointError(
            f"{parts.scheme}://{parts.netloc}{parts.path}: files behind plain HTTP cannot be listed; give s3://bucket/prefix, "
            "hf://owner/name@revision or a directory"
        )
    if not parts.netloc:
        raise CheckpointError(f"{url}: names no bucket; write {parts.scheme}://bucket/prefix")
    return url.rstrip("/")


def ask(url: str, doing: Doing, call: Callable[[], _T], *, attempts: int = ATTEMPTS) -> _T:
    """What `call` returns; transient errors are tried again. Raises CheckpointError (reading) or StorageError (writing) with
    the remedy, and lets errors of our own through."""
    kind: type[RealignError] = CheckpointError if doing == "read" else StorageError
    for attempt in range(attempts):
        try:
            return call()
        except _errors_of(urlsplit(url).scheme) as error:
            if attempt + 1 == attempts or not is_transient(error):
                raise kind(explain(error, url, doing)) from error
        time.sleep(FIRST_WAIT * 3**attempt)
    raise AssertionError("unreachable")


def is_transient(error: BaseException) -> bool:
    """Whether the same request may well succeed a moment later."""
    if isinstance(error, FileNotFoundError | PermissionError | FileExistsError):
        return False
    if _named(error, _CREDENTIALS) or _named(error, ("ProfileNotFound", "FileExpired", "ParamValidation", "NoRegion")):
        return False
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if isinstance(error, OSError):
        return error.errno not in _LASTING
    return _named(
        error, (*_CONNECTION, "HTTPClient", "ConnectionClosed", "ReadTimeout", "ClientPayload", "ServerDisconnected")
    )


def explain(error: BaseException, url: str, doing: Doing) -> str:
    """One sentence: what is wrong with the store, and which variable mends it."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    at = f"AWS_ENDPOINT_URL ({_without_user(endpoint)})" if endpoint else "AWS_ENDPOINT_URL (not set: Amazon's own)"
    if _named(error, _CREDENTIALS):
        return f"{url}: no credentials for the store; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if _named(error, ("ProfileNotFound",)):
        return f"{url}: the profile that AWS_PROFILE names is in no AWS config file; correct it or unset it"
    if isinstance(error, PermissionError):
        public = ", or FSSPEC_S3_ANON=true where anybody may read" if doing == "read" else ""
        return (
            f"{url}: the store does not let you {doing} it ({_first_line(error)}); give credentials that may: AWS_PROFILE, or "
            f"AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY{public}"
        )
    if isinstance(error, FileNotFoundError) and doing == "write":
        return f"{url}: there is no such bucket; make it, or look at {at}"
    if isinstance(error, FileNotFoundError):
        return f"{url}: is not there; look at bucket and prefix, and at {at}"
    if _named(error, ("FileExpired",)) or "precondition" in str(error).lower().replace("-", ""):
        return f"{url}: has changed since it was opened; run again when nobody writes there"
    if _named(error, _CONNECTION):
        return f"{url}: the store cannot be reached; look at {at} and at the network"
    return (
        f"{url}: the store failed ({type(error).__name__}: {_first_line(error)}); run again, or ask who runs the store"
    )


def _errors_of(protocol: str) -> tuple[type[BaseException], ...]:
    """What the protocol's libraries raise beside OSError (TimeoutError and ConnectionError are such)."""
    if protocol in _S3:
        import aiohttp
        from botocore.exceptions import BotoCoreError, ClientError

        return (OSError, BotoCoreError, ClientError, aiohttp.ClientError)
    if protocol in ("gs", "gcs"):
        import aiohttp
        from google.auth.exceptions import GoogleAuthError

        return (OSError, GoogleAuthError, aiohttp.ClientError)
    return (OSError,)


def _named(error: BaseException, parts: tuple[str, ...]) -> bool:
    """By the names of an error's classes, since the libraries that define them may not be there."""
    return any(part in kind.__name__ for kind in type(error).__mro__ for part in parts)


def _environment() -> str:
    """A digest of what decides how a store is reached; the values themselves are not kept."""
    named = sorted((k, v) for k, v in os.environ.items() if k.startswith(("AWS_", "FSSPEC_", "GOOGLE_")))
    return hashlib.sha256(repr(named).encode()).hexdigest()


def _without_user(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    return f"{parts.scheme}://{parts.netloc.rsplit('@', 1)[-1]}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
