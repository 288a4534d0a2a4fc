"""The ledger of promotions: who is in service follows from it alone, whatever dies or is late on the way."""

from __future__ import annotations

import itertools

import pytest

from components.tracking import CHAMPION, PREVIOUS, Registry, default_uri
from components.tracking.promotions import Entry, Ledger, Service, held


def entry(number: int, version: int, champion: int | None, after: int) -> Entry:
    return Entry(number, version, champion, after, "promote", f"t{number}", applied=True)


def by_number(*entries: Entry) -> dict[int, Entry]:
    return {one.number: one for one in entries}


def test_an_entry_holds_only_where_it_was_decided_after_the_last_that_holds() -> None:
    assert held({}) == Service()
    both = by_number(entry(1, 10, None, 0), entry(2, 20, None, 0))
    assert held(both) == Service(1, 10, None, frozenset({10}))
    again = both | by_number(entry(3, 20, 10, 1), entry(4, 30, 10, 1))
    assert held(again) == Service(3, 20, 10, frozenset({10, 20}))
    later = again | by_number(entry(5, 30, 20, 4), entry(6, 30, 20, 3), entry(7, 40, 30, 5))
    assert held(later) == Service(6, 30, 20, frozenset({10, 20, 30}))


def test_exactly_one_of_those_that_were_decided_alike_holds_in_every_order() -> None:
    """Three promoters, each with two entries that it wrote one after the other."""
    for order in set(itertools.permutations("aabbcc")):
        entries: dict[int, Entry] = {}
        decided: dict[str, int] = {}
        for number, who in enumerate(order, start=1):
            # At its first entry each has seen an empty ledger; at its second it has seen all up to then.
            after = held(entries).entry if who in decided else 0
            decided[who] = after
            entries[number] = entry(number, ord(who), None, after)
        chain = held(entries)
        assert entries[1].version in chain.served
        assert len(chain.served) == 3  # whoever lost decided again, and nobody else had claimed that place


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(default_uri(tmp_path_factory.mktemp("ledger")))


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
    assert ledger.service() == Service()
    one = ledger.put(1, ledger.service(), "promote")
    assert one == Service(1, 1, None, frozenset({1}))
    assert aliases(ledger) == (1, None)
    two = ledger.put(2, one, "promote")
    assert two is not None
    assert aliases(ledger) == (2, 1)
    assert ledger.put(3, one, "promote") is None, "decided against what is not there any more"
    assert aliases(ledger) == (2, 1)
    back = ledger.put(1, two, "rollback")
    assert back is not None
    assert aliases(ledger) == (1, 2)
    assert ledger.service() == back
    assert [one.kind for one in ledger.entries().values()] == ["promote", "promote", "promote", "rollback"]
    assert ledger.model not in ledger.registry.names()


def test_a_promoter_that_died_before_the_aliases_is_finished_by_the_next(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = ledger.put(1, ledger.service(), "promote")
    assert one is not None
    with monkeypatch.context() as patch:

        def dies(_: Service) -> None:
            raise KeyboardInterrupt

        patch.setattr(ledger, "_write", dies)
        with pytest.raises(KeyboardInterrupt):
            ledger.put(2, one, "promote")
    assert aliases(ledger) == (1, None)
    another = Ledger(ledger.registry, ledger.name)
    assert another.service() == Service(2, 2, 1, frozenset({1, 2}))
    assert aliases(ledger) == (2, 1)


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


def test_an_alias_that_was_moved_by_hand_is_taken_as_it_is(ledger: Ledger) -> None:
    one = ledger.put(1, ledger.service(), "promote")
    assert one is not None
    ledger.registry.client.set_registered_model_alias(ledger.name, CHAMPION, "4")
    found = ledger.service()
    assert (found.entry, found.champion) == (1, 4)
    ledger.put(2, found, "promote")
    assert aliases(ledger) == (2, 4)


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
