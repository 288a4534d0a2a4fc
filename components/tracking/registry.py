"""The model registry: versions that point at weights, what they say of themselves, and their aliases.

Weights are never copied. A version carries where they lie and their hash, what they were made from, and what its gate said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from components.errors import TrackingError, listed
from components.tracked import Point
from components.tracking.names import (
    CANDIDATE,
    EVALUATION_TAG,
    FINGERPRINT_TAG,
    LEDGER_TAG,
    OLDER_METRICS_TAG,
    SHA256_TAG,
    TAG_CHARS,
    WEIGHTS_TAG,
)
from components.tracking.server import Server, again, error_code, talking

_PAGE = 200
_BATCH = 1000
_REFUSED = re.compile(r"[./:%\"']")
"""What MLflow refuses in the name of a logged model, though a registered model's may have dots."""


@dataclass(frozen=True)
class Model:
    """A registered model, as it stood when it was asked for."""

    aliases: Mapping[str, int]
    """Alias -> version."""
    made_ms: int
    """When it was made: another time for one of the same name that was deleted and made anew."""


@dataclass(frozen=True)
class Version:
    """A version of a registered model, as it stood when it was asked for."""

    name: str
    number: int
    tags: Mapping[str, str]
    aliases: Sequence[str] = ()
    created_ms: int = 0
    source: str = ""

    @property
    def ours(self) -> bool:
        """Whether this project registered it."""
        return {WEIGHTS_TAG, SHA256_TAG, FINGERPRINT_TAG} <= self.tags.keys()

    def __str__(self) -> str:
        return f"{self.name} version {self.number}"


@dataclass(frozen=True)
class Registered:
    """What is to stand in the registry of one model's weights."""

    name: str
    weights_uri: str
    sha256: str
    """64 hex digits, over the weights."""
    fingerprint: str
    """The identity of what is registered: the same one with the same weights is the same version."""
    run_id: str
    """The run that measured."""
    metrics: Mapping[str, float]
    time_ms: int
    tags: Mapping[str, str] = field(default_factory=dict)
    """Set anew when one of them is another than before: it was evaluated again, or its weights were moved."""
    decided: Mapping[str, str] = field(default_factory=dict)
    """Tags of the version that follow every call: what its gate says now. As long as TAG_CHARS."""
    alias: str = CANDIDATE
    """Moves to this version unless a later one has it."""

    @property
    def stated(self) -> dict[str, str]:
        own = {WEIGHTS_TAG: self.weights_uri, SHA256_TAG: self.sha256, FINGERPRINT_TAG: self.fingerprint}
        return {**self.tags, **own}


class Registry(Server):
    """The registered models of a server (or of a local sqlite file)."""

    def names(self) -> list[str]:
        """Of all registered models but the ledgers of promotions."""
        with talking(self.uri):
            models = pages(lambda token: self.client.search_registered_models(max_results=_PAGE, page_token=token))
        return sorted(model.name for model in models if LEDGER_TAG not in (model.tags or {}))

    def model(self, name: str) -> Model:
        """A registered model. Raises TrackingError, also where there is none of that name: with those that there are."""
        found = self._registered(name)
        if found is None:
            there = listed(self.names(), 20) or "none"
            raise TrackingError(f"no model {name!r} is registered at {self.uri}; there: {there}")
        return found

    def aliases(self, name: str) -> Mapping[str, int]:
        """alias -> version, of a registered model. Raises as `model`."""
        return self.model(name).aliases

    def has_model(self, name: str) -> bool:
        """Whether a model of that name is registered."""
        return self._registered(name) is not None

    def has(self, name: str, number: int) -> bool:
        """Whether a registered model has a version of that number."""
        with talking(self.uri, f"the registered model {name}"):
            return self._numbered(name, str(number)) is not None

    def versions(self, name: str) -> list[Version]:
        """All versions of a model, the newest first."""
        aliases = self.aliases(name)
        with talking(self.uri, f"the registered model {name}"):
            query = f"name = {quoted(name)}"
            found = pages(lambda token: self.client.search_model_versions(query, _PAGE, None, token))
        return sorted((_version(one, aliases) for one in found), key=lambda one: -one.number)

    def version(self, name: str, which: str) -> Version:
        """A version by its number (`"3"`) or alias. Raises TrackingError that lists what there is."""
        aliases = self.aliases(name)
        number = which if which.isdigit() else str(aliases.get(which, ""))
        with talking(self.uri, f"the registered model {name}"):
            found = self._numbered(name, number) if number else None
        if found is not None:
            return _version(found, aliases)
        there = ", ".join(f"{alias} (version {number})" for alias, number in sorted(aliases.items())) or "no aliases"
        if which.isdigit():
            numbers = ", ".join(str(one.number) for one in self.versions(name)) or "none"
            raise TrackingError(f"{name} has no version {which}; there: {numbers}; {there}")
        raise TrackingError(f"no version of {name} has the alias {which!r}; there: {there}")

    def metrics(self, version: Version) -> dict[str, float]:
        """The newest value of everything that was measured of a version; empty where it has no logged model."""
        if not version.source.startswith("models:/"):
            return {}
        with talking(self.uri, f"the metrics of {version}"):
            model = self.client.get_logged_model(version.source.removeprefix("models:/"))
        stale = version.tags.get(OLDER_METRICS_TAG, "").split("; ")
        ordered = sorted(model.metrics or [], key=lambda one: (one.timestamp, one.step))
        return {one.key: one.value for one in ordered if one.key not in stale}

    def set_tags(self, version: Version, tags: Mapping[str, str]) -> None:
        """Give a version these tags, as far as it has not got them now."""
        there = self.version(version.name, str(version.number)).tags
        with talking(self.uri, f"the registered model {version.name}"):
            self._tag(version.name, version.number, there, tags)

    def register(self, asked: Registered, *, experiment_id: str) -> str:
        """Register weights that stay where they are; returns the version's number as text. A second call with its fingerprint
        and its weights finds the same version, and gives it what it says of itself now: another place, a new evaluation."""
        with talking(self.uri, f"the registered model {asked.name}, or on the experiment of its run"):
            found = min(self._same(asked), key=_number, default=None) or self._made(asked, experiment_id)
            if any(found.tags.get(key) != value for key, value in asked.stated.items()):
                self._stated_again(found, asked)
            self._tag(asked.name, found.version, found.tags, asked.decided)
            self._point(asked.name, asked.alias, str(found.version))
        return str(found.version)

    def _registered(self, name: str) -> Model | None:
        """By name, not by alias: asked for an alias of what is not there, a server with authentication speaks of rights."""
        from mlflow.exceptions import MlflowException

        with talking(self.uri, f"the registered model {name}"):
            try:
                found = self.client.get_registered_model(name)
            except MlflowException as error:
                if error_code(error) in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    return None
                raise
        aliases = {alias: int(version) for alias, version in found.aliases.items()}
        return Model(aliases, int(found.creation_timestamp))

    def _numbered(self, name: str, number: str) -> Any | None:
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_model_version(name, number)
        except MlflowException as error:
            if error_code(error) == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def _tag(self, name: str, number: int | str, there: Mapping[str, str], tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            if there.get(key) != value:
                again(partial(self.client.set_model_version_tag, name, str(number), key, value))

    def _stated_again(self, version: Any, asked: Registered) -> None:
        """Make a registered version show its latest evaluation and place. EVALUATION_TAG comes last: all is there then."""
        model_id = str(version.source).removeprefix("models:/")
        older = self._measured(model_id, asked)
        stated = asked.stated
        if older or OLDER_METRICS_TAG in version.tags:
            stated[OLDER_METRICS_TAG] = _joined(older) or "none"
        self.client.set_logged_model_tags(model_id, stated)
        for key in sorted(stated, key=lambda key: key == EVALUATION_TAG):
            self.client.set_model_version_tag(version.name, version.version, key, stated[key])

    def _measured(self, model_id: str, asked: Registered) -> list[str]:
        """Make its metrics the newest values of a logged model; returns the names that only older evaluations measured.

        A reader takes a metric's latest time. An earlier evaluation that is shown again gets a later one than it had.
        """
        there = sorted(self.client.get_logged_model(model_id).metrics or [], key=lambda m: (m.timestamp, m.step))
        newest = {m.key: m.value for m in there}
        if any(newest.get(key) != value for key, value in asked.metrics.items()):
            when = max([asked.time_ms, *(m.timestamp + 1 for m in there)])
            points = [Point(key, 0, value, when) for key, value in asked.metrics.items()]
            log_metrics(self.client, asked.run_id, points, when, model_id)
        return sorted(newest.keys() - asked.metrics.keys())

    def _same(self, asked: Registered) -> list[Any]:
        """The versions of these weights under this fingerprint."""
        query = f"name = {quoted(asked.name)} and tags.`{FINGERPRINT_TAG}` = '{asked.fingerprint}'"
        found = self.client.search_model_versions(query)
        return [one for one in found if one.tags.get(SHA256_TAG) == asked.sha256]

    def _made(self, asked: Registered, experiment_id: str) -> Any:
        """A new version. Where a server's answer was lost, mlflow asks once more, and the server makes another: the first of
        them counts, for everybody, and what else this call made is removed."""
        source = f"models:/{self._external_model(asked, experiment_id)}"
        self._measured(source.removeprefix("models:/"), asked)
        with self.as_default():
            import mlflow

            made = mlflow.register_model(source, asked.name, tags={**asked.stated, **asked.decided})
        first, *others = sorted(self._same(asked), key=_number) or [made]
        for other in others:
            if other.source == source:
                self._delete(other)
        return first

    def _delete(self, version: Any) -> None:
        """Remove what is there twice. Where that needs more rights than to register it, it stays, without an alias."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.delete_model_version(version.name, version.version)
        except MlflowException as error:
            if error.get_http_status_code() != 403:
                raise

    def _external_model(self, asked: Registered, experiment_id: str) -> str:
        """The logged model of that fingerprint: one left by a call that died before registering it, or a new one."""
        name = _REFUSED.sub("-", asked.name)
        query = f"tags.`{FINGERPRINT_TAG}` = '{asked.fingerprint}' and name = '{name}'"
        found = self.client.search_logged_models([experiment_id], filter_string=query)
        ready = [one for one in found if str(one.status) == "READY" and one.tags.get(SHA256_TAG) == asked.sha256]
        if ready:
            self.client.set_logged_model_tags(ready[0].model_id, asked.stated)
            return str(ready[0].model_id)
        with self.as_default():
            import mlflow

            model = mlflow.create_external_model(
                name=name, source_run_id=asked.run_id, model_type="llm", tags=asked.stated,
                experiment_id=experiment_id,
            )  # fmt: skip
        return str(model.model_id)

    def _point(self, name: str, alias: str, version: str) -> None:
        holder = self.client.get_registered_model(name).aliases.get(alias)
        if holder is None or int(holder) < int(version):
            again(partial(self.client.set_registered_model_alias, name, alias, version))


def log_metrics(client: Any, run_id: str, points: Sequence[Point], time_ms: int, model_id: str | None = None) -> None:
    """Write points to a run, and to a logged model where one is named. `time_ms`: of points without a time."""
    from mlflow.entities import Metric

    entities = [
        Metric(p.name, p.value, time_ms if p.time_ms is None else p.time_ms, p.step, model_id=model_id) for p in points
    ]
    for start in range(0, len(entities), _BATCH):
        client.log_batch(run_id, metrics=entities[start : start + _BATCH])


def pages(page: Any) -> list[Any]:
    found, token = [], None
    while True:
        some = page(token)
        found += list(some)
        token = some.token
        if not token:
            return found


def _number(version: Any) -> int:
    return int(version.version)


def _joined(names: Sequence[str]) -> str:
    """As many names as a tag holds."""
    joined = "; ".join(names)
    return joined if len(joined) <= TAG_CHARS else joined[:TAG_CHARS].rpartition("; ")[0]


def quoted(name: str) -> str:
    """A name in a query of MLflow, which knows no escapes but two kinds of quotes."""
    return f'"{name}"' if "'" in name else f"'{name}'"


def _version(found: Any, aliases: Mapping[str, int]) -> Version:
    number = int(found.version)
    return Version(
        name=found.name,
        number=number,
        tags=dict(found.tags),
        aliases=tuple(sorted(alias for alias, holder in aliases.items() if holder == number)),
        created_ms=int(found.creation_timestamp or 0),
        source=str(found.source),
    )
