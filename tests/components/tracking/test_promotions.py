"""The ledger of promotions: who is in service follows from it alone, whatever dies or is late on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from components.tracking import CHAMPION, PREVIOUS, Registry, default_uri, promotions
from components.tracking.promotions import Entry, Kind, Ledger, Service, _chain, held


def entry(number: int, version: int, champion: int | None, after: int) -> Entry:
    return Entry(number, version, champion, after, "promote", f"t{number}", made_ms=1, applied=True)


def by_number(*entries: Entry) -> dict[int, Entry]:
    return {one.number: one for one in entries}


def said(found: Service) -> tuple[int, int | None, int | None, set[int]]:
    return found.entry, found.champion, found.previous, set(found.served)


def test_an_entry_holds_only_where_it_was_decided_after_the_last_that_holds() -> None:
    assert held({}) == Service()
    both = by_number(entry(1, 10, None, 0), entry(2, 20, None, 0))
    assert said(held(both)) == (1, 10, None, {10})
    again = both | by_number(entry(3, 20, 10, 1), entry(4, 30, 10, 1))
    assert said(held(again)) == (3, 20, 10, {10, 20})
    later = again | by_number(entry(5, 30, 20, 4), entry(6, 30, 20, 3), entry(7, 40, 30, 5))
    assert said(held(later)) == (6, 30, 20, {10, 20, 30})


def orders(steps: dict[str, int]) -> Iterator[str]:
    """Every order of as many steps of each."""
    if not any(steps.values()):
        yield ""
    for who, left in steps.items():
        if left:
            yield from (who + later for later in orders({**steps, who: left - 1}))


def test_exactly_one_of_those_that_were_decided_alike_holds_in_every_order() -> None:
    """Three promoters look, then append, two of them twice."""
    met = 0
    for order in orders({"a": 4, "b": 4, "c": 2}):
        entries: dict[int, Entry] = {}
        seen: dict[str, int] = {}
        for who in order:
            if who in seen:
                number = len(entries) + 1
                entries[number] = entry(number, number, None, seen.pop(who))
            else:
                seen[who] = held(entries).entry
        chain = _chain(entries)
        for after in {one.after for one in entries.values()}:
            alike = [number for number in sorted(entries) if entries[number].after == after]
            assert [number for number in alike if number in chain] == alike[:1], order
            met += len(alike) > 1
    assert met > 3000


@pytest.fixture
def registry(workspace: Path) -> Registry:
    return Registry(default_uri(workspace))


@pytest.fixture
def ledger(registry: Registry, request: pytest.FixtureRequest) -> Ledger:
    """Of a model of its own, with four versions."""
    name = request.node.name
    registry.client.create_registered_model(name)
    for _ in range(4):
        registry.client.create_model_version(name, "s3://bucket/weights", await_creation_for=0)
    return Ledger(registry, name)


def aliases(ledger: Ledger) -> tuple[int | None, int | None]:
    found = ledger.registry.aliases(ledger.name)
    return found.get(CHAMPION), found.get(PREVIOUS)


def test_versions_follow_each_other(ledger: Ledger) -> None:
    assert said(ledger.service()) == (0, None, None, set())
    one = ledger.put(1, ledger.service(), "promote")
    assert one is not None
    assert said(one) == (1, 1, None, {1})
    assert aliases(ledger) == (1, None)
    two = ledger.put(2, one, "promote")
    assert two is not None
    assert aliases(ledger) == (2, 1)
    assert ledger.put(3, one, "promote") is None, "decided against what is not there any more"
    assert aliases(ledger) == (2, 1)
    back = ledger.put(1, two, "rollback")
    assert back is not None
    assert aliases(ledger) == (1, 2)
    assert said(ledger.service()) == said(back)
    assert ledger.look().aliases == "written"
    assert [one.kind for one in ledger.entries().values()] == ["promote", "promote", "promote", "rollback"]
    assert ledger.model not in ledger.registry.names()


def test_a_ledger_of_several_pages_is_read_whole(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promotions, "_PAGE", 2)
    for version in (1, 2, 3, 4, 1):
        assert ledger.put(version, ledger.service(), "promote") is not None
    assert [(one.number, one.version) for one in ledger.entries().values()] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 1)]
    assert aliases(ledger) == (1, 4)


def put_and_die(ledger: Ledger, monkeypatch: pytest.MonkeyPatch, version: int, kind: Kind = "promote") -> None:
    """A promoter that dies between its entry and the aliases."""

    def dies(_: Service) -> None:
        raise KeyboardInterrupt

    against = ledger.service()
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "_write", dies)
        with pytest.raises(KeyboardInterrupt):
            ledger.put(version, against, kind)


def test_a_promoter_that_died_before_the_aliases_is_finished_by_the_next(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.put(1, ledger.service(), "promote")
    put_and_die(ledger, monkeypatch, 2)
    another = Ledger(ledger.registry, ledger.name)
    seen = another.look()
    assert (said(seen), seen.aliases) == ((2, 2, 1, {1, 2}), "pending")
    assert aliases(ledger) == (1, None), "a look changes nothing"
    assert said(another.service()) == said(seen)
    assert aliases(ledger) == (2, 1)
    assert another.look().aliases == "written"


def test_one_that_wakes_up_late_leaves_what_is_newer(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its entry, and sleeps before it writes aliases; meanwhile others finish for it and go on."""
    one = ledger.put(1, ledger.service(), "promote")
    assert one is not None
    write = ledger._write

    def late(found: Service) -> None:
        if found.champion == 2:
            monkeypatch.setattr(ledger, "_write", write)
            other = Ledger(ledger.registry, ledger.name)
            assert other.put(3, other.service(), "promote") is not None
            assert aliases(other) == (3, 2)
        write(found)

    monkeypatch.setattr(ledger, "_write", late)
    done = ledger.put(2, one, "promote")
    assert done is not None
    assert (done.champion, done.previous) == (3, 2)
    assert aliases(ledger) == (3, 2)


@pytest.mark.parametrize("dies", [False, True])
def test_what_one_that_wakes_up_late_writes_puts_nobody_in_service(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, dies: bool
) -> None:
    """Version 2's promoter writes its aliases after version 3 has come into service, and dies there or goes on."""
    one = ledger.put(1, ledger.service(), "promote")
    assert one is not None
    write = ledger._write

    def late(found: Service) -> None:
        monkeypatch.setattr(ledger, "_write", write)
        other = Ledger(ledger.registry, ledger.name)
        assert other.put(3, other.service(), "promote") is not None
        write(found)
        assert aliases(ledger) == (2, 1)
        seen = Ledger(ledger.registry, ledger.name).look()
        assert (said(seen), seen.aliases) == ((3, 3, 2, {1, 2, 3}), "astray")
        if dies:
            raise KeyboardInterrupt

    monkeypatch.setattr(ledger, "_write", late)
    with contextlib.suppress(KeyboardInterrupt):
        ledger.put(2, one, "promote")
    assert aliases(ledger) == ((2, 1) if dies else (3, 2))
    mended = Ledger(ledger.registry, ledger.name).service()
    assert (mended.entry, mended.champion, mended.previous) == (3, 3, 2)
    assert aliases(ledger) == (3, 2)


def test_a_move_by_hand_counts_before_the_first_entry_and_lasts_till_the_next_command_after_it(ledger: Ledger) -> None:
    move = partial(ledger.registry.client.set_registered_model_alias, ledger.name)
    move(CHAMPION, "4")
    found = ledger.service()
    assert (found.entry, found.champion) == (0, 4)
    ledger.put(2, found, "promote")
    assert aliases(ledger) == (2, 4)
    move(CHAMPION, "3")
    assert said(ledger.service()) == (1, 2, 4, {2})
    assert aliases(ledger) == (2, 4)


def test_a_version_that_was_deleted_serves_no_more(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    delete = partial(ledger.registry.client.delete_model_version, ledger.name)
    ledger.put(1, ledger.service(), "promote")
    put_and_die(ledger, monkeypatch, 2)
    delete("2")
    found = ledger.service()  # its entry can never be applied
    assert (found.champion, found.previous) == (1, None)
    ledger.put(3, found, "promote")
    assert aliases(ledger) == (3, 1)
    delete("3")
    found = ledger.service()
    assert (found.champion, found.previous) == (None, 1)
    write = ledger._write

    def deleted_meanwhile(demanded: Service) -> None:
        monkeypatch.setattr(ledger, "_write", write)
        delete("4")
        write(demanded)

    monkeypatch.setattr(ledger, "_write", deleted_meanwhile)
    done = ledger.put(4, found, "promote")
    assert done is not None
    assert (done.champion, done.previous) == (None, 1)


def test_entries_of_a_model_that_was_deleted_count_for_no_other_of_its_name(ledger: Ledger) -> None:
    client = ledger.registry.client
    old = ledger.put(1, ledger.service(), "promote")
    assert old is not None
    client.delete_registered_model(ledger.name)
    client.create_registered_model(ledger.name)
    client.create_model_version(ledger.name, "s3://bucket/weights", await_creation_for=0)
    assert said(ledger.service()) == (0, None, None, set())
    assert ledger.put(1, old, "promote") is None, "decided for the model that was deleted"
    assert ledger.put(1, ledger.service(), "promote") is not None
    assert said(ledger.look()) == (3, 1, None, {1})


def test_an_answer_that_was_lost_counts_once(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has written the entry, and its answer does not arrive."""
    from mlflow.exceptions import MlflowException

    client = ledger.registry.client
    create = client.create_model_version
    lost = iter([True])

    def create_and_lose(*arguments: object, **options: object) -> object:
        made = create(*arguments, **options)
        if next(lost, False):
            raise MlflowException("Model Version creation error. Giving up after 3 attempts.")
        return made

    monkeypatch.setattr(client, "create_model_version", create_and_lose)
    assert ledger.put(1, ledger.service(), "promote") is not None
    assert list(ledger.entries()) == [1]
    assert aliases(ledger) == (1, None)
