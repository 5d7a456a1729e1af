"""The shared connection: few writes, replies in order, and no reply for the wrong caller."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import MappingProxyType

import pytest
from redis.asyncio.connection import AbstractConnection

from oncegate.hostnames.resolver import Resolver
from oncegate.store.redis.link import Link
from oncegate.store.redis.server import Openers, check_mode, greet, load_scripts, set_up
from oncegate.store.redis.talk import Talk
from oncegate.store.redis.wire import ErrorReply, Script, ScriptCall
from oncegate.store.redis.wire import resp as resp_words
from oncegate.store.results import Unconfirmed
from oncegate.store.store import Observers
from tests.name_server import NameServer
from tests.parts import until
from tests.resp import Connection, RespServer, Words, echo, resp

PATIENT_S = 20.0
SCRIPT = Script("echo", b"return ARGV")


async def nothing(_: Link, __: AbstractConnection) -> None:
    """Prepare a connection without doing anything."""


async def prepare(link: Link, connection: AbstractConnection) -> None:
    """Prepare a connection as for a server that is watched by nobody."""
    talk = Talk(link)
    await greet(talk, connection)
    await set_up(talk, load_scripts(), check_mode)


@pytest.fixture
async def server() -> AsyncIterator[RespServer]:
    scripted = RespServer()
    await scripted.start()
    yield scripted
    scripted.close()


@asynccontextmanager
async def linked(
    server: RespServer, stall_s: float = PATIENT_S, observers: Observers = MappingProxyType({})
) -> AsyncIterator[Link]:
    """A link that is up."""
    link = Link(Openers(stall_s, Resolver()).to(server.url), nothing, stall_s, observers)
    link.start()
    try:
        async with asyncio.timeout(2 * PATIENT_S):
            assert await link.wait_up(in_s(PATIENT_S))
            yield link
    finally:
        await link.close()


def in_s(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


def say(link: Link, *args: object, seconds: float = PATIENT_S) -> "asyncio.Future[object]":
    """Issue a script with these arguments, which `echo` returns."""
    return link.script(ScriptCall(SCRIPT, b"key", len(args), in_s(seconds)), resp_words(*args))


async def is_well(link: Link, server: RespServer, connections: int) -> None:
    """Check that the link works over its `connections`th connection."""
    server.script = echo
    assert await link.wait_up(in_s(PATIENT_S))
    assert await say(link, b"well") == [b"well"]
    assert len(server.connections) == connections


# By name ...


async def by_name(server: RespServer, names: NameServer, host: str = "redis.test") -> Link:
    """A link to a server by a name that `names` knows, which is being connected."""
    link = Link(Openers(PATIENT_S, Resolver(1.0, names)).to(f"redis://{host}:{server.port}"), nothing, PATIENT_S)
    link.start()
    return link


async def test_a_server_is_reached_at_the_addresses_of_its_name(server):
    """All addresses of a name are tried, in the system's order; one look-up serves connection after connection."""
    names = NameServer("127.0.0.7", "127.0.0.1")
    link = await by_name(server, names)
    try:
        await is_well(link, server, 1)
        assert link.at == ("redis.test", server.port)
        link.renew("again")
        await is_well(link, server, 2)
        assert names.asked == ["redis.test"]
    finally:
        await link.close()


async def test_silent_names_stall_no_store(server):
    """However many look-ups get no answer, a store whose name is answered for is connected, and one that is waited for
    can be left at once."""
    silent, quick = NameServer(), NameServer("127.0.0.1")
    silent.open.clear()
    try:
        stalled = [await by_name(server, silent, f"silent-{number}.test") for number in range(12)]
        await until(lambda: silent.running == 12)
        link = await by_name(server, quick)
        async with asyncio.timeout(2):
            assert await link.wait_up(in_s(PATIENT_S))
        async with asyncio.timeout(2):
            await asyncio.gather(*[one.close() for one in (*stalled, link)])
    finally:
        silent.open.set()


# One write, one order ...


async def test_what_is_issued_in_one_turn_leaves_in_few_writes(server):
    """The commands of one turn of the event loop leave eight at a time, and the rest at its end."""
    async with linked(server) as link:
        for number in range(3):
            server.segments.clear()
            replies = await asyncio.gather(*[say(link, b"%d" % one, number) for one in range(50)])
            assert replies == [[b"%d" % one, b"%d" % number] for one in range(50)]
            assert len(server.segments) <= 7
            server.segments.clear()
            await asyncio.gather(*[say(link, b"%d" % one) for one in range(7)])
            assert len(server.segments) == 1
        assert len(server.calls) == 171


async def test_scripts_and_plain_commands_share_the_line(server):
    """A plain command has no tag, and gets its reply in its place."""
    server.greeting[b"INFO"] = resp(b"here")
    async with linked(server) as link:
        replies = await asyncio.gather(say(link, 1), link.command("INFO", deadline=in_s(PATIENT_S)), say(link, 2))
        assert replies == [[b"1"], b"here", [b"2"]]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100, 1000])
async def test_replies_resolve_in_order_however_they_are_cut(server, size):
    """The bytes of ten replies, cut into pieces of any size, resolve the ten callers in their order."""
    replies: list[bytes] = []

    def collect(connection: Connection, words: Words) -> None:
        replies.append(echo(connection, words))
        if len(replies) == 10:
            data = b"".join(replies)
            drip(connection, [data[at : at + size] for at in range(0, len(data), size)])

    def drip(connection: Connection, pieces: list[bytes]) -> None:
        connection.transport.write(pieces[0])
        if pieces[1:]:
            asyncio.get_running_loop().call_soon(drip, connection, pieces[1:])

    server.script = collect
    async with linked(server) as link:
        order: list[int] = []
        futures = [say(link, b"x" * number) for number in range(10)]
        for number, future in enumerate(futures):
            future.add_done_callback(lambda _, number=number: order.append(number))
        assert await asyncio.gather(*futures) == [[b"x" * number] for number in range(10)]
        assert order == list(range(10))


async def test_a_caller_that_stops_waiting_leaves_its_place_in_the_queue(server):
    """Of 200 concurrent callers some are cancelled at any moment; each of the others gets its own reply."""
    dice = random.Random(7)
    pending: list[bytes] = []

    def later(connection: Connection, words: Words) -> None:
        pending.append(echo(connection, words))
        if len(pending) == 1:
            asyncio.get_running_loop().call_later(dice.random() * 0.02, flush, connection)

    def flush(connection: Connection) -> None:
        connection.transport.write(b"".join(pending))
        pending.clear()

    async def call(number: int) -> object:
        await asyncio.sleep(dice.random() * 0.05)
        return await say(link, b"for %d" % number)

    server.script = later
    async with linked(server) as link:
        tasks = [asyncio.ensure_future(call(number)) for number in range(200)]
        for task in dice.sample(tasks, 80):
            asyncio.get_running_loop().call_later(dice.random() * 0.07, task.cancel)
        replies = await asyncio.gather(*tasks, return_exceptions=True)
        cancelled = sum(isinstance(reply, asyncio.CancelledError) for reply in replies)
        assert 20 < cancelled <= 80
        # Replies to callers that were cancelled may still be to come.
        await until(lambda: not pending)
        for number, reply in enumerate(replies):
            assert isinstance(reply, asyncio.CancelledError) or reply == [b"for %d" % number]
        await is_well(link, server, connections=1)


# Replies that are not ours ...


WRONG_REPLIES = {
    "another tag": lambda words: resp([b"999", b"leak"]),
    "the next one's tag": lambda words: resp([b"%d" % (int(words[4]) + 1), b"leak"]),
    "a tag of another type": lambda words: resp([int(words[4]), b"leak"]),
    "no tag": lambda words: resp([b"leak"]),
    "an empty list": lambda words: resp([]),
    "a status": lambda words: b"+OK\r\n",
    "a value": lambda words: resp(b"leak"),
    "a number": lambda words: resp(1),
    "nil": lambda words: resp(None),
    "a nil list": lambda words: b"*-1\r\n",
    "no RESP": lambda words: b"HTTP/1.1 200 OK\r\n\r\n",
    "one reply too many": lambda words: resp([words[4], b"own"]) + resp([words[4], b"leak"]),
}


@pytest.mark.parametrize("wrong", WRONG_REPLIES.values(), ids=WRONG_REPLIES.keys())
async def test_a_reply_that_answers_another_command_ends_the_connection(server, wrong):
    """From a reply with a wrong tag on, every command is unconfirmed, and the link reconnects."""

    def script(connection: Connection, words: Words) -> bytes:
        return wrong(words) if words[5] == b"2" else echo(connection, words)

    server.script = script
    async with linked(server) as link:
        replies = await asyncio.gather(*[say(link, number) for number in range(5)])
        assert replies[:2] == [[b"0"], [b"1"]]
        assert replies[2] == [b"own"] or isinstance(replies[2], Unconfirmed)
        for reply in replies[3:]:
            assert isinstance(reply, Unconfirmed)
            assert reply.maybe_executed
        await until(lambda: server.connections[0].lost)
        await is_well(link, server, connections=2)


async def test_a_reply_that_nobody_asked_for_ends_the_connection(server):
    """Bytes on an idle connection are not the next command's reply. The connection in its place is counted."""
    took_s: list[float] = []
    async with linked(server, observers={"connect": took_s.append}) as link:
        assert await say(link, 1) == [b"1"]
        server.connections[0].transport.write(resp([b"2", b"leak"]))
        await until(lambda: server.connections[0].lost)
        await is_well(link, server, connections=2)
    assert len(took_s) == 2


async def test_a_dropped_reply_is_never_made_up_for_by_the_next_one(server):
    """After a reply that the server left out, its caller and all later ones are unconfirmed."""
    server.script = lambda connection, words: None if words[5] == b"1" else echo(connection, words)
    async with linked(server) as link:
        first, *others = await asyncio.gather(*[say(link, number) for number in range(4)])
        assert first == [b"0"]
        assert all(isinstance(reply, Unconfirmed) and reply.maybe_executed for reply in others)
        await is_well(link, server, connections=2)


async def test_an_error_is_the_reply_of_the_command_that_caused_it(server):
    """An error has no tag; it goes to the caller in whose place it comes, and the connection stays."""

    def script(connection: Connection, words: Words) -> bytes:
        return b"-LOADING wait a little\r\n" if words[5] == b"1" else echo(connection, words)

    server.script = script
    async with linked(server) as link:
        first, error, last = await asyncio.gather(*[say(link, number) for number in range(3)])
        assert (first, last) == ([b"0"], [b"2"])
        assert isinstance(error, ErrorReply)
        assert str(error) == "LOADING wait a little"
        await is_well(link, server, connections=1)


# A server that stalls or goes away ...


async def test_a_server_that_never_answers_is_given_up(server):
    """Callers of a server that does not reply are unconfirmed by their deadlines, and the link reconnects."""
    async with linked(server, stall_s=0.3) as link:
        server.script = lambda connection, words: None
        began = in_s(0)
        replies = await asyncio.gather(*[say(link, number, seconds=0.3) for number in range(5)])
        assert in_s(0) - began < 3
        assert {reply.maybe_executed for reply in replies} == {True}
        await until(lambda: server.connections[0].lost)
        await is_well(link, server, connections=2)


async def test_a_late_reply_is_not_the_next_ones(server):
    """A reply that comes after its caller's deadline goes to nobody."""
    held: list[Callable[[], None]] = []

    def script(connection: Connection, words: Words) -> None:
        reply = echo(connection, words)
        held.append(lambda: connection.transport.write(reply))

    server.script = script
    async with linked(server) as link:
        hasty = say(link, b"hasty", seconds=0.05)
        patient = say(link, b"patient")
        assert isinstance(await hasty, Unconfirmed)
        late = say(link, b"late")
        await until(lambda: len(held) == 3)
        for reply in held:
            reply()
        assert await asyncio.gather(patient, late) == [[b"patient"], [b"late"]]
        await is_well(link, server, connections=1)


ENDS = {
    "closed": lambda connection: connection.transport.close(),
    "reset": lambda connection: connection.transport.abort(),
    "half-closed": lambda connection: connection.transport.write_eof(),
    "in the middle of a reply": lambda connection: (
        connection.transport.write(b"*2\r\n$1\r\n"),
        connection.transport.close(),
    ),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
async def test_a_connection_that_is_lost_half_way(server, end):
    """On a lost connection commands without a reply are unconfirmed at once, and later ones are not sent."""

    def script(connection: Connection, words: Words) -> bytes | None:
        if words[5] == b"2":
            end(connection)
        return echo(connection, words) if int(words[5]) < 2 else None

    server.script = script
    async with linked(server) as link:
        replies = [say(link, number) for number in range(5)]
        assert isinstance(await replies[4], Unconfirmed)
        meanwhile = await say(link, b"meanwhile")
        assert meanwhile == Unconfirmed(link.down_reason, maybe_executed=False)
        assert not link.up
        unconfirmed = [one for one in await asyncio.gather(*replies) if isinstance(one, Unconfirmed)]
        assert len(unconfirmed) >= 3
        assert all(one.maybe_executed for one in unconfirmed)
        await is_well(link, server, connections=2)
        assert b"meanwhile" not in [words[5] for words in server.calls]


async def test_a_closed_link_is_closed(server):
    """After close, every command is unconfirmed, and no connection is made."""
    server.script = lambda connection, words: None
    async with linked(server) as link:
        waiting = say(link, b"x")
        await until(lambda: server.calls)
        await link.close()
        assert await waiting == Unconfirmed("closed")
        assert await say(link, b"y") == Unconfirmed("closed", maybe_executed=False)
        await until(lambda: server.connections[0].lost)
        await asyncio.sleep(0.1)
    assert len(server.connections) == 1


# A server that is not fit, or not yet ...


UNFIT = {
    "loading": ({b"INFO": b"-LOADING Redis is loading the dataset in memory\r\n"}, "loading"),
    "no password given": ({b"INFO": b"-NOAUTH Authentication required.\r\n"}, "Authentication required"),
    "not permitted": ({b"SCRIPT": b"-NOPERM this user has no permissions\r\n"}, "no permissions"),
    "too old": ({b"INFO": resp(b"redis_version:6.2.14\r\n")}, "Redis 6.2.14; 7.0 is the oldest"),
    "a version nobody knows": ({b"INFO": resp(b"redis_version:next-gen\r\n")}, ""),
    "no version": ({b"INFO": resp(b"# Server\r\n")}, "7.0 is the oldest"),
    "no INFO": ({b"INFO": resp(1)}, ""),
    "no TIME": ({b"TIME": resp([])}, ""),
    "no RESP": ({b"INFO": b"HTTP/1.1 400 Bad Request\r\n\r\n"}, ""),
    "silent": ({b"INFO": None}, ""),
}


@pytest.mark.parametrize(("greeting", "because"), UNFIT.values(), ids=UNFIT.keys())
async def test_a_server_that_is_not_fit_is_asked_again_until_it_is(server, greeting, because):
    """While a server is unfit the link stays down with the reason, and comes up once the server is fit."""
    well, stall_s = dict(server.greeting), 0.3
    server.greeting.update(greeting)
    link = Link(Openers(stall_s, Resolver()).to(server.url), prepare, stall_s)
    link.start()
    try:
        await until(lambda: len(server.connections) >= 2)
        assert not link.up
        assert because in link.down_reason
        assert link.down_reason not in ("", "not connected yet")
        server.greeting = well
        assert await link.wait_up(in_s(PATIENT_S))
        assert await say(link, b"well") == [b"well"]
    finally:
        await link.close()


async def test_a_server_that_hangs_up_on_everybody(server):
    """Connections that end at once are made again with growing pauses, and nothing is issued meanwhile."""
    server.closes_at_once = True
    link = Link(Openers(PATIENT_S, Resolver()).to(server.url), prepare, PATIENT_S)
    link.start()
    try:
        await until(lambda: len(server.connections) >= 4)
        assert not await link.wait_up(in_s(0.05))
        server.closes_at_once = False
        assert await link.wait_up(in_s(PATIENT_S))
        assert server.calls == []
    finally:
        await link.close()
