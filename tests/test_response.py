"""Answers on a real connection: how their end is told, when it is withheld, and what a client that left costs."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress

import pytest

from oncegate.buffers.write_batcher import write_batcher
from oncegate.downstream.listener import Listener
from oncegate.downstream.minimum_rate import MinimumRate
from oncegate.downstream.request import Request
from oncegate.downstream.response import ResponseWriter
from oncegate.known_heads.requests import HeadCache
from oncegate.messages.framing import CLOSING as BY_CLOSING
from oncegate.messages.framing import COUNTED, STATED, Framing
from oncegate.messages.problems import problem
from tests.parts import RawClient, answers_in, ask, read_answer, request, rest, until

GET = request("GET", key=None, body=b"")
HEAD = request("HEAD", key=None, body=b"")
OLD = GET.replace(b"HTTP/1.1", b"HTTP/1.0")
KEPT = OLD.replace(b"Host", b"Connection: keep-alive\r\nHost")
CLOSING = GET.replace(b"Host", b"Connection: close\r\nHost")

Script = Callable[[ResponseWriter], Awaitable[None]]


@asynccontextmanager
async def answering(*scripts: Script, stall_s: float = 5) -> AsyncIterator[int]:
    """Serve the n-th request with the n-th script, the last one for all that follow; yield the port."""
    left = list(scripts)

    async def handler(asked: Request) -> None:
        await (left.pop(0) if len(left) > 1 else left[0])(asked.response)

    listener = Listener(
        handler,
        max_connections=100,
        minimum_rate=MinimumRate(stall_s, 1),
        observe=lambda _: None,
        head_cache=HeadCache(),
    )
    server = await asyncio.get_running_loop().create_server(listener, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await listener.shutdown(0.1)


def whole(block: bytes = b"", body: bytes = b"ok", framing: Framing = COUNTED) -> Script:
    async def script(client: ResponseWriter) -> None:
        client.send(200, b"OK", block, body, framing)

    return script


class Piecewise:
    """An answer in pieces, of which the test decides."""

    def __init__(self, length: int | None = None, *, stated: bool = False, eof: bool = False) -> None:
        self._length, self._stated, self._eof = length, stated, eof
        self.client: ResponseWriter | None = None
        self._over = asyncio.Event()

    async def __call__(self, client: ResponseWriter) -> None:
        block = b"Content-Length: %d\r\n" % (self._length or 0) if self._stated else b""
        framing = BY_CLOSING if self._eof else STATED if self._stated else COUNTED
        client.begin(200, b"OK", block, self._length, framing)
        self.client = client
        await self._over.wait()

    async def begun(self) -> ResponseWriter:
        await until(lambda: self.client)
        return self.client

    def over(self) -> None:
        self._over.set()


async def bytes_of(client: RawClient, raw: bytes) -> bytes:
    """Return all that comes until the connection ends."""
    client.writer.write(raw)
    async with asyncio.timeout(10):
        return await client.reader.read()


# Whole answers ...


WHOLE = [
    (CLOSING, whole(), b"Content-Length: 2\r\nConnection: close\r\n\r\nok"),
    (OLD, whole(), b"Content-Length: 2\r\nConnection: close\r\n\r\nok"),
    (CLOSING, whole(b"A: \xff\r\na: b\r\n"), b"A: \xff\r\na: b\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"),
    (CLOSING, whole(b"content-length: 2\r\n", framing=STATED), b"content-length: 2\r\nConnection: close\r\n\r\nok"),
    (CLOSING, whole(body=b"", framing=STATED), b"Connection: close\r\n\r\n"),
    (GET, whole(framing=BY_CLOSING), b"Connection: close\r\n\r\nok"),
    (KEPT, whole(framing=BY_CLOSING), b"Connection: close\r\n\r\nok"),
]


@pytest.mark.parametrize(("raw", "script", "wanted"), WHOLE)
async def test_a_whole_answer_is_written_as_it_is(raw, script, wanted):
    """Fields stay byte for byte; only the framing that is missing and Connection are added."""
    async with answering(script) as port:
        with closing(await RawClient.open(port)) as client:
            assert await bytes_of(client, raw) == b"HTTP/1.1 200 OK\r\n" + wanted


@pytest.mark.parametrize(
    ("raw", "connection"), [(GET, None), (KEPT, b"keep-alive"), (OLD, b"close"), (CLOSING, b"close")]
)
async def test_a_connection_is_kept_as_the_client_wants(raw, connection):
    """HTTP/1.1 goes on unless told to close, HTTP/1.0 ends unless told to go on; the answer says so."""
    async with answering(whole()) as port:
        with closing(await RawClient.open(port)) as client:
            for _ in range(3):
                answer = await client.ask(raw)
                assert (answer.header("connection"), answer.body) == (connection, b"ok")
                if connection == b"close":
                    assert await client.reader.read() == b""
                    break


async def test_a_problem_answers_head_without_a_body():
    """An answer of our own to HEAD has no body: the next answer on the connection would be read from it."""

    async def refuse(client: ResponseWriter) -> None:
        client.send_problem(problem("overloaded", "later"), b"Oncegate-Status: refused\r\n")

    async with answering(refuse) as port:
        with closing(await RawClient.open(port)) as client:
            for raw in (HEAD, GET, HEAD, HEAD, GET):
                answer = await client.ask(raw, head_only=raw is HEAD)
                assert (answer.status, answer.header("retry-after")) == (503, b"1")
                assert answer.header("content-type") == b"application/problem+json"
                assert bool(answer.body) == (raw is GET)


async def test_an_answer_may_end_the_connection():
    """With `close` an answer of our own is the last one on its connection."""

    async def refuse(client: ResponseWriter) -> None:
        client.send_problem(problem("overloaded", "later"), close=True)
        assert client.closes

    async with answering(refuse) as port:
        with closing(await RawClient.open(port)) as client:
            raw = await bytes_of(client, GET + GET)
            assert raw.count(b"HTTP/1.1 503") == raw.count(b"Connection: close") == 1


@pytest.mark.parametrize("asked", [True, False])
async def test_a_client_is_told_to_go_on_at_most_once(asked):
    """100 Continue goes only to a client that waits for it, and only once."""

    async def script(client: ResponseWriter) -> None:
        client.awaits_continue = asked
        client.send_continue()
        client.send_continue()
        client.send(200, b"OK", b"", b"ok", COUNTED)

    async with answering(script) as port:
        answer = await ask(port, GET)
        assert (answer.interim, answer.body, answer.header("connection")) == ([100] if asked else [], b"ok", None)


async def test_a_client_that_was_not_told_to_go_on_is_not_kept():
    """What it sends next may be the body or another request: the connection ends with the answer."""

    async def script(client: ResponseWriter) -> None:
        client.awaits_continue = True
        client.send_problem(problem("overloaded", "later"))

    async with answering(script) as port:
        with closing(await RawClient.open(port)) as client:
            assert b"Connection: close\r\n" in await bytes_of(client, GET)


# Answers in pieces ...

FRAMES = {
    "chunked": (GET, {}, b"Transfer-Encoding: chunked"),
    "length": (GET, {"length": 4}, b"Content-Length: 4"),
    "stated length": (GET, {"length": 4, "stated": True}, b"Content-Length: 4"),
    "eof": (GET, {"eof": True}, b"Connection: close"),
    "HTTP/1.0": (KEPT, {}, b"Connection: close"),
}


@pytest.mark.parametrize("frame", FRAMES)
async def test_the_end_of_an_answer_is_withheld(frame):
    """Whatever tells the client that the answer is whole comes with `end`, and everything else before it."""
    raw, options, told = FRAMES[frame]
    answer = Piecewise(**options)
    async with answering(answer) as port:
        with closing(await RawClient.open(port)) as client:
            client.writer.write(raw)
            ours = await answer.begun()
            head = await client.reader.readuntil(b"\r\n\r\n")
            assert head.count(told) == 1
            assert (b"Transfer-Encoding" in head) + (b"Content-Length" in head) <= 1
            ours.write(b"a")
            ours.write(b"bcd")
            early = {"chunked": b"1\r\na\r\n3\r\nbcd\r\n", "length": b"abc", "stated length": b"abc"}.get(
                frame, b"abcd"
            )
            assert await client.reader.readexactly(len(early)) == early
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.reader.read(1), 0.2)
            assert (ours.started, ours.finished) == (True, False)
            ours.end()
            answer.over()
            late = {"chunked": b"0\r\n\r\n", "length": b"d", "stated length": b"d"}.get(frame, b"")
            assert await client.reader.readexactly(len(late)) == late
            if late:
                client.writer.write(GET)  # and it goes on
                assert (await client.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK\r\n")
            else:
                assert await client.reader.read() == b""


@pytest.mark.parametrize("frame", FRAMES)
async def test_an_aborted_answer_never_looks_whole(frame):
    """What is cut off leaves chunks without their end, a length unfilled, and where FIN is the end, a reset."""
    raw, options, _ = FRAMES[frame]
    answer = Piecewise(**options)
    async with answering(answer) as port:
        with closing(await RawClient.open(port)) as client:
            client.writer.write(raw)
            ours = await answer.begun()
            ours.write(b"abcd")
            await client.reader.readuntil(b"abc")
            ours.abort()
            answer.over()
            if frame in ("eof", "HTTP/1.0"):
                with pytest.raises(ConnectionResetError):
                    await client.reader.read()
            else:
                assert await client.reader.read() in (b"", b"\r\n", b"d\r\n")
            assert ours.client_gone
            assert ours.closes or not ours.finished
            ours.write(b"to nobody")
            ours.end()


async def test_an_empty_answer_by_length_ends_at_once():
    """A length of zero needs no byte, and the connection goes on."""

    async def script(client: ResponseWriter) -> None:
        client.begin(200, b"OK", b"", 0, COUNTED)
        client.end()

    async with answering(script) as port:
        with closing(await RawClient.open(port)) as client:
            for _ in range(2):
                answer = await client.ask(GET)
                assert (answer.header("content-length"), answer.body, answer.complete) == (b"0", b"", True)


# Who takes it ...


async def test_a_client_that_takes_nothing_is_cut_off():
    """A client that stalls for `stall_s` is cut off; the writer goes on, to nobody."""
    states: list[tuple[bool, bool]] = []

    async def script(client: ResponseWriter) -> None:
        client.begin(200, b"OK", b"", None, COUNTED)
        for _ in range(64):
            client.write(bytes(1 << 20))
            while not await client.has_room():
                pass
        client.end()
        states.append((client.cut_off, client.client_gone))

    async with answering(script, stall_s=0.5) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)  # it reads no further
        with closing(writer):
            writer.write(GET)
            await until(lambda: states)
            assert states == [(True, True)]
            with suppress(ConnectionError):
                assert len(await reader.read()) < 64 << 20


async def test_a_slow_client_slows_the_writer_down():
    """A client that goes on taking gets everything, however much longer than `stall_s` that is in all."""
    most = 0

    async def script(client: ResponseWriter) -> None:
        nonlocal most
        client.begin(200, b"OK", b"", 32 << 20, COUNTED)
        for _ in range(128):
            client.write(bytes(256 << 10))
            transport = client._connection.transport
            most = max(most, transport.get_write_buffer_size() if transport else 0)
            while not await client.has_room():
                pass
        client.end()

    async with answering(script, stall_s=1) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=65536)
        with closing(writer):
            writer.write(GET)
            await reader.readuntil(b"\r\n\r\n")
            for _ in range(32):
                assert len(await reader.readexactly(1 << 20)) == 1 << 20
                await asyncio.sleep(0.05)
        assert most < 1 << 20


@pytest.mark.parametrize("leave", ["FIN", "RST"])
async def test_who_waits_for_a_client_to_leave_is_told(leave):
    """`leaving` is done when the connection is gone, at once where it is gone already; writing then is harmless."""
    gone: list[bool] = []

    async def script(client: ResponseWriter) -> None:
        gone.append(client.client_gone)
        await client.client_leaves()
        gone.append(client.client_gone)
        await client.client_leaves()
        client.send(200, b"OK", b"", b"late", COUNTED)
        assert await client.has_room()
        client.abort()

    async with answering(script, whole()) as port:
        with closing(await RawClient.open(port)) as client:
            client.writer.write(GET)
            await until(lambda: gone)
            if leave == "RST":
                client.reset()
            else:
                client.close()
        assert (await ask(port, GET)).body == b"ok"
        if leave == "RST":
            await until(lambda: gone == [False, True])
        else:
            assert gone == [False]  # a FIN alone says that it has asked all, not that it left


async def test_a_half_closed_client_gets_its_last_answer_as_the_last():
    """After a half-close the connection is kept for the answers that are due, and the last one says so."""
    go = asyncio.Event()

    async def script(client: ResponseWriter) -> None:
        await go.wait()
        client.send(200, b"OK", b"", b"ok", COUNTED)

    async with answering(script) as port:
        with closing(await RawClient.open(port)) as client:
            client.writer.write(GET + GET)
            client.writer.write_eof()
            await asyncio.sleep(0.05)
            go.set()
            first, second = await read_answer(client.reader), await read_answer(client.reader)
            assert (first.header("connection"), second.header("connection")) == (None, b"close")
            assert await client.reader.read() == b""


@pytest.mark.parametrize("last", [CLOSING, OLD])
async def test_what_waits_to_leave_stays_before_what_closes_the_connection(last):
    """An answer that leaves with others comes whole, and before the one behind it that is the last."""

    async def hold(client: ResponseWriter) -> None:
        write_batcher(asyncio.get_running_loop()).hold()
        client.send(200, b"OK", b"", b"first", COUNTED)

    async with answering(hold, hold, whole(body=b"last")) as port:
        client = await RawClient.open(port)
        told = await answers_in(await bytes_of(client, GET + GET + last))
        assert [answer.body for answer in told[:2]] == [b"first", b"first"]
        assert len(told) == 3
        client.close()


async def test_an_answer_that_waits_to_leave_is_not_lost_with_the_next_one():
    """Breaking off an answer leaves the one before it as it is."""

    async def hold(client: ResponseWriter) -> None:
        write_batcher(asyncio.get_running_loop()).hold()
        client.send(200, b"OK", b"", b"first", COUNTED)

    async def broken(client: ResponseWriter) -> None:
        client.begin(200, b"OK", b"", None, COUNTED)
        client.abort()

    async with answering(hold, broken) as port:
        client = await RawClient.open(port)
        assert b"first" in await bytes_of(client, GET + GET)
        client.close()


async def test_a_connection_that_retires_in_the_midst_of_an_answer_takes_one_more_request():
    """The answer under way did not say that it is the last: the next one does."""
    begun, over = asyncio.Event(), asyncio.Event()

    async def handler(asked: Request) -> None:
        client = asked.response
        if begun.is_set():
            client.send(200, b"OK", b"", b"last", COUNTED)
        else:
            client.begin(200, b"OK", b"", 2, COUNTED)
            client.write(b"ok")
            begun.set()
            await over.wait()
            client.end()

    listener = Listener(
        handler, max_connections=100, minimum_rate=MinimumRate(5, 1), observe=lambda _: None, head_cache=HeadCache()
    )
    server = await asyncio.get_running_loop().create_server(listener, "127.0.0.1", 0)
    client = await RawClient.open(server.sockets[0].getsockname()[1])
    first = asyncio.ensure_future(client.ask(GET))
    await begun.wait()
    listener.retire()
    over.set()
    answer = await first
    assert answer is not None
    assert (answer.body, answer.header("connection")) == (b"ok", None)
    last = await client.ask(GET)
    assert last is not None
    assert (last.body, last.header("connection")) == (b"last", b"close")
    client.close()
    server.close()
    await listener.shutdown(0.1)


async def test_only_a_connection_on_which_nothing_is_answered_is_closed_as_idle(monkeypatch):
    """Whether a request came on it before or not."""
    monkeypatch.setattr("oncegate.downstream.listener.KEEP_ALIVE_S", 0.0)
    monkeypatch.setattr("oncegate.downstream.listener.SWEEP_S", 0.01)
    begun, over = asyncio.Event(), asyncio.Event()

    async def handler(asked: Request) -> None:
        if asked.message.path == "/slow":
            begun.set()
            await over.wait()
        asked.response.send(200, b"OK", b"", b"ok", COUNTED)

    listener = Listener(
        handler, max_connections=100, minimum_rate=MinimumRate(5, 1), observe=lambda _: None, head_cache=HeadCache()
    )
    server = await asyncio.get_running_loop().create_server(listener, "127.0.0.1", 0)
    new, used, busy = [await RawClient.open(server.sockets[0].getsockname()[1]) for _ in range(3)]
    assert await used.ask(GET) is not None
    slow = asyncio.ensure_future(busy.ask(request("GET", "/slow", key=None, body=b"")))
    await begun.wait()
    sweeping = asyncio.ensure_future(listener.sweep())
    assert await rest(new) == await rest(used) == b""
    assert len(listener.connections) == 1
    over.set()
    assert await slow is not None
    assert await rest(busy) == b""
    assert listener.connections == []
    sweeping.cancel()
    for client in (new, used, busy):
        client.close()
    server.close()
    await listener.shutdown(0.1)


async def test_the_end_waits_for_the_response_under_way_and_cancels_what_hangs():
    """Of a request whose body does not come, the reader is woken first."""
    ends: list[str] = []

    async def handler(asked: Request) -> None:
        try:
            if asked.message.path == "/hangs":
                await asyncio.Event().wait()
            if asked.message.method == "POST":
                await asked.content.readany()
            await asyncio.sleep(0.01)
            asked.response.send(200, b"OK", b"", b"ok", COUNTED)
            ends.append("answered")
        except ConnectionError:
            ends.append("without its body")
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise

    listener = Listener(
        handler, max_connections=100, minimum_rate=MinimumRate(5, 1), observe=lambda _: None, head_cache=HeadCache()
    )
    server = await asyncio.get_running_loop().create_server(listener, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    idle, answered, bodiless, hanging = [await RawClient.open(port) for _ in range(4)]
    asking = asyncio.ensure_future(answered.ask(GET))
    bodiless.writer.write(b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n")
    hanging.writer.write(b"GET /hangs HTTP/1.1\r\nHost: a\r\n\r\n")
    while len(listener.connections) < 4 or not all(one._has_begun for one in listener.connections[1:]):
        await asyncio.sleep(0.001)
    server.close()
    await listener.shutdown(0.2)
    for _ in range(3):
        await asyncio.sleep(0)
    assert ends == ["answered", "without its body", "cancelled"]
    answer = await asking
    assert answer is not None
    assert answer.body == b"ok"
    for client in (idle, answered, bodiless, hanging):
        assert await rest(client) == b""
        client.close()


@pytest.mark.parametrize("how", [GET, KEPT])
async def test_a_client_gets_another_response_while_the_first_one_goes_to_nobody(how):
    """Whatever is written to the first goes nowhere, and nothing of it waits for a client. The connection serves on."""
    twins: list[Request] = []
    go_on = asyncio.Event()
    ended: list[str] = []

    async def finish(own: Request) -> None:
        client = own.response
        await go_on.wait()
        assert client.client_gone
        assert client.reader_has_left()
        client.send_continue()
        assert not client.send_interim(b"HTTP/1.1 102 Processing\r\n\r\n")
        client.begin(200, b"OK", b"", None, BY_CLOSING)
        client.comment_every(0.001)
        client.write(bytes(1 << 20))
        await client.wait_room()
        assert not client.has_backlog
        await client.client_leaves()
        client.end()
        client.abort()
        ended.append("the first")

    async def handler(asked: Request) -> None:
        twins.append(asked.twin())
        running.append(asyncio.ensure_future(finish(twins[-1])))
        asked.answer_anew()
        assert asked.response is not twins[-1].response
        asked.response.send(202, b"Accepted", b"", b"later", COUNTED)

    running: list[asyncio.Future[None]] = []
    listener = Listener(
        handler, max_connections=100, minimum_rate=MinimumRate(5, 1), observe=lambda _: None, head_cache=HeadCache()
    )
    server = await asyncio.get_running_loop().create_server(listener, "127.0.0.1", 0)
    client = await RawClient.open(server.sockets[0].getsockname()[1])
    for number in range(2):
        answer = await client.ask(how)
        assert answer is not None
        assert (answer.status, answer.body, answer.complete) == (202, b"later", True), number
    go_on.set()
    await asyncio.gather(*running)
    assert ended == ["the first"] * 2
    answer = await client.ask(how)
    assert answer is not None
    assert answer.body == b"later"
    client.close()
    server.close()
    await asyncio.gather(*running)
    await listener.shutdown(0.1)
