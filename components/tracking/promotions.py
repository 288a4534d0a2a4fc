"""Which version is in service: moved by one promoter at a time, though MLflow has no compare-and-set for aliases.

What a server does atomically is to give the versions of a registered model their numbers: no two get one, and nobody sees
number n + 1 before n is there. So every registered model NAME has a *ledger*, the registered model `NAME.promotions`, and a
promotion is an entry in it (a version, with its content in the tags that are created with it):

    entry n:  put version V in service, where C is, as it was decided when k was the last entry that held

Entry n *holds* where the last one that held before it is indeed k; else somebody was faster, and it is void for everybody
for ever. Its promoter sees that and decides again, against the version that is in service now.

**The last entry that holds says who is in service, and nothing else does.** All readers agree on it. The aliases are a copy
for those who serve: written after the entry, and put right by the next promotion, rollback or promoting run that finds them
different. A promoter that died before it wrote them is finished so, and one that wakes up late and writes old ones misleads
nobody who asks the ledger; it looks again afterwards and writes what the ledger says by then. Since nobody can tell an alias
of a late writer from one that was moved by hand, a move by hand lasts no longer: `realign promote` and `realign rollback` are
how to move them. A lock with an expiry could not give that: a holder that was thought dead and was not still moves aliases.

Where the ledger names nobody, the aliases count as they are: before its first entry, and for a version that was deleted. An
entry carries the time at which its model was made, and counts for no model of the same name that was made anew.
"""

from __future__ import annotations

import random
import time
import uuid
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from components.errors import TrackingError
from components.tracking.names import CHAMPION, LEDGER_TAG, PREVIOUS
from components.tracking.registry import Registry, pages, quoted
from components.tracking.server import TrackingUnavailableError, again, crowded, error_code, talking

Kind = Literal["promote", "rollback"]
Aliases = Literal["written", "pending", "astray"]
_SOURCE = "realign:///promotion"
"""A version must have a source; this one's is nowhere."""
_VERSION, _FROM, _AFTER, _KIND, _TOKEN, _MADE = (
    f"realign.promotion.{key}" for key in ("version", "from", "after", "kind", "token", "model_made_ms")
)
_APPLIED = "realign.promotion.applied"
_TRIES = 8
_PAGE = 200
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
    made_ms: int
    """When the model was made whose version it is."""
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
    kind: str = ""
    """Of the entry; empty where its version was deleted."""
    made_ms: int = 0
    """When the registered model was made."""
    aliases: Aliases = "written"
    """As they were found. `pending`: the entry's promoter never said that it had written them; `astray`: it had, and they say
    something else since."""


class Ledger:
    """The promotions of one registered model."""

    def __init__(self, registry: Registry, name: str) -> None:
        self.registry, self.name = registry, name
        self.model = f"{name}.promotions"
        self._about = f"the registered models {name} and {self.model}"

    def look(self) -> Service:
        """Who is in service now, and whether the aliases say so; changes nothing. Raises TrackingError, also where there is
        no such model."""
        model = self.registry.model(self.name)  # before the ledger: read after it they might be newer
        entries = self._of(model.made_ms)
        found = replace(held(entries), made_ms=model.made_ms)
        there = (model.aliases.get(CHAMPION), model.aliases.get(PREVIOUS))
        if there != (found.champion, found.previous):
            if not self._is_there(found.champion):
                found = replace(found, champion=there[0], previous=there[1], kind="")
            elif not self._is_there(found.previous):
                found = replace(found, previous=there[1])
        if found.entry and not entries[found.entry].applied:
            return replace(found, aliases="pending")
        return replace(found, aliases="written" if there == (found.champion, found.previous) else "astray")

    def service(self) -> Service:
        """Who is in service now. Where the aliases do not say so, they do so afterwards; `aliases` says how they were found."""
        found = self.look()
        return found if found.aliases == "written" else self._apply(found)

    def put(self, version: int, decided_against: Service, kind: Kind) -> Service | None:
        """Put a version in service, as decided against what `service` had said; who is in service then. None where somebody was
        faster: nothing has changed, decide again."""
        token = uuid.uuid4().hex
        self._append(version, decided_against, kind, token)
        entries = self._of(decided_against.made_ms)
        holds = any(entries[number].token == token for number in _chain(entries))
        if holds and (now := self.look()).made_ms == decided_against.made_ms:
            return self._apply(now)
        # Whoever was faster is about to move the aliases; many who ask at once would only hold that up.
        time.sleep(random.uniform(0, _PAUSE_S))
        return None

    def entries(self) -> dict[int, Entry]:
        """The whole ledger by number; empty where nothing was ever promoted."""
        with talking(self.registry.uri, self._about):
            query, order = (
                f"name = {quoted(self.model)}",
                ["version_number ASC"],
            )  # pages stay as they are while it grows
            search = self.registry.client.search_model_versions
            found = [_entry(one) for one in pages(lambda token: search(query, _PAGE, order, token))]
        return {one.number: one for one in sorted(found, key=lambda one: one.number)}

    def _of(self, made_ms: int) -> dict[int, Entry]:
        """The entries of the model that was made then."""
        return {number: one for number, one in self.entries().items() if one.made_ms == made_ms}

    def _is_there(self, version: int | None) -> bool:
        return version is not None and self.registry.has(self.name, version)

    def _append(self, version: int, against: Service, kind: Kind, token: str) -> None:
        """Write an entry. Where the answer was lost, the ledger says whether it arrived."""
        tags = {
            _VERSION: str(version), _FROM: str(against.champion or ""), _AFTER: str(against.entry), _KIND: kind,
            _TOKEN: token, _MADE: str(against.made_ms),
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
            if any(one.token == token for one in self.entries().values()):
                return
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
        """Write the aliases that the ledger demands, until it has not changed meanwhile; returns what it says then, and how the
        aliases were found."""
        first = found
        while True:
            self._write(found)
            now = self.look()
            if (now.entry, now.champion, now.previous) == (found.entry, found.champion, found.previous):
                break
            found = now
        if now.aliases == "pending":
            with talking(self.registry.uri, self._about):
                again(partial(self.registry.client.set_model_version_tag, self.model, str(now.entry), _APPLIED, "yes"))
        return replace(now, aliases=first.aliases)

    def _write(self, found: Service) -> None:
        """`previous` first: whoever reads between the two finds a way back, to what is in service still."""
        from mlflow.exceptions import MlflowException

        with talking(self.registry.uri, self._about):
            for alias, version in ((PREVIOUS, found.previous), (CHAMPION, found.champion)):
                if version is None:
                    continue
                try:
                    again(partial(self.registry.client.set_registered_model_alias, self.name, alias, str(version)))
                except MlflowException as error:
                    if (
                        error_code(error) != "RESOURCE_DOES_NOT_EXIST"
                    ):  # deleted since the ledger was read, as a look will show
                        raise


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
    served = frozenset(entries[number].version for number in chain)
    return Service(last.number, last.version, last.champion, served, last.kind)


def _entry(found: Any) -> Entry:
    tags = found.tags
    return Entry(
        number=int(found.version),
        version=int(tags.get(_VERSION, 0)),
        champion=int(tags[_FROM]) if tags.get(_FROM) else None,
        after=int(tags.get(_AFTER, -1)),  # what somebody else put there holds nothing
        kind=tags.get(_KIND, ""),
        token=tags.get(_TOKEN, ""),
        made_ms=int(tags.get(_MADE, 0)),
        applied=_APPLIED in tags,
    )
