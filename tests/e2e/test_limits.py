"""What is over a limit is refused before the claim, told to the client, and forgotten."""

import asyncio
import os
import random
import resource
import shutil
import socket
from contextlib import closing
from pathlib import Path

import pytest

from tests.parts import (
    OK,
    Answer,
    RawClient,
    RawUpstream,
    answering,
    ask,
    chunk,
    holding,
    lazy,
    open_files,
    read_answer,
    request,
    until,
)

MIB = 1 << 20
MAX = 3 * MIB  # MAX_REQUEST_BYTES in here: spooled from 1 MiB on


def body_of(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def chunked(body: bytes, block: int = 65_536) -> bytes:
    return b"".join(chunk(body[start : start + block]) for start in range(0, len(body), block)) + b"0\r\n\r\n"


def by_length(key: str | None, body: bytes, method: str = "POST") -> bytes:
    return request(method, "/up", key, body, f"Content-Length: {len(body)}")


def in_chunks(key: str | None, body: bytes, method: str = "POST") -> bytes:
    return request(method, "/up", key, b"", "Transfer-Encoding: chunked") + chunked(body)


def memory_kib(proxy) -> int:
    fields = Path(f"/proc/{proxy.process.pid}/status").read_text().split()
    return int(fields[fields.index("VmRSS:") + 1])


FRAMINGS = pytest.mark.parametrize("framed", [by_length, in_chunks])


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    folder = tmp_path / "spool"
    folder.mkdir()
    return folder


async def assert_at_rest(proxy, spool: Path | None = None) -> None:
    """Nothing is held any more: no room, no slot, no file."""
    await until(lambda: not any(map(proxy.metric, ("in_flight", "reading_bodies", "buffered_bytes"))))
    assert spool is None or list(spool.iterdir()) == []
    assert open_spools(proxy, spool) == 0


def open_spools(proxy, spool: Path | None) -> int:
    """Count the spool files that the proxy has open; none has a name."""
    return sum(name.startswith(f"{spool}/") for name in open_files(proxy.process.pid))


# The size of a body ...


@pytest.mark.fault(2)
@FRAMINGS
async def test_a_body_up_to_the_limit_is_forwarded_and_one_byte_more_is_not(proxies, upstream, valkey, spool, framed):
    """At the limit and below, in memory and spooled, every byte arrives; over it comes 413, with nothing claimed."""
    gate = proxies(upstream, valkey.url, MAX_REQUEST_BYTES=MAX, SPOOL_DIR=spool)
    sizes = (0, 1, MIB - 1, MIB, MIB + 1, MAX - 1, MAX)
    for size in sizes:
        assert (await ask(gate.port, framed(f"size-{size}", body_of(size)))).status == 200
    assert [received.body == body_of(size) for received, size in zip(upstream.received, sizes, strict=True)] == [
        True
    ] * 7
    assert [received.header("content-length") for received in upstream.received] == [[b"%d" % size] for size in sizes]
    valkey.client().flushall()
    for size in (MAX + 1, 2 * MAX):
        answer = await ask(gate.port, framed(f"size-{size}", body_of(size)))
        assert (answer.status, answer.slug, answer.header("oncegate-status")) == (413, "body-too-large", b"refused")
        assert (answer.problem["retryable"], answer.problem["reuse_key"]) == (False, True)
        assert answer.header("connection") == b"close"
    assert len(upstream.received) == len(sizes)
    assert valkey.records() == {}
    await assert_at_rest(gate, spool)


async def test_a_replay_of_a_spooled_request_is_recognised_by_its_bytes(proxies, upstream, valkey, spool):
    """The fingerprint is of the same bytes, however they were framed and wherever they were held."""
    gate = proxies(upstream, valkey.url, SPOOL_DIR=spool)
    for size in (100, MIB, MIB + 1, 2 * MIB):
        body = body_of(size)
        assert (await ask(gate.port, by_length(f"same-{size}", body))).header("oncegate-status") == b"executed"
        assert (await ask(gate.port, in_chunks(f"same-{size}", body))).header("oncegate-status") == b"replayed"
        assert (await ask(gate.port, in_chunks(f"same-{size}", body[:-1] + b"\0"))).slug == "key-reused"
    assert len(upstream.received) == 4
    await assert_at_rest(gate, spool)


@pytest.mark.fault(2)
@pytest.mark.parametrize("stated", [MAX + 1, 1 << 40, 9_223_372_036_854_775_807])
async def test_a_length_over_the_limit_is_refused_at_the_head(proxies, upstream, valkey, stated):
    """What Content-Length says is enough: 413 comes before a byte of the body."""
    gate = proxies(upstream, valkey.url, MAX_REQUEST_BYTES=MAX)
    with closing(await RawClient.open(gate.port)) as client:
        answer = await client.ask(request("POST", "/up", "liar", b"", f"Content-Length: {stated}"))
        assert (answer.status, answer.slug) == (413, "body-too-large")
    assert (upstream.received, valkey.records()) == ([], {})
    await assert_at_rest(gate)


@FRAMINGS
async def test_a_client_that_keeps_sending_sees_its_413(proxies, upstream, valkey, framed):
    """The rest of a refused body is read and dropped, so that a client which reads only at the end gets the answer."""
    gate = proxies(upstream, valkey.url, MAX_REQUEST_BYTES=MAX)
    with closing(await RawClient.open(gate.port)) as client:
        raw = framed("big", body_of(8 * MAX))
        for start in range(0, len(raw), 256 << 10):
            client.writer.write(raw[start : start + (256 << 10)])
            await client.writer.drain()
        answer = await read_answer(client.reader)
        assert (answer.status, answer.slug, answer.complete) == (413, "body-too-large", True)
        assert await client.reader.read() == b""
    assert (upstream.received, valkey.records()) == ([], {})
    await assert_at_rest(gate)


async def test_pass_through_has_no_limit(proxies, upstream, valkey):
    """What no key guards is streamed, whatever its size."""
    gate = proxies(upstream, valkey.url, MAX_REQUEST_BYTES=MAX, MAX_BUFFERED_BYTES=16 * MIB)
    for framed in (by_length, in_chunks):
        assert (await ask(gate.port, framed(None, body_of(20 * MIB)))).status == 200
    assert [received.body == body_of(20 * MIB) for received in upstream.received] == [True, True]


# The spool ...


@pytest.mark.parametrize("end", ["answer", "client leaves", "SIGKILL"])
async def test_spool_files_have_no_name_and_leave_nothing(proxies, upstream, valkey, spool, end):
    """A spooled body is in an unlinked file: the folder is empty while it is there, and after any end."""
    gate = proxies(upstream, valkey.url, SPOOL_DIR=spool)
    with closing(await RawClient.open(gate.port)) as client:
        raw = by_length("spooled", body_of(2 * MIB))
        client.writer.write(raw[: -MIB // 2])
        await until(lambda: open_spools(gate, spool) == 1)
        assert list(spool.iterdir()) == []
        if end == "answer":
            assert (await client.ask(raw[-MIB // 2 :])).status == 200
        elif end == "client leaves":
            client.reset()
        else:
            gate.kill()
    if end == "SIGKILL":
        assert list(spool.iterdir()) == []
    else:
        await assert_at_rest(gate, spool)
        assert valkey.states() == ([b"complete"] if end == "answer" else [])


def _fill(proxy, spool: Path) -> None:
    """No file of the proxy may grow beyond 1.5 MiB: its writes fail as on a full disk."""
    resource.prlimit(proxy.process.pid, resource.RLIMIT_FSIZE, (3 * MIB // 2, 3 * MIB // 2))


def _remove(_, spool: Path) -> None:
    shutil.rmtree(spool)


@pytest.mark.fault(60)
@pytest.mark.parametrize("break_it", [_fill, _remove])
@FRAMINGS
async def test_a_spool_that_takes_nothing_is_an_overload(proxies, upstream, valkey, spool, break_it, framed):
    """A full or vanished spool folder is 503 overloaded before the claim; small bodies go on."""
    gate = proxies(upstream, valkey.url, SPOOL_DIR=spool)
    break_it(gate, spool)
    for number in range(3):
        answer = await ask(gate.port, framed(f"full-{number}", body_of(2 * MIB)))
        assert (answer.status, answer.slug, answer.header("oncegate-status")) == (503, "overloaded", b"refused")
        assert (answer.problem["retryable"], answer.problem["reuse_key"]) == (True, True)
        assert answer.header("retry-after") == b"1"
    assert (upstream.received, valkey.records()) == ([], {})
    assert (await ask(gate.port, framed("small", body_of(MIB)))).status == 200
    if spool.exists():
        await assert_at_rest(gate, spool)
    else:
        spool.mkdir()
        assert (await ask(gate.port, framed("full-0", body_of(2 * MIB)))).header("oncegate-status") == b"executed"


@pytest.mark.fault(5)
async def test_the_spool_of_a_worker_is_limited(proxies, upstream, valkey, spool):
    """Bodies that together are over MAX_SPOOL_BYTES are refused with overloaded; room that comes free is used again."""
    gate = proxies(upstream, valkey.url, SPOOL_DIR=spool, MAX_SPOOL_BYTES=4 * MIB, MAX_REQUEST_BYTES=4 * MIB)
    go = asyncio.Event()
    upstream.script = holding(go)
    first = asyncio.ensure_future(ask(gate.port, by_length("spool-1", body_of(3 * MIB))))
    await until(lambda: upstream.received)
    answer = await ask(gate.port, in_chunks("spool-2", body_of(2 * MIB)))
    assert (answer.status, answer.slug) == (503, "overloaded")
    assert len(valkey.records()) == 1
    go.set()
    assert (await first).status == 200
    assert (await ask(gate.port, in_chunks("spool-2", body_of(2 * MIB)))).header("oncegate-status") == b"executed"
    await assert_at_rest(gate, spool)


# Memory, slots, descriptors ...


@pytest.mark.fault(5)
async def test_the_memory_of_a_worker_is_limited(proxies, upstream, valkey, spool):
    """Bodies that come in parts have half of MAX_BUFFERED_BYTES, and are spooled beyond; without room there they are
    refused with overloaded, and taken when there is room."""
    limits = {"MAX_BUFFERED_BYTES": 2 * MIB, "MAX_STORED_BYTES": MIB, "MAX_REQUEST_BYTES": MIB, "MAX_SPOOL_BYTES": MIB}
    gate = proxies(upstream, valkey.url, SPOOL_DIR=spool, **limits)
    go = asyncio.Event()
    upstream.script = holding(go)
    half = []
    for number in range(2):
        half.append(asyncio.ensure_future(ask(gate.port, by_length(f"mem-{number}", body_of(700_000)))))
        await until(lambda: len(upstream.received) == len(half))
    assert (gate.metric("buffered_bytes"), open_spools(gate, spool)) == (700_000, 1)
    for framed in (by_length, in_chunks):
        answer = await ask(gate.port, framed("mem-over", body_of(900_000)))
        assert (answer.status, answer.slug, answer.header("retry-after")) == (503, "overloaded", b"1")
    assert gate.metric("buffered_bytes") == 700_000
    assert (len(upstream.received), len(valkey.records())) == (2, 2)
    go.set()
    assert [answer.status for answer in await asyncio.gather(*half)] == [200, 200]
    assert (await ask(gate.port, by_length("mem-over", body_of(900_000)))).header("oncegate-status") == b"executed"
    await assert_at_rest(gate)
    assert gate.metric('requests_total{outcome="overloaded"}') == 2


@pytest.mark.fault(5)
async def test_duplicates_that_wait_leave_the_memory(proxies, valkey, spool):
    """Their bodies are in the spool, half of which they may use; one more gets 409 at once, and is counted.

    New requests go on, and one that waited executes with its very body where the original was not sent.
    """
    size, spool_bytes = 100_000, 500_000
    limits = {"MAX_BUFFERED_BYTES": 2 * MIB, "MAX_STORED_BYTES": MIB}
    limits |= {"MAX_SPOOL_BYTES": spool_bytes, "MAX_REQUEST_BYTES": spool_bytes}
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))  # refuses until it listens
        url = f"http://127.0.0.1:{place.getsockname()[1]}"
        connecting = {"CONNECT_TIMEOUT_S": 1.5, "CONNECT_RETRIES": 20}
        gate = proxies(url, valkey.url, ON_DUPLICATE="wait", SPOOL_DIR=spool, **limits, **connecting)
        original = asyncio.ensure_future(ask(gate.port, by_length("key", body_of(size))))
        await until(valkey.states)
        asks = [asyncio.ensure_future(ask(gate.port, by_length("key", body_of(size)))) for _ in range(10)]
        await until(lambda: sum(one.done() for one in asks) == 7)
        assert (gate.metric("waiting"), gate.metric("buffered_bytes"), open_spools(gate, spool)) == (3, size, 3)
        assert gate.metric('waits_total{end="no_room_for_body"}') == 7
        refused = [one.result() for one in asks if one.done()]
        assert {(answer.status, answer.slug) for answer in refused} == {(409, "in-flight")}
        assert (await original).slug == "upstream-unreachable"
        upstream = RawUpstream()
        await upstream.start(place)
        try:
            served = [answer for answer in await asyncio.gather(*asks) if answer.status == 200]
        finally:
            await upstream.close()
    assert sorted(answer.header("oncegate-status") for answer in served) == [b"executed", b"replayed", b"replayed"]
    assert [received.body for received in upstream.received] == [body_of(size)]
    await assert_at_rest(gate, spool)


async def test_answers_that_nobody_reads_are_not_heaped_up(proxies, upstream, valkey):
    """A client that asks on and on without reading is answered only as fast as it takes: memory stays flat."""
    upstream.script = answering(b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n" + bytes(60000))
    proxy = proxies(upstream, valkey.url)
    await ask(proxy.port, request())
    client = await lazy(proxy.port)
    client.writer.write(request() * 2000)  # 120 MB of answers, of which the kernel holds a few
    before, seen = memory_kib(proxy), -1.0
    while seen != (seen := proxy.metric('requests_total{outcome="replayed"}')):
        await asyncio.sleep(0.3)
    assert seen < 1000
    assert memory_kib(proxy) < before + 20_000
    client.writer.transport.resume_reading()
    async with asyncio.timeout(60):
        for _ in range(2000):
            answer = await read_answer(client.reader)
            assert answer is not None
            assert answer.complete
    client.close()


@pytest.mark.fault(5)
async def test_requests_in_flight_are_limited(proxies, upstream, valkey):
    """Over MAX_IN_FLIGHT a keyed request is overloaded before the claim; pass-through and the running ones go on."""
    gate = proxies(upstream, valkey.url, MAX_IN_FLIGHT=3)
    go = asyncio.Event()
    upstream.script = holding(go)
    running = [asyncio.ensure_future(ask(gate.port, request(key=f"run-{number}"))) for number in range(3)]
    await until(lambda: len(upstream.received) == 3)
    with closing(await RawClient.open(gate.port)) as client:
        for _ in range(3):  # the connection stays usable
            answer = await client.ask(request(key="one-more"))
            assert (answer.status, answer.slug, answer.header("oncegate-status")) == (503, "overloaded", b"refused")
            assert (answer.problem["retryable"], answer.problem["reuse_key"]) == (True, True)
            assert (answer.header("retry-after"), answer.header("x-should-retry")) == (b"1", b"true")
            assert answer.header("connection") is None
        expecting = await client.ask(request("POST", "/x", "two", b"", "Expect: 100-continue", "Content-Length: 5"))
        assert (expecting.status, expecting.interim, expecting.header("connection")) == (503, [], b"close")
    assert len(valkey.records()) == 3
    through = asyncio.ensure_future(ask(gate.port, request(key=None)))
    await until(lambda: len(upstream.received) == 4)
    go.set()
    assert [answer.status for answer in await asyncio.gather(*running, through)] == [200] * 4
    assert (await ask(gate.port, request(key="one-more"))).header("oncegate-status") == b"executed"
    await assert_at_rest(gate)


async def test_bodies_that_come_slowly_hold_no_place(proxies, upstream, valkey):
    """However many clients send a body bit by bit: keyed requests are executed, and theirs once they are whole."""
    gate = proxies(upstream, valkey.url, MAX_IN_FLIGHT=2)
    slow = [await RawClient.open(gate.port) for _ in range(6)]
    for number, client in enumerate(slow):
        client.writer.write(request("POST", "/slow", f"slow-{number}", b"", "Content-Length: 3") + b"1")
    await until(lambda: gate.metric("reading_bodies") == 6)
    assert gate.metric("in_flight") == 0
    assert (await ask(gate.port, request(key="quick"))).header("oncegate-status") == b"executed"
    for client in slow:
        assert (await client.ask(b"23")).header("oncegate-status") == b"executed"
        client.close()
    assert gate.metric("reading_bodies") == 0
    await assert_at_rest(gate)


@pytest.mark.fault(5)
async def test_many_at_once_over_the_limit_leave_the_proxy_as_it_was(proxies, upstream, valkey):
    """Of a crowd of twice the limit each gets its answer or overloaded, one execution each, and the slots come back."""
    gate = proxies(upstream, valkey.url, MAX_IN_FLIGHT=20)
    go = asyncio.Event()
    upstream.script = holding(go)
    crowd = [asyncio.ensure_future(ask(gate.port, request(key=f"crowd-{number}"))) for number in range(40)]
    await until(lambda: len(upstream.received) == 20 and sum(one.done() for one in crowd) == 20)
    assert {one.result().slug for one in crowd if one.done()} == {"overloaded"}
    go.set()
    assert sorted([answer.status for answer in await asyncio.gather(*crowd)]) == [200] * 20 + [503] * 20
    assert valkey.states() == [b"complete"] * 20
    await assert_at_rest(gate)


async def test_broken_uploads_give_everything_back(proxies, upstream, valkey, spool):
    """Clients that leave, break their framing or send too much leave no slot, no memory, no file and no record."""
    gate = proxies(upstream, valkey.url, MAX_REQUEST_BYTES=MAX, SPOOL_DIR=spool, MAX_IN_FLIGHT=30)

    async def upload(number: int, size: int, end: str) -> None:
        with closing(await RawClient.open(gate.port)) as client:
            head = request("POST", "/up", f"broken-{number}", b"", "Transfer-Encoding: chunked")
            client.writer.write(head + chunked(body_of(size))[:-5])
            await client.writer.drain()
            if end == "reset":
                client.reset()
                return
            client.writer.write({"framing": b"zz\r\n", "size": chunk(bytes(MAX)), "close": b""}[end])
            if end == "close":
                client.writer.write_eof()
            answer = await read_answer(client.reader)
            assert answer.status == (413 if end == "size" else 400)

    ends = ("reset", "framing", "size", "close")
    uploads = [upload(number, size, ends[number % 4]) for number, size in enumerate([10, 400_000, 2 * MIB] * 8)]
    await asyncio.gather(*uploads)
    assert (upstream.received, valkey.records()) == ([], {})
    await assert_at_rest(gate, spool)


async def test_all_open_files_there_are_are_taken(proxies, upstream, valkey):
    """However few it was started with; that they are too few for its connections is said."""
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(before, 512), most))
    try:
        gate = proxies(upstream, valkey.url, MAX_CONNECTIONS=most + 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))
    assert resource.prlimit(gate.process.pid, resource.RLIMIT_NOFILE) == (most, most)
    assert gate.events("open file limit below connection limit")[0]["limit"] == most


@pytest.mark.fault(60)
async def test_without_file_descriptors_the_proxy_recovers(proxies, upstream, valkey, spool):
    """At its limit of open files the proxy cuts off or refuses, keeps what is running, and is as before afterwards."""
    go = asyncio.Event()

    async def script(_, reader, writer, received):
        await (holding(go) if b"/hold" in received.line else answering(OK))(_, reader, writer, received)

    upstream.script = script
    gate = proxies(upstream, valkey.url, SPOOL_DIR=spool)
    pid = gate.process.pid
    running = asyncio.ensure_future(ask(gate.port, request(target="/hold", key="running")))
    await until(lambda: upstream.received)
    before, most = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")) + 8, most))
    crowd = [ask(gate.port, by_length(f"fd-{number}", body_of(MIB + 1))) for number in range(40)]
    outcomes = await asyncio.gather(*crowd, return_exceptions=True)
    assert not all(isinstance(outcome, Answer) and outcome.status == 200 for outcome in outcomes)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):  # its connection was cut off
            assert isinstance(outcome, AssertionError | ConnectionError)
        elif outcome.status != 200:
            assert outcome.slug in ("overloaded", "upstream-unreachable")
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (before, most))
    go.set()
    assert (await running).header("oncegate-status") == b"executed"
    for number in range(40):
        answer = await ask(gate.port, by_length(f"fd-{number}", body_of(MIB + 1)))
        assert answer.header("oncegate-status") in (b"executed", b"replayed")
    assert len(upstream.received) == 41
    await assert_at_rest(gate, spool)


# The key, through HTTP ...

SECRET = "c4n4ry"
BAD_KEYS = {
    "empty": [""],
    "blank": ["  "],
    "an empty string": ['""'],
    "256 bytes": ["k" * 256],
    "256 bytes quoted": [f'"{"k" * 256}"'],
    "a list": ["a,b"],
    "a list of strings": ['"a", "b"'],
    "a parameter without a name": ['"a";=1'],
    "an open quote": ['"a'],
    "a closing quote": ['a"'],
    "a quote within": ['a"b'],
    "a backslash": ["a\\b"],
    "an unknown escape": ['"a\\nb"'],
    "a space within": ["a b"],
    "a tab within": ["a\tb"],
    "bytes above 127": ["a\xe9"],
    "bytes above 127 quoted": ['"a\xe9"'],
    "two lines": ["a", "a"],
    "two lines that differ": ["a", "b"],
    "two lines, one empty": ["a", ""],
}
BAD_KEYS = {name: [value.replace("a", SECRET) for value in values] for name, values in BAD_KEYS.items()}


def keyed(values: list[str], body: bytes = b"{}", *extra: str) -> bytes:
    return request("POST", "/x", None, body, *[f"Idempotency-Key: {value}" for value in values], *extra)


@pytest.mark.fault(3)
@pytest.mark.parametrize("values", BAD_KEYS.values(), ids=BAD_KEYS)
async def test_a_key_that_cannot_be_used_is_refused(standing, behind, valkey, values):
    """A malformed, repeated or too long key gets 400 key-invalid; nothing is stored, and the connection goes on."""
    with closing(await RawClient.open(standing.port)) as client:
        for body in (b"", b"{}", body_of(100_000)):
            answer = await client.ask(keyed(values, body))
            assert (answer.status, answer.slug, answer.header("oncegate-status")) == (400, "key-invalid", b"refused")
            assert (answer.problem["retryable"], answer.problem["reuse_key"]) == (False, False)
            assert (answer.header("connection"), answer.header("retry-after")) == (None, None)
            assert SECRET not in answer.body.decode()
        assert (await client.ask(request(key="fine"))).header("oncegate-status") == b"executed"
    assert (len(behind.received), len(valkey.records())) == (1, 1)


@pytest.mark.parametrize(
    "value", ["k" * 255, f'"{"k" * 255}"', '"' + '\\"' * 255 + '"', '" "', "!#$%&'()*+-./:;<=>?@[]^_`{|}~"]
)
async def test_a_key_at_the_edge_of_what_is_allowed_is_used(standing, behind, value):
    """255 bytes after unescaping, and every allowed byte, make a key like any other."""
    assert (await ask(standing.port, keyed([value]))).header("oncegate-status") == b"executed"
    assert (await ask(standing.port, keyed([value]))).header("oncegate-status") == b"replayed"


@pytest.mark.parametrize(
    "scheme", ["AWS4-HMAC-SHA256 Credential=a", "Digest username=a", "OAuth a=b", "Signature k", "hawk id"]
)
async def test_a_credential_of_one_attempt_cannot_be_a_scope(standing, behind, valkey, scheme):
    """A credential that changes with every request gets 400 scope-unstable; nothing is stored."""
    answer = await ask(standing.port, keyed(["fine"], b"{}", f"Authorization: {scheme}"))
    assert (answer.status, answer.slug, answer.header("oncegate-status")) == (400, "scope-unstable", b"refused")
    assert (answer.problem["retryable"], answer.problem["reuse_key"]) == (False, False)
    assert (behind.received, valkey.records()) == ([], {})
    through = await ask(standing.port, request("POST", "/x", None, b"{}", f"Authorization: {scheme}"))
    assert through.status == 200


async def test_the_type_of_a_problem_is_a_link_to_the_docs(proxies, upstream, valkey):
    """With DOCS_URL the `type` of a problem is a link to its section; a slash at the URL's end does not matter."""
    gate = proxies(upstream, valkey.url, KEY_REQUIRED="true", DOCS_URL="https://git.test/oncegate/docs/")
    answer = await ask(gate.port, request(key=None))
    assert answer.problem["type"] == "https://git.test/oncegate/docs/reference/answers.md#key-missing"


async def test_a_required_key_that_is_missing_is_asked_for(proxies, upstream, valkey):
    """With KEY_REQUIRED a guarded method without a key gets 400 key-missing; other methods pass."""
    gate = proxies(upstream, valkey.url, KEY_REQUIRED="true", KEY_HEADER="X-Once", METHODS="POST,PUT")
    with closing(await RawClient.open(gate.port)) as client:
        for method in ("POST", "PUT"):
            answer = await client.ask(request(method, key="in the default header"))
            assert (answer.status, answer.slug, answer.header("oncegate-status")) == (400, "key-missing", b"refused")
            assert (answer.problem["retryable"], answer.problem["reuse_key"]) == (False, None)
            assert answer.header("connection") is None
        assert (upstream.received, valkey.records()) == ([], {})
        for method in ("PATCH", "DELETE", "GET"):
            assert (await client.ask(request(method, key=None))).status == 200
        for method in ("POST", "PUT"):
            named = request(method, "/x", None, b"{}", f"X-Once: {method}")
            assert (await client.ask(named)).header("oncegate-status") == b"executed"
    assert len(upstream.received) == 5


async def test_every_answer_to_a_guarded_request_says_what_became_of_it(standing, behind, valkey):
    """Oncegate-Status is on each of them, once, and on no other answer."""
    rows = [
        (OK, request(key="s"), b"executed"),
        (OK, request(key="s"), b"replayed"),
        (OK, request(key="s", body=b"other"), b"refused"),
        (OK, request(key=","), b"refused"),
        (OK, keyed(["a", "a"]), b"refused"),
        (OK, keyed(["a"], b"", "Content-Length: 99999999"), b"refused"),
        (OK, keyed(["a"], b"", "Expect: something"), b"refused"),
        (OK, keyed(["a"], b"", "Connection: Idempotency-Key"), b"refused"),
        (b"HTTP/1.1 429 Slow\r\nContent-Length: 0\r\n\r\n", request(key="t"), b"released"),
        (b"HTTP/1.1 502 Bad\r\nContent-Length: 0\r\n\r\n", request(key="u"), b"unknown"),
        (OK, request(key="u"), b"unknown"),
        (b"nonsense\r\n\r\n", request(key="v"), b"unknown"),
        (OK, request(key="v"), b"unknown"),
        (OK, request(key=None), None),
        (OK, request("GET", key="ignored"), None),
    ]
    for answer, raw, status in rows:
        behind.script = answering(answer)
        got = await ask(standing.port, raw)
        assert got.header("oncegate-status") == status, raw
