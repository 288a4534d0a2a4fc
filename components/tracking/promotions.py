"""Which version is in service: moved by one promoter at a time, though MLflow has no compare-and-set for aliases.

What a server does atomically is to give the versions of a registered model their numbers: no two get one, and nobody sees
number n + 1 before n is there. So every registered model NAME has a *ledger*, the registered model `NAME.promotions`, and a
promotion is an entry in it (a version, with its content in the tags that are created with it):

    entry n:  put version V in service, where C is, as it was decided when k was the last entry that held

Entry n *holds* where the last one that held before it is indeed k; else somebody was faster, and it is void for everybody
for ever. Its promoter sees that and decides again, against the version that is in service now. Who is in service thus
follows from the ledger alone, all readers agree on it, and the aliases are written after it. A lock with an expiry could not
give that: a holder that was thought dead and was not would still move aliases. Here a promoter that died between its entry
and the aliases is finished by the next one, and one that wakes up late finds a newer entry and writes what that says.
"""

from __future__ import annotations

import random
import time
import uuid
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from components.errors import TrackingError
from components.tracking.names import CHAMPION, LEDGER_TAG, PREVIOUS
from components.tracking.registry import Registry, pages
from components.tracking.server import TrackingUnavailableError, again, crowded, error_code, talking

Kind = Literal["promote", "rollback"]
_SOURCE = "realign:///promotion"
"""A version must have a source; this one's is nowhere."""
_VERSION, _FROM, _AFTER, _KIND, _TOKEN = (
    f"realign.promotion.{key}" for key in ("version", "from", "after", "kind", "token")
)
_APPLIED = "realign.promotion.applied"
_TRIES = 8
_PAUSE_S = 0.2


@dataclass(frozen=True)
class Entry:
    """A line of the ledger."""

    number: int
    version: int
    champion: int | None
    """Which version it found in service."""
    after: int
    """The entry that held last when it was decided; 0: none had."""
    kind: str
    token: str
    applied: bool
    """The aliases have been written."""


@dataclass(frozen=True)
class Service:
    """Who is in service, and the entry (its number, 0 for none) that says so."""

    entry: int = 0
    champion: int | None = None
    previous: int | None = None
    served: frozenset[int] = frozenset()
    """Every version that an entry has put in service."""


class Ledger:
    """The promotions of one registered model."""

    def __init__(self, registry: Registry, name: str) -> None:
        self.registry, self.name = registry, name
        self.model = f"{name}.promotions"
        self._about = f"the registered models {name} and {self.model}"

    def service(self) -> Service:
        """Who is in service now. A promotion that broke off before its aliases were written is finished first; an alias that
        somebody moved by hand since then is taken as it is."""
        entries = self.entries()
        found = held(entries)
        if found.entry and not entries[found.entry].applied:
            return self._apply(found)
        aliases = self.registry.aliases(self.name)
        return Service(found.entry, aliases.get(CHAMPION), aliases.get(PREVIOUS), found.served)

    def put(self, version: int, decided_against: Service, kind: Kind) -> Service | None:
        """Put a version in service, as decided against what `service` had said; who is in service then. None where somebody was
        faster: nothing has changed, decide again."""
        token = uuid.uuid4().hex
        entries = self._append(version, decided_against, kind, token)
        found = held(entries)
        mine = [one for one in entries.values() if one.token == token]
        if not any(one.number in _chain(entries) for one in mine):
            # Whoever was faster is about to move the aliases; many who ask at once would only hold that up.
            time.sleep(random.uniform(0, _PAUSE_S))
            return None
        return self._apply(found)

    def entries(self) -> dict[int, Entry]:
        """The whole ledger by number; empty where nothing was ever promoted."""
        with talking(self.registry.uri, self._about):
            query, client = f"name = '{self.model}'", self.registry.client
            found = [_entry(one) for one in pages(lambda token: client.search_model_versions(query, 200, None, token))]
        return {one.number: one for one in sorted(found, key=lambda one: one.number)}

    def _append(self, version: int, against: Service, kind: Kind, token: str) -> dict[int, Entry]:
        """Write an entry; returns the ledger with it. Where the answer was lost, the ledger says whether it arrived."""
        tags = {
            _VERSION: str(version), _FROM: str(against.champion or ""), _AFTER: str(against.entry), _KIND: kind,
            _TOKEN: token,
        }  # fmt: skip
        said = f"{kind}: version {version} in service" + (f", before it {against.champion}" if against.champion else "")
        written = False
        for left in reversed(range(_TRIES)):
            try:
                if not written:
                    with talking(self.registry.uri, self._about):
                        self._make()
                        create = self.registry.client.create_model_version
                        create(self.model, _SOURCE, tags=tags, description=said, await_creation_for=0)
                    written = True
            except TrackingError as error:
                # MLflow gives up drawing a number where many draw at once.
                if left == 0 or not (isinstance(error, TrackingUnavailableError) or crowded(error)):
                    raise
            entries = self.entries()
            if any(one.token == token for one in entries.values()):
                return entries
            time.sleep(random.uniform(0, 2 * _PAUSE_S))
        raise TrackingError(f"{self.model} does not show what was written to it; try again")

    def _make(self) -> None:
        from mlflow.exceptions import MlflowException

        said = f"Who put which version of {self.name} in service, one version of this model an entry; see its tags."
        try:
            self.registry.client.create_registered_model(self.model, {LEDGER_TAG: self.name}, said)
        except MlflowException as error:
            if error_code(error) != "RESOURCE_ALREADY_EXISTS":
                raise

    def _apply(self, found: Service) -> Service:
        """Write the aliases that the ledger demands, until it has not changed meanwhile."""
        while True:
            self._write(found)
            entries = self.entries()
            now = held(entries)
            if now.entry == found.entry:
                break
            found = now
        if not entries[found.entry].applied:
            with talking(self.registry.uri, self._about):
                again(
                    partial(self.registry.client.set_model_version_tag, self.model, str(found.entry), _APPLIED, "yes")
                )
        return found

    def _write(self, found: Service) -> None:
        """`previous` first: whoever reads between the two finds a way back, to what is in service still."""
        with talking(self.registry.uri, self._about):
            for alias, version in ((PREVIOUS, found.previous), (CHAMPION, found.champion)):
                if version is not None:
                    again(partial(self.registry.client.set_registered_model_alias, self.name, alias, str(version)))


def _chain(entries: dict[int, Entry]) -> list[int]:
    """Numbers of the entries that hold."""
    chain = [0]
    for number in sorted(entries):
        if entries[number].after == chain[-1]:
            chain.append(number)
    return chain[1:]


def held(entries: dict[int, Entry]) -> Service:
    """Who is in service according to a ledger."""
    chain = _chain(entries)
    if not chain:
        return Service()
    last = entries[chain[-1]]
    return Service(last.number, last.version, last.champion, frozenset(entries[number].version for number in chain))


def _entry(found: Any) -> Entry:
    tags = found.tags
    return Entry(
        number=int(found.version),
        version=int(tags.get(_VERSION, 0)),
        champion=int(tags[_FROM]) if tags.get(_FROM) else None,
        after=int(tags.get(_AFTER, -1)),  # what somebody else put there holds nothing
        kind=tags.get(_KIND, ""),
        token=tags.get(_TOKEN, ""),
        applied=_APPLIED in tags,
    )
