"""Which host takes writes, and which commits count, by what servers say of themselves."""

from datetime import UTC, datetime

import pytest

from oncegate.store.postgres.connections.durability import Durability, Look, Standbys, parse_standby_names
from oncegate.store.postgres.connections.facts import Backend, Facts, Run
from oncegate.store.postgres.connections.hosts import Host, hosts_of
from oncegate.store.postgres.connections.primary import Sighting, choose


@pytest.mark.parametrize(
    ("url", "hosts"),
    [
        ("postgresql://u:p%40@one:1,two:2/db", [("one", 1), ("two", 2)]),
        ("postgresql://one/db?sslmode=require", [("one", 5432)]),
        ("postgresql://u@[::1]:7,two/db", [("::1", 7), ("two", 5432)]),
        ("postgresql:///db?host=/run/postgresql&port=6", [("/run/postgresql", 6)]),
        ("postgresql:///db?host=one,two&port=1,2", [("one", 1), ("two", 2)]),
        ("postgresql:///db", [("localhost", 5432)]),
    ],
)
def test_hosts_of_a_url(url, hosts):
    assert hosts_of(url) == tuple(Host(*host) for host in hosts)


@pytest.mark.parametrize(
    ("text", "standbys"),
    [
        ("", None),
        ("  ", None),
        ("a", Standbys(1, ("a",))),
        ("a, b", Standbys(1, ("a", "b"))),
        ("2 (a, b, c)", Standbys(2, ("a", "b", "c"))),
        ("FIRST 2 (a,b)", Standbys(2, ("a", "b"))),
        ('any 1("a, ""b", *)', Standbys(1, ('a, "b', "*"), is_quorum=True)),
        ("*", Standbys(1, ("*",))),
    ],
)
def test_synchronous_standby_names(text, standbys):
    assert parse_standby_names(text) == standbys


@pytest.mark.parametrize(
    ("names", "potential", "flushed", "any_is_promoted", "most_advanced"),
    [
        ("a", 0, [9], True, True),
        ("a", 0, [10], True, True),
        ("a", 0, [8], None, None),
        ("a", 0, [None], None, None),
        ("a", 0, [], False, False),
        ("", 0, [9], False, False),
        ("2 (a, b)", 0, [9], False, False),
        ("2 (a, b)", 0, [9, 8], None, None),
        ("2 (a, b)", 0, [9, 9], True, True),
        # A standby may lack what another one has: which of them is promoted decides.
        ("FIRST 1 (a, b)", 1, [9], False, True),
        ("FIRST 1 (a, b)", 0, [9], True, True),
        ("ANY 1 (a, b)", 0, [9, 8], False, True),
        ("ANY 1 (own, a)", 0, [9], True, True),
    ],
)
def test_a_look_behind_a_commit(names, potential, flushed, any_is_promoted, most_advanced):
    """A commit counts once the standbys that were asked for have it on disk; None: not yet."""
    look = Look(names, "own", 9, potential, flushed)
    assert Durability("replicated", "any").is_confirmed(look) is any_is_promoted
    assert Durability("replicated", "most-advanced").is_confirmed(look) is most_advanced


BOOTED = datetime(2026, 1, 1, tzinfo=UTC)


def seen(host: str, timeline: int, *, is_standby: bool = False, is_known: bool = False, system: int = 1) -> Sighting:
    """Return what a host said; `timeline=0`: it cannot be asked."""
    if not timeline:
        return Sighting(Host(host, 1), None, "it does not answer")
    run = Run(system, timeline, BOOTED)
    backend = Backend(1, BOOTED, BOOTED, system)
    facts = Facts(backend, run, "oncegate", is_standby, False, True, True, "", "", True, (), 0, {}, None)
    return Sighting(Host(host, 1), facts, "", is_known)


PRIMARY, STANDBY, SILENT = seen("a", 1), seen("b", 1, is_standby=True), seen("b", 0)


@pytest.mark.parametrize(
    ("sightings", "known", "at", "replicated_at"),
    [
        ([PRIMARY], None, 0, 0),
        ([STANDBY, PRIMARY], None, 1, 1),
        ([SILENT, PRIMARY], None, 1, 1),
        ([SILENT, STANDBY], None, None, None),
        # The highest timeline wins, also over the one before.
        ([PRIMARY, seen("b", 2)], 1, 1, 1),
        ([SILENT, seen("b", 2)], 1, 1, 1),
        # After a lost connection another host may be the primary by now, and cannot be asked.
        ([PRIMARY, SILENT], 1, 0, None),
        ([seen("a", 1, is_known=True), SILENT], 1, 0, 0),
        ([PRIMARY, STANDBY], 1, 0, 0),
        # An old primary that came back, while the new one is away.
        ([PRIMARY, SILENT], 2, None, None),
        # An old image of the data: its counters tell what is lost.
        ([PRIMARY, STANDBY], 2, 0, 0),
        # Both were promoted.
        ([seen("a", 2), seen("b", 2)], 1, 0, None),
        ([PRIMARY, seen("b", 1, system=2)], 1, None, None),
    ],
)
def test_which_host_is_the_primary(sightings, known, at, replicated_at):
    run = None if known is None else Run(1, known, BOOTED)
    current = None if known is None else 0
    assert choose(sightings, run, current, is_replicated=False).at == at
    choice = choose(sightings, run, current, is_replicated=True)
    assert choice.at == replicated_at
    assert (choice.reason == "") == (choice.at is not None)
