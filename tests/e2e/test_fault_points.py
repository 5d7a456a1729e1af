"""Fault points, one after the other: what breaks there is made to break, and what must hold then is looked at."""

import asyncio
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from email.utils import parsedate_to_datetime
from pathlib import Path

import pytest

import oncegate
from oncegate.gateway.recording import BATCH_BYTES
from tests.conftest import Valkey
from tests.parts import (
    CHUNKED,
    LAST_CHUNK,
    OK,
    Answer,
    Proxy,
    Raw,
    RawClient,
    RawUpstream,
    Received,
    Script,
    Tap,
    abort,
    answering,
    ask,
    chunk,
    holding,
    is_stopped,
    lazy,
    read_answer,
    request,
    serving,
    until,
)
from tests.resp import Relay, relaying

FULL = pytest.mark.full  # in the counts that take minutes: make faults
PIECES = [bytes([letter]) * BATCH_BYTES for letter in b"abcd"]  # of an answer; each is appended by itself, with no rest


async def in_pieces(_: RawUpstream, __: object, writer: asyncio.StreamWriter, ___: Received) -> None:
    """Answer in pieces, with pauses in which each of them is appended."""
    writer.write(CHUNKED)
    for piece in PIECES:
        writer.write(chunk(piece))
        await writer.drain()
        await asyncio.sleep(0.03)
    writer.write(LAST_CHUNK)


def in_pieces_behind(relay: Relay) -> Script:
    """The same, with pauses that last until the store has replied."""

    async def script(_: RawUpstream, __: object, writer: asyncio.StreamWriter, ___: Received) -> None:
        writer.write(CHUNKED)
        for piece in PIECES:
            replied = relay.scripts
            writer.write(chunk(piece))
            await until(lambda replied=replied: relay.scripts > replied)
        writer.write(LAST_CHUNK)

    return script


async def ready(proxy: Proxy) -> Proxy:
    """Wait for the store, too: a relay in this process could not answer while the proxy was started."""
    await until(lambda: proxy.admin("/readyz")[0] == 200)
    return proxy


# The claim ...


@pytest.mark.fault(8, 49)
@pytest.mark.parametrize("streamed", [False, True], ids=["small", "streamed"])
async def test_every_reply_of_the_store_may_be_lost(fork, upstream, store, streamed):
    """Whichever one it is of a key's life: one execution, the whole answer, and no loss is reported."""
    whole = b"".join(PIECES) if streamed else b"ok"
    async with store.relaying() as relay:
        upstream.script = in_pieces_behind(relay) if streamed else answering(OK)
        proxy = await ready(await fork(upstream, relay.url))
        calls = 0
        number = 0
        while number <= calls:
            begun = relay.scripts
            if number:
                relay.lose_reply(number)
            answer = await ask(proxy.port, request(key=f"k{number}"))
            assert (answer.header("oncegate-status"), answer.body) == (b"executed", whole)
            calls = calls or relay.scripts - begun
            again = await ask(proxy.port, request(key=f"k{number}"))
            assert (again.header("oncegate-status"), again.body) == (b"replayed", whole)
            number += 1
        assert calls == (2 + len(PIECES) if streamed else 2)
        assert relay.lost == calls
    assert len(upstream.received) == 1 + calls
    assert proxy.metric("claims_lost_total") == 0


@pytest.mark.fault(9)
@pytest.mark.parametrize("killed", [False, True], ids=["", "killed meanwhile"])
async def test_a_claim_whose_reply_is_lost_as_the_store_goes_away(fork, upstream, store, killed):
    """503, nothing sent; afterwards the key is free, or, if nobody was left to free it, unknown and never executed."""
    async with store.relaying() as relay:
        proxy = await ready(await fork(upstream, relay.url, LEASE_MS=600, STORE_TIMEOUT_MS=300))
        other = await fork(upstream, store.url, LEASE_MS=600)
        relay.lose_reply(then_unreachable=True)
        answer = await ask(proxy.port, request())
        assert (answer.status, answer.slug) == (503, "store-unavailable")
        assert store.states() == [b"in_flight"]
        if killed:
            proxy.kill()
        await asyncio.sleep(0.9)  # longer than the lease
        assert (await ask(other.port, request())).slug == "outcome-unknown"
        relay.unreachable = False
        if not killed:
            await until(lambda: store.states() == [])
            assert (await ask(proxy.port, request())).header("oncegate-status") == b"executed"
        else:
            assert (await ask(other.port, request())).slug == "outcome-unknown"
    assert len(upstream.received) == (0 if killed else 1)


@pytest.mark.fault(10)
async def test_a_claim_that_arrives_after_its_repeat(fork, upstream, valkey):
    """It was held up on a connection that broke, and repeated on the next: executed late, it changes nothing."""
    async with relaying(valkey.socket) as relay:
        proxy = await fork(upstream, relay.url, STORE_TIMEOUT_MS=5000)
        await ask(proxy.port, request(key="before"))
        relay.hold()
        asking = asyncio.ensure_future(ask(proxy.port, request()))
        await asyncio.sleep(0.2)
        relay.cut()
        assert (await asking).header("oncegate-status") == b"executed"
        before = valkey.records()
        with valkey.client() as client:
            client.config_resetstat()
            relay.let_go()
            await until(lambda: "cmdstat_evalsha" in client.info("commandstats"))
        assert valkey.records() == before
        assert (await ask(proxy.port, request())).header("oncegate-status") == b"replayed"
    assert len(upstream.received) == 2


@pytest.mark.fault(21)
async def test_a_release_that_finds_no_store(fork, upstream, store):
    """Nothing could be sent and the key could not be freed: it is, once the store is back."""
    async with store.relaying() as relay:
        proxy = await fork(
            f"http://127.0.0.1:{closed_port()}", relay.url, STORE_TIMEOUT_MS=300, CONNECT_RETRIES=0, LEASE_MS=20_000,
            FAULT="pause@connect:1", TESTING=1,
        )  # fmt: skip
        other = await fork(upstream, store.url)
        await ready(proxy)
        asking = asyncio.ensure_future(ask(proxy.port, request()))
        await until(lambda: is_stopped(proxy.process.pid))
        relay.unreachable = True
        relay.cut()
        proxy.signal(signal.SIGCONT)
        answer = await asking
        assert (answer.status, answer.slug) == (502, "upstream-unreachable")
        assert (await ask(other.port, request())).slug == "in-flight"
        relay.unreachable = False
        await until(lambda: store.states() == [], 30)
        assert (await ask(other.port, request())).header("oncegate-status") == b"executed"
        assert proxy.metric("claims_lost_total") == 0


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


# Sending ...


@pytest.mark.fault(24)
@pytest.mark.parametrize("step", [37, pytest.param(1, marks=FULL)], ids=["some", "all"])
async def test_a_request_lost_at_any_of_its_bytes(standing, valkey, step):
    """The upstream resets after k bytes of a 4 KiB request: 502, unknown, and no second connection for it."""
    raw_request = request(body=b"b" * 3800)
    offsets = [*range(1, 300), *range(300, 3970, step)]  # the last is among the body's last bytes
    left = list(offsets)

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(left.pop())
        abort(writer)

    async def lose(number: int) -> None:
        answer = await ask(standing.port, raw_request.replace(b"key-1", b"key-%d" % number))
        assert (answer.status, answer.slug) == (502, "upstream-lost")

    async with serving(talk, sock=standing.upstream_socket.dup()) as raw:
        for begin in range(0, len(offsets), 20):
            await asyncio.gather(*map(lose, range(begin, min(begin + 20, len(offsets)))))
        assert raw.accepted == len(offsets)
    assert valkey.states() == [b"unknown"] * len(offsets)


@pytest.mark.fault(25)
@pytest.mark.parametrize(("lines", "each"), [(15, 40), pytest.param(50, 400, marks=FULL)], ids=["some", "many"])
async def test_connections_that_close_just_as_they_are_used_again(fork, valkey, lines, each):
    """The upstream closes after as long as the proxy keeps one: a key may become unknown, and none is sent twice."""
    idle_s = 0.02
    seen: Counter[bytes] = Counter()

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            async with asyncio.timeout(idle_s):
                head = await reader.readuntil(b"\r\n\r\n")
            seen[re.search(rb"idempotency-key: (\S+)", head, re.I)[1]] += 1
            writer.write(OK)

    async def quiet(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk(raw, reader, writer)
        except TimeoutError:
            writer.close()

    async with serving(quiet) as raw:
        proxy = await fork(raw.url, valkey.url, UPSTREAM_REUSE_IDLE_S=idle_s * 1.5, UPSTREAM_REST_S=0)

        async def line(name: int) -> list[bytes | None]:
            client, found = await RawClient.open(proxy.port), []
            for number in range(each):
                await asyncio.sleep(random.uniform(idle_s * 0.9, idle_s * 1.1))
                answer = await client.ask(request(key=f"{name}-{number}", body=b""))
                assert answer is not None
                assert answer.status == 200 or answer.slug == "upstream-lost"
                found.append(answer.header("oncegate-status"))
            client.close()
            return found

        outcomes = Counter(word for words in await asyncio.gather(*map(line, range(lines))) for word in words)
    assert set(seen.values()) == {1}
    assert outcomes[b"executed"] == valkey.states().count(b"complete")
    assert outcomes[b"unknown"] == valkey.states().count(b"unknown")
    assert outcomes[b"executed"] > lines * each * 5 / 6


@pytest.mark.fault(26)
@pytest.mark.parametrize("key", ["k", None], ids=["guarded", "passed through"])
async def test_no_method_is_sent_twice(fork, valkey, key):
    """On a connection used before, which breaks as the request is read: nothing is sent again but a GET or HEAD that
    no key guards (test_reused_connections)."""
    lines: list[bytes] = []

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await raw.request(reader)
        writer.write(OK)
        lines.append((await raw.request(reader)).partition(b"\r\n")[0])
        abort(writer)

    async with serving(talk) as raw:
        proxy = await fork(raw.url, valkey.url, METHODS="POST,PATCH,PUT,DELETE", UPSTREAM_REST_S=0)
        for method in ("POST", "PATCH", "PUT", "DELETE", *([] if key else ["OPTIONS"])):
            for number in (1, 2):
                name = key and f"{method}-{number}"
                used = method if number == 2 else "POST"
                client = await RawClient.open(proxy.port)
                answer = await client.ask(request(used, "/", name, b""))
                client.close()
                assert answer is not None
                assert answer.status == (200 if number == 1 else 502)
            assert lines.pop().startswith(method.encode())
            assert lines == []


# Waiting ...


@pytest.mark.fault(37)
@pytest.mark.parametrize("mode", ["hold", "retry"])
async def test_a_loop_that_hangs_for_two_leases(fork, upstream, valkey, mode):
    """Nothing was renewed though the process is alive: the answer is stored all the same, unless it was overtaken."""
    tap = Tap()
    upstream.script = tap.script
    stuck = await fork(upstream, valkey.url, ON_UNKNOWN=mode, LEASE_MS=600, FAULT="pause@waiting:1:1500", TESTING=1)
    other = await fork(upstream, valkey.url, ON_UNKNOWN=mode, LEASE_MS=10_000)
    original = asyncio.ensure_future(ask(stuck.port, request()))
    await until(lambda: stuck.events("fault injected") and upstream.received)
    await asyncio.sleep(0.8)
    upstream.script = answering(b"HTTP/1.1 201 Made\r\nContent-Length: 5\r\n\r\ntheir")
    meanwhile = await ask(other.port, request())
    tap.end(OK)
    answer = await original
    if mode == "hold":
        assert meanwhile.slug == "outcome-unknown"
        assert (answer.body, answer.header("oncegate-status")) == (b"ok", b"executed")
    else:
        assert (meanwhile.body, meanwhile.header("oncegate-status")) == (b"their", b"executed")
        assert (answer.body, answer.header("oncegate-status")) == (b"their", b"replayed")
    assert (await ask(other.port, request())).body == answer.body


# Within the answer ...


@pytest.mark.fault(46)
@pytest.mark.parametrize("lost_s", [0.9, *(pytest.param(seconds, marks=FULL) for seconds in (2, 15))])
@pytest.mark.parametrize("appended", range(1, len(PIECES)))
async def test_a_store_that_is_lost_between_two_appends(fork, upstream, store, appended, lost_s):
    """For longer than a lease: the client gets all, its end when the store is back, and so does the retry."""
    upstream.script = in_pieces
    async with store.relaying() as relay:
        proxy = await ready(await fork(upstream, relay.url, LEASE_MS=600))
        at_start = relay.scripts  # a probe claims and frees
        original = asyncio.ensure_future(ask(proxy.port, request()))
        await until(lambda: relay.scripts > at_start + appended)
        relay.unreachable = True
        relay.cut()
        await asyncio.sleep(lost_s)
        assert not original.done()
        relay.unreachable = False
        answer = await original
        assert (answer.complete, answer.body) == (True, b"".join(PIECES))
        again = await ask(proxy.port, request())
        assert (again.header("oncegate-status"), again.body) == (b"replayed", answer.body)
    assert len(upstream.received) == 1
    assert proxy.metric("claims_lost_total") == 0


@pytest.mark.fault(46)
async def test_an_answer_whose_pieces_were_not_stored_in_time_is_no_stored_one(fork, upstream, store):
    """Also where the store is back for the settle: the client sees it broken off, and its key is unknown."""
    done = asyncio.Event()

    async def script(_: RawUpstream, __: object, writer: asyncio.StreamWriter, ___: Received) -> None:
        writer.write(CHUNKED + chunk(PIECES[0]))
        await done.wait()
        writer.write(chunk(PIECES[1]) + chunk(PIECES[2]) + LAST_CHUNK)

    upstream.script = script
    async with store.relaying() as relay:
        proxy = await ready(await fork(upstream, relay.url, SETTLE_TIMEOUT_S=1.5, LEASE_MS=4000))
        at_start = relay.scripts
        original = asyncio.ensure_future(ask(proxy.port, request()))
        await until(lambda: relay.scripts > at_start + 1)
        relay.unreachable = True
        relay.cut()
        done.set()
        await asyncio.sleep(2)  # longer than the patience of the append, not than that of the settle behind it
        relay.unreachable = False
        assert not (await original).complete
        await until(lambda: store.states() == [b"unknown"])
        assert (await ask(proxy.port, request())).slug == "outcome-unknown"
    assert len(upstream.received) == 1


@FULL
@pytest.mark.fault(46)
@pytest.mark.parametrize("appended", range(1, len(PIECES)))
async def test_a_store_that_is_lost_for_longer_than_the_patience(fork, upstream, store, appended):
    """For more than a minute, the patience of the last append and of the settle: broken off, and unknown."""
    upstream.script = in_pieces
    async with store.relaying() as relay:
        proxy = await ready(await fork(upstream, relay.url))
        at_start = relay.scripts
        original = asyncio.ensure_future(ask(proxy.port, request(), 120))
        await until(lambda: relay.scripts > at_start + appended)
        relay.unreachable = True
        relay.cut()
        await asyncio.sleep(70)
        assert not (await original).complete
        relay.unreachable = False
        await until(lambda: proxy.admin("/readyz")[0] == 200)
        assert (await ask(proxy.port, request())).slug == "outcome-unknown"
    assert len(upstream.received) == 1


@FULL
@pytest.mark.fault(51, 52)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("streamed", [False, True], ids=["small", "streamed"])
async def test_an_answer_that_is_stored_and_not_delivered(fork, upstream, store, streamed):
    """SIGKILL between the store's word and the end of the answer, 500 times: none looks whole, each is replayed."""
    upstream.script = in_pieces if streamed else answering(OK)
    whole = b"".join(PIECES) if streamed else b"ok"
    heir = await fork(upstream, store.url)
    for number in range(500):
        doomed = await fork(upstream, store.url, TESTING=1, FAULT="kill@end:1")
        client = await RawClient.open(doomed.port)
        try:
            answer = await client.ask(request(key=f"k{number}"))
        except ConnectionError:
            answer = None
        client.close()
        assert answer is None or not answer.complete
        replay = await ask(heir.port, request(key=f"k{number}"))
        assert (replay.header("oncegate-status"), replay.body) == (b"replayed", whole)
    assert len(upstream.received) == 500


# Replays ...

LARGE = b"l" * 12_000_000


async def large_replay(proxy: Proxy, upstream: RawUpstream) -> RawClient:
    """Store a large answer; return a client to which its replay has begun, and which takes no more of it yet."""
    upstream.script = answering(CHUNKED + chunk(LARGE) + LAST_CHUNK)
    assert (await ask(proxy.port, request())).complete
    client = await lazy(proxy.port)
    client.writer.write(request())
    before = -1.0
    while before != (before := proxy.metric('store_seconds_count{verb="read"}')) or not before:
        await asyncio.sleep(0.1)
    return client


@pytest.mark.fault(54)
@pytest.mark.parametrize("how", ["deleted", "expired", "chunk gone", "chunk changed", "store killed"])
async def test_a_replay_whose_record_goes_away_never_ends_cleanly(fork, upstream, own_valkey, how):
    """Whatever takes the rest of it away in the middle: the client sees that it broke off, and nothing is executed."""
    gate = await fork(upstream, own_valkey.url, STORE_TIMEOUT_MS=500)
    client = await large_replay(gate, upstream)
    with own_valkey.client() as redis:
        (name,) = redis.scan_iter("once:{*")
        last = max(int(field[1:]) for field in redis.hkeys(name) if field[:1] == b"b")
        match how:
            case "deleted":
                redis.delete(name)
            case "expired":
                redis.pexpire(name, 1)
            case "chunk gone":
                redis.hdel(name, f"b{last}")
            case "chunk changed":
                redis.hset(name, f"b{last}", b"L" + redis.hget(name, f"b{last}")[1:])
            case _:
                own_valkey.kill()
    client.writer.transport.resume_reading()
    answer = await asyncio.wait_for(read_answer(client.reader), 30)
    client.close()
    assert answer is not None
    assert (answer.header("oncegate-status"), answer.complete) == (b"replayed", False)
    assert answer.body == LARGE[: len(answer.body)] or how == "chunk changed"
    assert len(upstream.received) == 1
    await until(lambda: gate.metric('requests_total{outcome="truncated"}') == 1)


@pytest.mark.fault(56)
async def test_a_client_that_leaves_its_replay(fork, upstream, valkey):
    """Its record is as it was, and the next one gets all of it."""
    gate = await fork(upstream, valkey.url)
    client = await large_replay(gate, upstream)
    before = valkey.records()
    client.reset()
    await until(lambda: gate.metric("in_flight") == 0)
    assert valkey.records() == before
    again = await ask(gate.port, request())
    assert (again.header("oncegate-status"), again.complete, again.body == LARGE) == (b"replayed", True, True)
    assert len(upstream.received) == 1


@pytest.mark.fault(55)
async def test_a_record_with_any_byte_changed(fork, upstream, valkey):
    """Each byte of a small complete record, one after the other: 500 record-corrupt, neither replayed nor executed."""
    upstream.script = answering(OK)
    gate = await fork(upstream, valkey.url)
    await ask(gate.port, request())
    asked = 0
    client = await RawClient.open(gate.port)
    with valkey.client() as redis:
        (name,) = redis.scan_iter("once:{*")
        for field, value in redis.hgetall(name).items():
            # What is kept for operators is under no check: nothing is decided by it (tests/test_kept.py).
            for place in range(len(value) if field != b"more" else 0):
                wrong = value[:place] + bytes([value[place] ^ 1 << place % 8]) + value[place + 1 :]
                redis.hset(name, field, wrong)
                answer = await client.ask(request())
                assert answer is not None
                assert (answer.status, answer.slug) == (500, "record-corrupt"), (field, place)
                assert redis.hget(name, field) == wrong
                asked += 1
            redis.hset(name, field, value)
    client.close()
    assert (await ask(gate.port, request())).header("oncegate-status") == b"replayed"
    assert asked > 150
    assert len(upstream.received) == 1


# Around it ...


class Unsteady(Proxy):
    """A proxy whose wall clock is off by as much as a file says."""

    def _spawn(self) -> None:
        self.offset = self.folder / "offset"
        self.offset.write_text("0")
        code = (
            "import time, sys; real = time.time\n"
            f"time.time = lambda: real() + int(open({str(self.offset)!r}).read())\n"
            "from oncegate.commands.cli import main; sys.exit(main(['serve']))"
        )
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code], env=self._env, stderr=log, stdout=log, cwd=self.folder
            )


def seconds_off(answer: Answer) -> float:
    """Return by how much the clock is off that an answer's Date was read from."""
    return parsedate_to_datetime((answer.header("date") or b"").decode()).timestamp() - time.time()


@pytest.mark.fault(57)
async def test_a_jump_of_the_wall_clock_changes_nothing(upstream, valkey: Valkey, tmp_path):
    """An hour ahead, then back: what runs is neither lost nor ended, what waits goes on waiting, all is replayed."""
    done = asyncio.Event()
    upstream.script = holding(done)
    unsteady = Unsteady(upstream.url, valkey.url, tmp_path, {"LEASE_MS": 600})
    unsteady.start()
    try:
        original = asyncio.ensure_future(ask(unsteady.port, request()))
        await until(lambda: upstream.received)
        waiting = asyncio.ensure_future(ask(unsteady.port, request("POST", "/v1/charges", "key-1", b'{"amount": 1}',
                                                                   "Prefer: wait=20")))  # fmt: skip
        for hours in (1, -1, 0):
            unsteady.offset.write_text(str(hours * 3600))
            await asyncio.sleep(0.7)  # longer than a lease
            told = await ask(unsteady.port, request())
            assert told.slug == "in-flight"
            assert 1 <= int(told.header("retry-after") or 0) <= 4
            assert abs(seconds_off(told) - hours * 3600) < 60
        assert not original.done()
        assert not waiting.done()
        done.set()
        assert (await original).header("oncegate-status") == b"executed"
        for replay in (await waiting, await ask(unsteady.port, request())):
            assert replay.header("oncegate-status") == b"replayed"
            assert int(replay.header("age") or -1) < 5
        assert unsteady.metric("claims_lost_total") == 0
    finally:
        unsteady.close()


LIBFAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)  # Debian: faketime


class Faked(Proxy):
    """A proxy to whose whole process, C libraries too, the wall clock is off by as much as a file says."""

    def _spawn(self) -> None:
        self.offset = self.folder / "offset"
        self.offset.write_text("+0")
        preload = {
            "LD_PRELOAD": str(LIBFAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(self.offset),
            "FAKETIME_NO_CACHE": "1",
        }
        self._env |= {**preload, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        super()._spawn()


@FULL
@pytest.mark.fault(57)
async def test_a_jump_of_the_wall_clock_as_every_library_sees_it(upstream, valkey: Valkey, tmp_path):
    """An hour ahead, then back, 50 times over while requests run: none is lost, none is executed twice."""
    assert LIBFAKETIME, "install Debian's package faketime"
    upstream.script = in_pieces
    faked = Faked(upstream.url, valkey.url, tmp_path, {"LEASE_MS": 600})
    faked.start()
    try:
        for number in range(50):
            original = asyncio.ensure_future(ask(faked.port, request(key=f"k{number}")))
            for hours in ("+1h", "-1h", "+0"):
                faked.offset.write_text(hours)
                await asyncio.sleep(0.03)
                assert (await ask(faked.port, request(key=f"k{number}"))).status in (409, 200)
            assert (await original).header("oncegate-status") == b"executed"
            replay = await ask(faked.port, request(key=f"k{number}"))
            assert (replay.header("oncegate-status"), replay.body) == (b"replayed", b"".join(PIECES))
        assert faked.metric("claims_lost_total") == 0
    finally:
        faked.close()
    assert len(upstream.received) == 50


# To people, and to Prometheus; and housekeeping.
TELLS_THE_TIME = (
    # A cursor of the Durable Streams protocol, which keeps caches apart and decides nothing.
    ("streams", "durable.py"),
    ("operating", "decisions.py"),
    ("commands", "keys_watch.py"),
    ("server", "supervisor.py"),
    ("service", "gauges.py"),
    ("service", "reload.py"),
    ("postgres", "housekeeping.py"),
)


@pytest.mark.fault(57)
def test_nothing_decides_by_the_wall_clock():
    """No module of the proxy reads it but the logs, what operators see, and housekeeping, which removes what is over by
    the server's clock as well; Date fields have it from a library."""
    for path in Path(oncegate.__file__).parent.rglob("*.py"):
        assert (
            path.name == "logs.py"
            or (path.parent.name, path.name) in TELLS_THE_TIME
            or not re.search(
                r"\btime\.time\(|\bdate(time)?\.(now|today|utcnow)\(|CLOCK_REALTIME|\bgmtime\b", path.read_text()
            )
        ), path


@pytest.mark.fault(58)
@pytest.mark.parametrize("hours", [1, -1])
@pytest.mark.parametrize("mode", ["hold", "retry"])
async def test_a_jump_of_the_stores_clock(fork, upstream, valkey, hours, mode):
    """Ahead, the lease is over early: unknown, or overtaken under retry. Back, it lasts for one lease, no longer."""
    tap = Tap()
    upstream.script = tap.script
    owner = await fork(upstream, valkey.url, ON_UNKNOWN=mode, LEASE_MS=900)
    original = asyncio.ensure_future(ask(owner.port, request()))
    await until(lambda: upstream.received)
    owner.signal(signal.SIGSTOP)
    other = await fork(upstream, valkey.url, ON_UNKNOWN=mode, LEASE_MS=900)
    with valkey.client() as client:
        (name,) = client.scan_iter("once:{*")
        client.hincrby(name, "lease", -hours * 3_600_000)
        client.hincrby(name, "created", -hours * 3_600_000)
    upstream.script = answering(OK)
    told = await ask(other.port, request())
    if hours < 0:
        assert (told.slug, told.header("retry-after")) == ("in-flight", b"1")
    elif mode == "hold":
        assert told.slug == "outcome-unknown"
    else:
        assert told.header("oncegate-status") == b"executed"
    owner.signal(signal.SIGCONT)
    tap.end(OK)
    answer = await original
    assert answer.header("oncegate-status") == (b"replayed" if told.status == 200 else b"executed")
    assert (await ask(other.port, request())).header("oncegate-status") == b"replayed"
