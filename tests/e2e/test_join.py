"""A duplicate that joins its running original: every byte once, an end only if it was one, and nothing at its cost."""

import asyncio

import pytest

from tests.parts import CHUNKED, LAST_CHUNK, Answer, RawClient, Tap, ask, chunk, read_answer, request, until

SSE = CHUNKED.replace(b"text/plain", b"text/event-stream")
EVENTS = [b"event: step\nid: %02d\ndata: one of many\n\n" % number for number in range(20)]
BODY = b"".join(EVENTS)


async def begun(port: int, raw: bytes) -> RawClient:
    """Send a request, and return its client."""
    client = await RawClient.open(port)
    client.writer.write(raw)
    return client


async def answered(client: RawClient) -> Answer:
    """Return the answer of a client that has asked."""
    async with asyncio.timeout(20):
        answer = await read_answer(client.reader)
    assert answer is not None
    client.close()
    return answer


async def head_of(client: RawClient) -> bytes:
    """Wait for the head of a client's answer, and leave it where it is."""
    async with asyncio.timeout(20):
        head = await client.reader.readuntil(b"\r\n\r\n")
    client.reader._buffer[:0] = head
    return head


@pytest.mark.parametrize("place", ["same worker", "other replica"])
async def test_a_duplicate_gets_every_byte_so_far_and_the_rest_as_it_comes(proxies, upstream, stored, place):
    """Whenever it joins, it gets the original's head and bytes, each before the next is sent, and its end."""
    tap = Tap()
    upstream.script = tap.script
    proxy = proxies(upstream, stored.url, ON_DUPLICATE="join")
    other = proxy if place == "same worker" else proxies(upstream, stored.url, ON_DUPLICATE="join")
    first = await begun(proxy.port, request())
    await until(lambda: upstream.received)
    readers = [await begun(other.port, request())]
    tap.send(SSE)
    for event in EVENTS:
        tap.send(chunk(event))
        readers.append(await begun(other.port, request()))
        await asyncio.gather(*map(head_of, readers))
    tap.end(LAST_CHUNK)
    answers = await asyncio.gather(*map(answered, readers))
    original = await answered(first)
    assert len(upstream.received) == 1
    assert {(one.status, one.body, one.complete) for one in (original, *answers)} == {(200, BODY, True)}
    assert {one.header("oncegate-status") for one in answers} == {b"joined"}
    assert {one.header("content-type") for one in answers} == {b"text/event-stream"}
    assert (await ask(other.port, request())).header("oncegate-status") == b"replayed"
    assert other.metric('duplicates_suppressed_total{outcome="joined"}') == len(answers)
    assert other.metric("followers") == 0
