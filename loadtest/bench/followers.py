"""Followers: what a duplicate that joins a running stream costs, and how soon it has what the store has.

All of it is paired within one run: the streams of one replica have no follower, one or ten, in the same worker or on
another replica, in turns. Where nobody joins, Redis's commands are counted beside those of an earlier commit.
"""

import json
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any, NamedTuple

from loadtest.bench import contenders, scenarios
from loadtest.bench.contenders import Running, Site, await_layout, await_ready, in_turns, side_by_side
from loadtest.bench.goals import EARLIER, OURS
from loadtest.bench.machine import PYTHON, ROOT, pinned
from loadtest.bench.postgres import started_database
from loadtest.bench.postgres_rows import migrate
from loadtest.bench.readers import read
from loadtest.bench.redis import command
from loadtest.bench.table import Figure

STREAMS, EVERY_MS, BYTES = 16, 25, 100
WARM_S, WINDOW_S, LEAD_S = 0.3, 2.0, 3.5  # LEAD_S: for joining before the window, and to spare behind it
ALONE, HERE, THERE = "alone", "here", "there"
MANY = 10
TRIES = 5
# For each kind of round: where the followers are, and how many a stream has.
KINDS = {ALONE: (ALONE, 0), **{f"{place}-{each}": (place, each) for place in (HERE, THERE) for each in (1, MANY)}}
FOLLOWERS, EVENTS, EVENT_MS = 500, 50, 100
JOINS = 200
WAKES, POLLS, POSTGRES = "Redis with wake-ups", "Redis without", "PostgreSQL"
EXECUTIONS, STREAM_CHUNKS, TOGETHER = 200, 100, 128
# What requests send to Redis: scripts, and reads of the worker's mailbox.
CALLS = ("evalsha", "hgetall")
# A user that may do everything but publish and subscribe.
POLLER = ("poller", "on", ">secret", "~*", "+@all", "-@pubsub")


class Cost(NamedTuple):
    """CPU of one round, in us: of the owner and of the other replica, for a chunk of one stream."""

    owner_us: float
    other_us: float


def followers(site: Site, quick: bool) -> list[Figure]:
    """The CPU of a follower a chunk, the first byte of a join, the delay of events, and commands where nobody joins."""
    figures = []
    with replicas(site, site.redis) as (owner, other):
        costs = _costs(site, owner, other, 1 if quick else 2)
        figures += [*compared(costs), *_first_bytes(site, owner, other, 50 if quick else JOINS)]
        figures += _cut_off(site, owner, other, 50)
        figures += _delays(site, owner, other, WAKES, (1, 50))
    figures += _polling(site, quick)
    return [*figures, *_commands(site, 1 if quick else 2)]


@contextmanager
def replicas(site: Site, store: Running | None, store_url: str = "") -> Iterator[tuple[Running, Running]]:
    """Start two replicas on one store, whose duplicates join. `store`: None for PostgreSQL, which has no layouts."""
    settings = {"ON_DUPLICATE": "join", "MAX_FOLLOWERS": 4 * FOLLOWERS, "UPSTREAM_REST_S": 0}
    with ExitStack() as until_the_end:
        found = []
        for _ in range(2):
            one = contenders.oncegate(site, store_url=store_url, upstream_port=site.events.port, **settings)
            until_the_end.callback(one.process.stop)
            found.append(one)
        for one in found:
            await_ready(one)
            if store:
                await_layout(one)
        yield found[0], found[1]


# CPU ...


def _costs(site: Site, owner: Running, other: Running, takes: int) -> dict[str, list[Cost]]:
    costs: dict[str, list[Cost]] = {name: [] for name in KINDS}
    for place in (HERE, THERE):
        _cost(site, owner, other, place, MANY)  # warms them up
    for take in range(takes):
        for name in in_turns([*KINDS], take):
            costs[name].append(_cost(site, owner, other, *KINDS[name]))
    return costs


def _cost(site: Site, owner: Running, other: Running, place: str, each: int) -> Cost:
    """Measure one round: a window in which everybody reads. One that a busy machine delays too long is repeated."""
    number = round((WARM_S + WINDOW_S + LEAD_S) * 1000 / EVERY_MS)
    port = other.port if place == THERE else owner.port
    for _ in range(TRIES):
        with _following(site, owner.port, port, STREAMS, each, number, EVERY_MS, BYTES) as found:
            time.sleep(WARM_S)
            began, before = time.monotonic(), (owner.process.cpu_s(), other.process.cpu_s())
            time.sleep(WINDOW_S)
            ended, after = time.monotonic(), (owner.process.cpu_s(), other.process.cpu_s())
        if found["first_end_s"] > ended:
            chunks = (ended - began) * 1000 / EVERY_MS * STREAMS
            return Cost(*((then - now) * 1e6 / chunks for now, then in zip(before, after, strict=True)))
    raise RuntimeError("streams ended while they were measured: the machine is too busy")


@contextmanager
def _following(site: Site, *numbers: int) -> Iterator[dict[str, Any]]:
    """Enter once everybody reads; what was found is there when the context is left. Raises RuntimeError for losses."""
    command = [PYTHON, "-m", "loadtest.bench.joining", "follow", *map(str, numbers), uuid.uuid4().hex]
    found: dict[str, Any] = {}
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=pinned(site.cores.other)
    ) as reader:
        assert reader.stdout is not None
        if not reader.stdout.readline():
            raise RuntimeError("the readers ended early")
        yield found
        found.update(json.loads(reader.stdout.readline() or "{}"))
    if not found or found["lost"] or found["not_joined"]:
        raise RuntimeError(f"followers did not get everything: {found}")


def compared(costs: Mapping[str, Sequence[Cost]]) -> list[Figure]:
    """Return what a follower costs a chunk, of what a stream does that is executed and stored. Medians count.

    The goals are those of the first follower; elsewhere it alone pays for the reads of the store.
    """
    spent = {name: Cost(*map(median, zip(*found, strict=True))) for name, found in costs.items()}
    alone, figures = spent[ALONE].owner_us, []
    for each in (1, MANY):
        here = (spent[f"{HERE}-{each}"].owner_us - alone) / each
        which = "one" if each == 1 else f"each of {each}"
        name = f"a chunk at a follower in the same worker, {which}: CPU, of a stream's"
        figures.append(Figure(name, here / alone, "x", 0.6, note=f"{here:.1f} and {alone:.1f} us"))
    for each, limit in ((1, 1.5), (MANY, None)):
        other, owner = spent[f"{THERE}-{each}"].other_us / each, spent[f"{THERE}-{each}"].owner_us - alone
        which = "one" if each == 1 else f"each of {each}"
        name = f"a chunk at a follower on another replica, {which}: CPU, of a stream's"
        note = f"{other:.1f} and {alone:.1f} us; the stream's own worker {owner:+.1f} us"
        figures.append(Figure(name, other / alone, "x", limit, note=note))
    return figures


# Time ...


def _first_bytes(site: Site, owner: Running, other: Running, joins: int) -> list[Figure]:
    """The first join of a stream on another replica, until its first byte, less a read of its record in Redis."""
    found = read(site, "first", owner.port, other.port, joins, site.redis.port, uuid.uuid4().hex, module="joining")
    if found["not_joined"] or found["ended"]:
        raise RuntimeError(f"not joined, or too late: {found}")
    note = f"{joins} joins; a read of the record takes {found['read_p50'] * 1e3:.2f} ms"
    return [
        Figure(f"first byte of a join on another replica, behind the store, {share}", found[field] * 1e3, "ms", 5,
               note=note)
        for share, field in (("p50", "behind_p50"), ("p99", "behind_p99"))
    ]  # fmt: skip


def _cut_off(site: Site, owner: Running, other: Running, streams: int) -> list[Figure]:
    """A reader that is cut off as its stream begins, until its first byte from another replica."""
    found = read(site, "again", owner.port, other.port, streams, uuid.uuid4().hex, module="joining")
    if found["not_joined"]:
        raise RuntimeError(f"not joined: {found}")
    name, note = "a reader cut off at its first event: its first byte on another replica", f"{streams} streams"
    return [Figure(f"{name}, {share}", found[share] * 1e3, "ms", None, note=note) for share in ("p50", "p99")]


def _polling(site: Site, quick: bool) -> list[Figure]:
    """The same events where nothing wakes replicas."""
    figures, store = [], contenders.open_redis(site.cores)
    try:
        command(store.port, "ACL", "SETUSER", *POLLER)
        with replicas(site, store, f"redis://poller:secret@127.0.0.1:{store.port}/0") as pair:
            figures += _delays(site, *pair, POLLS)
    finally:
        store.process.stop()
    if quick:
        return figures
    with started_database() as database:
        migrate(database.url)
        with replicas(site, None, database.url) as pair:
            return [*figures, *_delays(site, *pair, POSTGRES)]


def _delays(
    site: Site, owner: Running, other: Running, store: str, numbers_of_streams: Sequence[int] = (1,)
) -> list[Figure]:
    figures = []
    for streams in numbers_of_streams:
        numbers = streams, FOLLOWERS // streams, EVENTS, EVENT_MS, BYTES
        with _following(site, owner.port, other.port, *numbers) as found:
            pass
        figures.append(delayed(store, streams, found))
    return figures


def delayed(store: str, streams: int, found: Mapping[str, float]) -> Figure:
    """Return how late events reach followers on another replica, from the time on that has a goal."""
    p99, p50, own = (found[field] * 1e3 for field in ("event_p99", "event_p50", "owner_p99"))
    name = f"an event at {FOLLOWERS} followers elsewhere, {streams} stream{'s' * (streams > 1)}, {store}, p99"
    note = f"p50 {p50:.1f} ms; at the originals' own clients p99 {own:.1f} ms; {found['events']:,} events"
    return Figure(name, p99, "ms", 120 if store == WAKES else 250, note=note)


# Commands ...


def _commands(site: Site, takes: int) -> list[Figure]:
    """The commands of Redis for an execution and for streamed responses that nobody joins."""
    names = [OURS, *([EARLIER] if site.against else [])]
    counts: dict[str, dict[str, float]] = {}
    with side_by_side(site, names) as pairs:
        counts["commands of Redis for an execution"] = {name: _per_execution(*pair) for name, pair in pairs.items()}
    with side_by_side(site, names, upstream=site.events) as pairs:
        for running, _ in pairs.values():
            _stream(site, running, STREAMS)  # warms it up
        for what, streams, which in (
            (f"commands of Redis for each of {TOGETHER} streamed responses", TOGETHER, ()),
            ("calls of Redis for one streamed response alone", 1, CALLS),
        ):
            found = {name: list[float]() for name in names}
            for name in in_turns(names, 0) * takes:
                found[name].append(_per_stream(site, *pairs[name], streams, which))
            counts[what] = {name: round(median(each), 1) for name, each in found.items()}
    return [counted(what, each) for what, each in counts.items()]


def counted(what: str, found: Mapping[str, float]) -> Figure:
    """Return by how many commands this build exceeds the earlier commit; how many they are if there is none."""
    ours, name = found[OURS], f"{what} that nobody joins"
    if EARLIER not in found:
        return Figure(name, ours, "", None)
    return Figure(f"{name}, beyond {EARLIER}'s", ours - found[EARLIER], "", 0, note=f"{ours} and {found[EARLIER]}")


def _per_execution(running: Running, store: Running) -> float:
    scenarios.ask_many(running.port, EXECUTIONS)
    with _spent(store) as spent:
        scenarios.ask_many(running.port, EXECUTIONS)
    return round(spent[0] / EXECUTIONS, 1)


def _per_stream(site: Site, running: Running, store: Running, streams: int, which: Sequence[str]) -> float:
    with _spent(store, which) as spent:
        _stream(site, running, streams)
    return spent[0] / streams


def _stream(site: Site, running: Running, streams: int) -> None:
    read(site, "events", running.port, streams, STREAM_CHUNKS, EVERY_MS, BYTES, uuid.uuid4().hex)
    time.sleep(scenarios.SETTLE_S)


@contextmanager
def _spent(store: Running, which: Sequence[str] = ()) -> Iterator[list[float]]:
    """Count commands until the end of the block, less those that come when nothing is asked."""
    spent: list[float] = []
    idle, began = commands_of(store, which), time.monotonic()
    time.sleep(1)
    before, idle_s = commands_of(store, which), time.monotonic() - began
    began = time.monotonic()
    yield spent
    idle_now = (before - idle) * (time.monotonic() - began) / idle_s
    spent.append(commands_of(store, which) - before - idle_now)


def commands_of(store: Running, which: Sequence[str] = ()) -> int:
    """Return how many commands a Redis has executed, those of scripts included; or how many of some kinds."""
    lines = command(store.port, "INFO", "commandstats").splitlines()
    counts = dict(line.removeprefix("cmdstat_").split(":calls=") for line in lines if ":calls=" in line)
    return sum(int(count.partition(",")[0]) for name, count in counts.items() if not which or name in which)
