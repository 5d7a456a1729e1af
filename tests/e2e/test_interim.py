"""Something before the answer: interim responses of the API, 102 in silence, and comments between events.

Clients that did not ask for it see nothing of it: a pooled connection keeps giving each request its own answer.
"""

import asyncio
import http.client
import re
from pathlib import Path

import pytest

from tests.parts import CHUNKED, LAST_CHUNK, OK, RawClient, RawUpstream, Received, ask, chunk, request, until

BEAT_S = 0.2
RULES = f"""
[[rule]]
name = "beaten"
path = "/v1/**"
on_duplicate = "wait"
heartbeat_s = {BEAT_S}
heartbeat_agents = ["curl/*"]

[[rule]]
name = "passing"
path = "/passing/**"
pass_interim = true
"""
SSE = CHUNKED.replace(b"text/plain", b"text/event-stream")
ASKING = "Prefer: processing"
COMMENT = b":\n\n"
EARLY = (
    b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\nConnection: X-Hop\r\nX-Hop: 1\r\n"
    b"Content-Length: 5\r\nOncegate-Status: replayed\r\n\r\n"
)
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + EARLY


class Api:
    """An API that writes pieces and pauses, numbers in seconds; `{path}` stands for the path of the request.

    `for_path` has other pieces for some paths.
    """

    def __init__(self) -> None:
        self.pieces: list[bytes | float] = [OK]
        self.for_path: dict[bytes, list[bytes | float]] = {}

    async def script(
        self, _: RawUpstream, __: asyncio.StreamReader, writer: asyncio.StreamWriter, received: Received
    ) -> None:
        path = received.line.split(b" ")[1]
        for piece in self.for_path.get(path, self.pieces):
            if isinstance(piece, bytes):
                writer.write(piece.replace(b"{path}", path.ljust(16)))
            else:
                await asyncio.sleep(piece)


def once(body: bytes) -> bytes:
    """Return a stream with one comment for each silence: a busy machine makes some of them longer."""
    return re.sub(rb"(:\r?\n\r?\n)\1+", rb"\1", body)


OWN = b"HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n{path}"


@pytest.fixture
def api(upstream) -> Api:
    api = Api()
    upstream.script = api.script
    return api


@pytest.fixture
def gate(proxies, upstream, api, valkey, tmp_path: Path):
    (tmp_path / "rules.toml").write_text(RULES)
    return proxies(upstream, valkey.url, RULES_FILE="rules.toml")


async def raw(port: int, message: bytes, until_: bytes = b"") -> bytes:
    """Return the bytes of an answer whose connection closes, or those up to `until_`."""
    client = await RawClient.open(port)
    client.writer.write(message)
    async with asyncio.timeout(10):
        found = await (client.reader.readuntil(until_) if until_ else client.reader.read())
    client.close()
    return found


async def test_signs_of_life_before_the_answer(gate, upstream, api):
    """A client that asks, or that the rule names, gets four 102 at most while the API is silent, with or without a key.
    All others, and HTTP/1.0, get none. They are counted."""
    before = gate.metric('heartbeats_total{kind="interim"}')
    api.pieces = [9 * BEAT_S, OK]
    asked = {
        "asks": (request("POST", "/v1/a", "a", b"1", ASKING), 4),
        "asks for more": (request("POST", "/v1/a", "b", b"1", 'Prefer: wait=1, Processing; x="1"'), 4),
        "is named": (request("POST", "/v1/a", "c", b"1", "User-Agent: curl/8.4.0"), 4),
        "without a key": (request("POST", "/v1/a", None, b"1", ASKING), 4),
        "does not ask": (request("POST", "/v1/a", "d", b"1", "User-Agent: python-requests/2.32"), 0),
        "another rule": (request("POST", "/other", "f", b"1", ASKING), 0),
    }  # fmt: skip
    answers = await asyncio.gather(*[ask(gate.port, message) for message, _ in asked.values()])
    for (name, (_, count)), answer in zip(asked.items(), answers, strict=True):
        assert answer.interim == [102] * count, name
        assert (answer.status, answer.body) == (200, b"ok"), name
    old = await raw(gate.port, request("POST", "/v1/a", "g", b"1", ASKING).replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert old.startswith(b"HTTP/1.1 200 OK\r\n")
    assert gate.metric('heartbeats_total{kind="interim"}') - before == sum(count for _, count in asked.values())
    assert len(upstream.received) == len(asked) + 1
    assert b"prefer" in upstream.received[0].head.lower()


async def test_signs_of_life_for_a_duplicate_that_waits(gate, upstream, api):
    """A duplicate that asks gets them while it waits, also on a connection that repeats its head; the replay of a
    stored answer has none."""
    api.pieces = [5 * BEAT_S, OK]
    client = await RawClient.open(gate.port)
    await client.ask(request("POST", "/v1/a", "first", b"1", ASKING))
    first = asyncio.ensure_future(ask(gate.port, request("POST", "/v1/a", "one", b"1")))
    await until(lambda: len(upstream.received) == 2)
    duplicate = await client.ask(request("POST", "/v1/a", "one", b"1", ASKING))
    assert (set(duplicate.interim), duplicate.header("oncegate-status")) == ({102}, b"replayed")
    replay = await client.ask(request("POST", "/v1/a", "one", b"1", ASKING))
    assert (replay.interim, replay.header("oncegate-status")) == ([], b"replayed")
    assert (await first).interim == []
    client.close()


async def test_none_before_the_request_is_whole(gate, upstream, api):
    """A client that is still sending gets none: it may not look for anything yet."""
    client = await RawClient.open(gate.port)
    client.writer.write(request("POST", "/v1/a", None, b"", ASKING, "Content-Length: 3"))
    await until(lambda: upstream.received)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.reader.read(1), 3 * BEAT_S)
    client.writer.write(b"abc")
    assert (await client.ask(b"")).interim == []
    client.close()


@pytest.mark.fault(38)
async def test_no_pooled_client_is_shifted(gate, api):
    """Python's http.client takes an interim response for the answer. It gets none, so each request on its connection
    gets its own answer: with heartbeats, and with an API that sends interim responses itself."""
    api.pieces = [INTERIM, 2.5 * BEAT_S, OWN]

    def four() -> list[bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", gate.port)
        found = []
        for path in ("/v1/a", "/v1/b", "/other/a", "/other/b"):
            connection.request("POST", path, b"1", {"Idempotency-Key": path})
            found.append(connection.getresponse().read().strip())
        connection.close()
        return found

    assert await asyncio.to_thread(four) == [b"/v1/a", b"/v1/b", b"/other/a", b"/other/b"]


@pytest.mark.fault(38)
@pytest.mark.parametrize("key", ["passed", None])
async def test_interim_responses_are_passed_on_where_a_rule_says_so(gate, api, key):
    """All but 100, as they come, without the fields that end here; also those that come with the head. HTTP/1.0 gets
    none. None is stored."""
    early = b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n"
    for pause_s in (0.1, 0.0):
        api.pieces = [INTERIM, pause_s, OK]
        message = request("POST", "/passing/a", key and f"{key}{pause_s}", b"1", "Connection: close")
        found = await raw(gate.port, message)
        assert found.startswith(b"HTTP/1.1 102 Processing\r\n\r\n" + early + b"HTTP/1.1 200 OK\r\n"), found
    if key:
        replay = await raw(gate.port, message)
        assert replay.startswith(b"HTTP/1.1 200 OK\r\n")
    old = request("POST", "/passing/a", key and "old", b"1").replace(b"HTTP/1.1", b"HTTP/1.0")
    assert (await raw(gate.port, old)).startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize("key", ["stream", None])
async def test_comments_between_events(gate, upstream, api, key):
    """Once the head is out, comments stand between events wherever the stream is silent, never in an event, and the
    replay has none of them."""
    # Long enough for a machine that is busy: one comment or several in each silence.
    before, pause_s = gate.metric('heartbeats_total{kind="comment"}'), 3 * BEAT_S
    api.pieces = [
        SSE, pause_s, chunk(b"\xef\xbb\xbfid: 1\ndata: a\n"), pause_s, chunk(b"data: b\n\n"), pause_s,
        chunk(b"data: c\r\n\r\n"), pause_s, chunk(b"data: d\r"), pause_s, chunk(b"\n\r\n"), LAST_CHUNK,
    ]  # fmt: skip
    answer = await ask(gate.port, request("POST", "/v1/a", key, b"1"))
    assert once(answer.body) == b"".join(
        [COMMENT, b"id: 1\ndata: a\ndata: b\n\n", COMMENT, b"data: c\r\n\r\n", b":\r\n\r\n", b"data: d\r\n\r\n"]
    )
    assert answer.complete
    comments = sum(line in (b":", b":\r") for line in answer.body.split(b"\n"))
    assert gate.metric('heartbeats_total{kind="comment"}') - before == comments
    if key:
        replay = await ask(gate.port, request("POST", "/v1/a", key, b"1"))
        assert replay.body == b"\xef\xbb\xbfid: 1\ndata: a\ndata: b\n\ndata: c\r\n\r\ndata: d\r\n\r\n"
        assert len(upstream.received) == 1


async def test_where_no_comment_stands(gate, api):
    """Not in a body of a stated length, coded, digested, not to be transformed, or of another kind or status."""
    heads = {
        "stated": b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 11\r\n\r\n",
        "coded": SSE.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n"),
        "digested": SSE.replace(b"\r\n\r\n", b"\r\nContent-Digest: sha-256=:x:\r\n\r\n"),
        "not transformed": SSE.replace(b"\r\n\r\n", b"\r\nCache-Control: no-cache, no-transform\r\n\r\n"),
        "another kind": CHUNKED,
        "another status": SSE.replace(b"200 OK", b"206 Partial Content"),
    }

    for name, head in heads.items():
        is_chunked = name != "stated"
        first, last = (chunk(b"data: 1\n\n"), chunk(b"\n\n")) if is_chunked else (b"data: 1\n\n", b"\n\n")
        path = b"/v1/" + name.replace(" ", "-").encode()
        api.for_path[path] = [head, first, 2.5 * BEAT_S, last, LAST_CHUNK if is_chunked else b""]
    paths = [path.decode() for path in api.for_path]
    answers = await asyncio.gather(*[ask(gate.port, request("POST", path, path, b"1")) for path in paths])
    assert {name: answer.body for name, answer in zip(heads, answers, strict=True)} == dict.fromkeys(
        heads, b"data: 1\n\n\n\n"
    )


async def test_a_stream_that_breaks_off_in_silence(gate, api):
    """Comments do not make a broken stream look whole, and end with it."""
    api.pieces = [SSE, chunk(b"data: 1\n\n"), 3 * BEAT_S, b"x"]
    answer = await ask(gate.port, request("POST", "/v1/a", "broken", b"1"))
    assert (once(answer.body), answer.complete) == (b"data: 1\n\n" + COMMENT, False)
    await until(lambda: [one["outcome"] for one in gate.events("request")] == ["truncated"])
