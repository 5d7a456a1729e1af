"""Answers that come bit by bit: on their way at once, whole only when the store has them, the same again later."""

import asyncio

import pytest

from tests.parts import CHUNKED, LAST_CHUNK, OK, RawClient, Received, Tap, ask, chunk, read_answer, request, until

SSE = CHUNKED.replace(b"text/plain", b"text/event-stream")
UNTIL_CLOSED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
EVENTS = [b"event: step\nid: %02d\ndata: one of many\n\n" % n for n in range(20)]
SIZED = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % sum(map(len, EVENTS))


@pytest.mark.parametrize(
    ("head", "framed", "last"),
    [(SSE, chunk, LAST_CHUNK), (UNTIL_CLOSED, bytes, b""), (CHUNKED, chunk, LAST_CHUNK), (SIZED, bytes, b"")],
    ids=["event stream", "event stream until closed", "chunked", "sized"],
)
async def test_each_event_passes_before_the_next_is_sent(proxies, upstream, store_url, head, framed, last):
    """An event reaches the client before the upstream sends the next one, and the replay is the same stream."""
    seen: asyncio.Queue[None] = asyncio.Queue()

    async def script(_, __, writer: asyncio.StreamWriter, ___: Received) -> None:
        writer.write(head)
        for event in EVENTS:
            writer.write(framed(event))
            await seen.get()  # the client says, past the proxy, that it has this one
        writer.write(last)
        await writer.drain()
        if head == UNTIL_CLOSED:
            writer.write_eof()

    upstream.script = script
    proxy = proxies(upstream, store_url)
    client = await RawClient.open(proxy.port)
    client.writer.write(request())
    async with asyncio.timeout(30):
        passed = await client.reader.readuntil(b"\r\n\r\n")
        for number, event in enumerate(EVENTS):
            # The very last byte of a body whose length is known waits for the store, with it the acknowledgement.
            wanted = event[:-1] if head == SIZED and number == len(EVENTS) - 1 else event
            passed += await client.reader.readuntil(wanted)
            seen.put_nowait(None)
        if last:
            await client.reader.readuntil(LAST_CHUNK)
        else:
            assert await client.reader.read(1 if head == SIZED else -1) == (b"\n" if head == SIZED else b"")
    client.close()
    assert b"Oncegate-Status: executed\r\n" in passed
    replay = await ask(proxy.port, request())
    assert (replay.status, replay.complete) == (200, True)
    assert replay.header("oncegate-status") == b"replayed"
    assert replay.body == b"".join(EVENTS)
    assert replay.header("content-type") == (None if head == SIZED else head.partition(b"Type: ")[2].split(b"\r\n")[0])
    assert len(upstream.received) == 1
    assert proxy.metric("close_delimited_total") == (head == UNTIL_CLOSED)


async def test_a_dribble_is_kept_whole(proxies, upstream, store_url):
    """An answer that comes byte by byte, with pauses longer than a batch and a lease, is replayed whole."""
    text = b"slow but sure, it gets there in the end"

    async def script(_, __, writer: asyncio.StreamWriter, ___: Received) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text))
        for number in range(len(text)):
            writer.write(text[number : number + 1])
            await asyncio.sleep(0.3 if number % 20 == 0 else 0.01)

    upstream.script = script
    proxy = proxies(upstream, store_url, LEASE_MS=200)
    first = await ask(proxy.port, request())
    again = await ask(proxy.port, request())
    assert (first.body, first.complete, first.header("oncegate-status")) == (text, True, b"executed")
    assert (again.body, again.complete, again.header("oncegate-status")) == (text, True, b"replayed")
    assert len(upstream.received) == 1


BODY = b"q" * 90_000


@pytest.mark.parametrize(
    ("pieces", "visible", "end"),
    [
        ([b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY), BODY[:-5], BODY[-5:]], BODY[:-1], b"q"),
        ([CHUNKED, chunk(BODY[:-5]), chunk(BODY[-5:]) + LAST_CHUNK], BODY, LAST_CHUNK),
        ([UNTIL_CLOSED, BODY[:-5], BODY[-5:]], BODY, b""),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", b"", BODY[-5:]], None, b""),
    ],
    ids=["sized", "chunked", "until closed", "small"],
)
async def test_nothing_is_whole_before_it_is_stored(proxies, upstream, own_valkey, pieces, visible, end):
    """With the store stopped before the end, the client gets all but what would tell it that it has everything."""
    tap = Tap()

    async def script(us, reader, writer: asyncio.StreamWriter, received: Received) -> None:
        await tap.script(us, reader, writer, received)
        if pieces[0] == UNTIL_CLOSED:
            writer.write_eof()

    upstream.script = script
    proxy = proxies(upstream, own_valkey.url, LEASE_MS=300)
    client = await RawClient.open(proxy.port)
    client.writer.write(request())
    await until(lambda: upstream.received)
    if visible is not None:
        tap.send(*pieces[:2])
        await client.reader.readuntil(b"\r\n\r\n")
    own_valkey.pause()
    tap.end(*(pieces[2:] if visible is not None else pieces))
    shown = b""
    while visible is not None and shown.count(b"q") < len(visible):
        shown += await asyncio.wait_for(client.reader.read(65536), 20)
    assert not shown.endswith(LAST_CHUNK)
    rest = asyncio.ensure_future(client.reader.read(65536))
    await asyncio.wait([rest], timeout=0.5)
    assert not rest.done()
    own_valkey.resume()
    tail = await asyncio.wait_for(rest, 20)
    if visible is not None:
        # The end of the chunk before it may come in one piece with the last chunk.
        assert tail.endswith(end)
    else:
        assert tail.endswith(b"\r\n\r\nqqqqq")
    client.close()
    replay = await ask(proxy.port, request())
    assert (replay.header("oncegate-status"), replay.complete) == (b"replayed", True)
    assert replay.body == (BODY if visible is not None else b"qqqqq")
    assert len(upstream.received) == 1


async def test_a_stream_that_breaks_off_never_ends_cleanly(proxies, upstream, store_url):
    """An upstream that closes in mid-stream: the client's answer has no clean end, and the key is unknown."""
    table = {
        "chunked": [SSE, *map(chunk, EVENTS)],
        "sized": [b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", BODY],
    }
    proxy = proxies(upstream, store_url)
    for framing, pieces in table.items():
        tap = Tap()

        async def script(us, reader, writer: asyncio.StreamWriter, received: Received, tap: Tap = tap) -> None:
            await tap.script(us, reader, writer, received)
            writer.close()

        upstream.script = script
        client = await RawClient.open(proxy.port)
        client.writer.write(request(key=framing))
        tap.end(*pieces)
        answer = await read_answer(client.reader)
        client.close()
        assert answer is not None
        assert (answer.status, answer.complete) == (200, False), framing
        again = await ask(proxy.port, request(key=framing))
        assert (again.status, again.slug) == (409, "outcome-unknown"), framing
    assert len(upstream.received) == 2


async def test_a_small_answer_is_one_write(gate, upstream):
    """A small answer that comes at once is stored first and then sent whole, length and all."""
    tap = Tap()
    upstream.script = tap.script
    tap.end(CHUNKED, chunk(b"o"), chunk(b"k"), LAST_CHUNK)
    answer = await ask(gate.port, request())
    assert (answer.body, answer.header("content-length")) == (b"ok", b"2")
    assert answer.header("transfer-encoding") is None
    tap.end(OK)
    assert (await ask(gate.port, request())).header("content-length") == b"2"
