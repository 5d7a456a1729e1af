"""JSON-RPC at work: who gets which id, what becomes of a key, and how oncegate's own answers read."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.parts import (
    CHUNKED,
    LAST_CHUNK,
    Answer,
    Proxy,
    RawClient,
    RawUpstream,
    Received,
    Script,
    Tap,
    answering,
    ask,
    chunk,
    request,
    standing_upstream,
    until,
)
from tests.zygote import Zygote, standing_proxy

RULES = """
[[rule]]
name = "tools"
path = "/mcp"
preset = "mcp"
wait_max_s = 20

[[rule]]
name = "agents"
path = "/a2a"
preset = "a2a"

[[rule]]
name = "equal calls"
path = "/derived"
preset = "mcp"
key = [["body:/params/_meta/idempotencyKey"], ["derived:60"]]

[[rule]]
name = "strict"
path = "/strict"
preset = "json-rpc"
guard = "required"
on_bad_key = "refuse"
"""
ACCEPTED = b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n"
SSE = CHUNKED.replace(b"text/plain", b"text/event-stream")


@pytest.fixture(scope="module")
def ruled(zygote: Zygote, shared_valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """One proxy with those rules for all tests of this file."""
    folder = tmp_path_factory.mktemp("ruled")
    with standing_proxy(zygote, shared_valkey.url, folder, {"CONNECT_RETRIES": 0}, rules=RULES) as proxy:
        yield proxy


@pytest.fixture
async def behind(ruled: Proxy, valkey) -> AsyncIterator[RawUpstream]:
    async with standing_upstream(ruled) as server:
        yield server


def call(key: str | None, own_id: object = 1, *, path: str = "/mcp", tool: str = "pay", **more: Any) -> bytes:
    """Return a call of a tool."""
    meta = {**({"idempotencyKey": key} if key else {}), "progressToken": own_id}
    params = {"name": tool, "arguments": more.pop("arguments", {"amount": 1}), "_meta": meta, **more}
    message = {"jsonrpc": "2.0", "id": own_id, "method": "tools/call", "params": params}
    return post(path, message)


def post(path: str, message: object, *extra: str) -> bytes:
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    return request("POST", path, None, body, "Content-Type: application/json", *extra)


def saying(message: object, status: bytes = b"200 OK", *fields: bytes) -> bytes:
    """Return a response with a JSON body."""
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    head = b"".join(b"%s\r\n" % field for field in (b"Content-Type: application/json", *fields))
    return b"HTTP/1.1 %s\r\n%sContent-Length: %d\r\n\r\n%s" % (status, head, len(body), body)


def result(own_id: object, **more: object) -> dict[str, object]:
    return {"jsonrpc": "2.0", "id": own_id, "result": {"content": [], **more}}


def error(own_id: object, code: int) -> dict[str, object]:
    return {"jsonrpc": "2.0", "id": own_id, "error": {"code": code, "message": "no"}}


def counting() -> Script:
    """Return a script that answers each call with its number and the id that it came with."""
    calls = 0

    async def script(_: RawUpstream, __: object, writer: asyncio.StreamWriter, got: Received) -> None:
        nonlocal calls
        calls += 1
        writer.write(saying(result(json.loads(got.body)["id"], number=calls)))
        await writer.drain()

    return script


def told(answer: Answer) -> tuple[object, object, str]:
    message = json.loads(answer.body)
    return message["id"], message["result"]["number"], (answer.header("oncegate-status") or b"").decode()


async def test_a_call_runs_once_and_everybody_gets_it_under_their_own_id(ruled, behind):
    """A call that is issued again, with another id, gets the first one's result under that id. Others run."""
    behind.script = counting()
    assert told(await ask(ruled.port, call("once", 1))) == (1, 1, "executed")
    replayed = await ask(ruled.port, call("once", "second-é"))
    assert told(replayed) == ("second-é", 1, "replayed")
    assert int(replayed.header("content-length") or 0) == len(replayed.body)
    assert told(await ask(ruled.port, call("once", 1.5))) == (1.5, 1, "replayed")
    assert told(await ask(ruled.port, call("other", 1))) == (1, 2, "executed")
    changed = await ask(ruled.port, call("once", 9, arguments={"amount": 2}))
    assert json.loads(changed.body)["error"]["data"]["error"]["code"] == "key_reused"
    # A coded response could not be read.
    assert behind.received[0].header("accept-encoding") == [b"identity"]


async def test_what_is_no_guarded_call_passes(ruled, behind):
    """Other methods, notifications, answers to the server's requests, streams and calls without a key pass through."""
    behind.script = answering(saying(result(1)))
    messages: list[object] = [
        {"jsonrpc": "2.0", "id": 1, "method": "tools/list"},
        {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}},
        {"jsonrpc": "2.0", "id": 1, "result": {"action": "accept"}},
        [{"jsonrpc": "2.0", "id": 1, "method": "ping"}],
        b"no JSON",
    ]
    for message in messages * 2:
        answer = await ask(ruled.port, post("/mcp", message))
        assert (answer.status, answer.header("oncegate-status")) == (200, None)
    for _ in range(2):
        answer = await ask(ruled.port, call(None))
        assert (answer.status, answer.header("oncegate-status")) == (200, b"unguarded")
    batch = await ask(ruled.port, post("/mcp", [json.loads(call("in-a-batch").partition(b"\r\n\r\n")[2])]))
    assert batch.header("oncegate-status") == b"unguarded"
    # Not as if the store were down.
    reasons = ("key_missing", "key_invalid", "store_unavailable")
    assert [ruled.metric(f'unguarded_total{{reason="{reason}"}}') for reason in reasons] == [2, 1, 0]
    stream = await ask(ruled.port, request("GET", "/mcp", None, b"", "Accept: text/event-stream"))
    assert stream.status == 200
    assert len(behind.received) == 14


async def test_equal_calls_without_a_key(ruled, behind):
    """Under a derived key, method, tool and arguments make the key: not the id, and not the progress token."""
    behind.script = counting()
    assert told(await ask(ruled.port, call(None, 1, path="/derived"))) == (1, 1, "executed")
    assert told(await ask(ruled.port, call(None, 2, path="/derived"))) == (2, 1, "replayed")
    assert told(await ask(ruled.port, call(None, 2, path="/derived", arguments={}))) == (2, 2, "executed")
    assert told(await ask(ruled.port, call(None, 2, path="/derived", tool="refund"))) == (2, 3, "executed")


async def test_messages_of_a2a(ruled, behind):
    """The id of an A2A message is the key, under the old and the new names of the methods; the task's methods pass."""
    behind.script = counting()
    for method, expected in (("message/send", "executed"), ("message/send", "replayed"), ("SendMessage", "executed")):
        params = {"message": {"messageId": method, "parts": [{"text": "pay"}]}}
        message = {"jsonrpc": "2.0", "id": expected, "method": method, "params": params}
        assert told(await ask(ruled.port, post("/a2a", message)))[::2] == (expected, expected)
    for _ in range(2):
        message = {"jsonrpc": "2.0", "id": 1, "method": "tasks/get", "params": {"message": {"messageId": "x"}}}
        assert told(await ask(ruled.port, post("/a2a", message)))[2] == ""


REFUSED = {
    "no key": (b'{"id":7,"method":"a"}', "key_missing"),
    "bad id": (b'{"id":null,"method":"a"}', "id of the JSON-RPC request is no string"),
    "batch": (b'[{"id":7,"method":"a"}]', "JSON-RPC batch"),
    "notification": (b'{"method":"a"}', "notification"),
    "no JSON": (b"{", "not JSON"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_what_a_strict_rule_refuses(ruled, behind, case):
    """A rule that refuses says why: as a JSON-RPC error to whoever has an id, as a problem to all others."""
    body, expected = REFUSED[case]
    answer = await ask(ruled.port, request("POST", "/strict", "k" if case != "no key" else None, body))
    if case == "no key":
        # The head alone says it, before the body is read.
        assert answer.slug == "key-missing"
    else:
        assert answer.slug in ("key-invalid", "key-missing")
        assert expected in answer.problem["detail"]
    assert behind.received == []


# What becomes of the key ...

FREES, STORED, UNKNOWN = b"released", b"executed", b"unknown"
ENDINGS: dict[str, tuple[bytes, bytes]] = {
    "a result": (saying(result(1)), STORED),
    "a tool that failed": (saying(result(1, isError=True)), STORED),
    "parse error": (saying(error(None, -32700), b"400 Bad Request"), FREES),
    "invalid request": (saying(error(1, -32600), b"400 Bad Request"), FREES),
    "no method": (saying(error(1, -32601), b"404 Not Found"), FREES),
    # Also of a tool that ran.
    "bad parameters": (saying(error(1, -32602)), UNKNOWN),
    "a code that is none": (saying(error(1, [-32601])), UNKNOWN),  # type: ignore[arg-type]
    "headers contradict the body": (saying(error(1, -32020), b"400 Bad Request"), FREES),
    "no session": (saying(error(1, -32001), b"404 Not Found"), FREES),
    "input required": (saying(result(1, resultType="input_required")), FREES),
    "401": (saying(b"", b"401 Unauthorized"), FREES),
    "internal error": (saying(error(1, -32603), b"500 Internal Server Error"), UNKNOWN),
    "cancelled": (saying(error(1, 0)), UNKNOWN),
    "timeout": (saying(error(1, -32001)), UNKNOWN),
    "another id": (saying(result(2)), UNKNOWN),
    "no message": (saying(b"{}"), UNKNOWN),
    "accepted": (b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n", UNKNOWN),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", UNKNOWN),
    "an error page": (b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno", UNKNOWN),
    "coded": (saying(gzip.compress(json.dumps(result(1)).encode()), b"200 OK", b"Content-Encoding: gzip"), UNKNOWN),
    "over 1 MiB": (saying(result(1, x="a" * 1_048_576)), UNKNOWN),
    "over 64 KiB, input required": (saying(result(1, x="a" * 100_000, resultType="input_required")), FREES),
}


@pytest.mark.parametrize("case", ENDINGS)
async def test_what_becomes_of_a_key(ruled, behind, case):
    """A result is stored; what proves that nothing ran frees the key; of all else the outcome is unknown."""
    raw, expected = ENDINGS[case]
    behind.script = answering(raw)
    first = await ask(ruled.port, call(case, 1))
    assert first.complete
    # The head of a long response leaves before its message is read.
    assert first.header("oncegate-status") == (expected if len(raw) < 65_000 else None)
    behind.script = counting()
    again = await ask(ruled.port, call(case, 2))
    assert json.loads(again.body)["id"] == 2
    if expected == UNKNOWN:
        assert len(behind.received) == 1
        assert json.loads(again.body)["error"]["data"]["error"]["code"] == "outcome_unknown"
    else:
        assert again.header("oncegate-status") == (b"executed" if expected == FREES else b"replayed")


STREAMS: dict[str, tuple[list[bytes], bytes]] = {
    "a result": ([b": ping\n\n", b'data: {"id":1,"result":{"number":5}}\n\n'], STORED),
    "two results": ([b'data: {"id":1,"result":{"number":5}}\n\n'] * 2, STORED),
    "an error": ([b'data: {"id":1,"error":{"code":-32000}}\n\n'], UNKNOWN),
    "no method": ([b'data: {"id":1,"error":{"code":-32601}}\n\n'], FREES),
    "bad parameters": ([b'data: {"id":1,"error":{"code":-32602}}\n\n'], UNKNOWN),
    "a code that is none": ([b'data: {"id":1,"error":{"code":{"a":[1]}}}\n\n'], UNKNOWN),
    "input required": ([b'data: {"id":1,"result":{"resultType":"input_required"}}\n\n'], FREES),
    "no final message": ([b"id: 1\ndata:\n\n", b'data: {"method":"notifications/message"}\n\n'], UNKNOWN),
}


@pytest.mark.parametrize("case", STREAMS)
async def test_what_becomes_of_a_key_after_a_stream(ruled, behind, case):
    """The final message of a stream decides, though the stream has passed by then."""
    events, expected = STREAMS[case]
    behind.script = answering(SSE + b"".join(map(chunk, events)) + LAST_CHUNK)
    first = await ask(ruled.port, call(f"stream {case}", 1))
    assert (first.complete, first.body, first.header("oncegate-status")) == (True, b"".join(events), None)
    behind.script = counting()
    again = await ask(ruled.port, call(f"stream {case}", 2))
    if expected == UNKNOWN:
        assert json.loads(again.body)["error"]["data"]["error"]["code"] == "outcome_unknown"
    elif expected == FREES:
        assert again.header("oncegate-status") == b"executed"
    else:
        assert again.body == b"".join(events).replace(b'"id":1', b'"id":2')


async def test_a_stream_is_replayed_to_who_waits(ruled, behind):
    """A duplicate that waits gets the stream under its own id: progress to its own token, the server's requests too."""
    tap = Tap()
    behind.script = tap.script
    first = asyncio.ensure_future(ask(ruled.port, call("waits", 1)))
    await until(lambda: behind.received)
    second = asyncio.ensure_future(ask(ruled.port, call("waits", 2)))
    third = post(
        "/mcp", json.loads(call("waits", 3).partition(b"\r\n\r\n")[2].replace(b'"progressToken": 3', b'"a": 1'))
    )
    third_answer = asyncio.ensure_future(ask(ruled.port, third))
    progress = b'data: {"method":"notifications/progress","params":{"progressToken":1,"progress":1}}\r\n\r\n'
    asks = b'data: {"id":1,"method":"sampling/createMessage","params":{}}\r\n\r\n'
    final = b'event: message\r\ndata: {"jsonrpc":"2.0",\r\ndata:  "id":1,"result":{}}\r\n\r\n'
    # Over what is stored in one piece.
    rest = b": " + b"x" * 300_000 + b"\r\n\r\n"
    tap.send(SSE.replace(b"Transfer", b"Mcp-Session-Id: s1\r\nTransfer"), chunk(progress), chunk(asks))
    await asyncio.sleep(0.1)
    tap.end(chunk(rest), chunk(final[:40]), chunk(final[40:]), LAST_CHUNK)
    assert (await first).body == progress + asks + rest + final
    answer = await second
    mine = final.replace(b'"id":1', b'"id":2')
    assert answer.body == progress.replace(b'Token":1', b'Token":2') + asks + rest + mine
    assert answer.complete
    # The session of the first request is not that of whoever waits.
    assert answer.header("mcp-session-id") is None
    assert (await third_answer).body == asks + rest + final.replace(b'"id":1', b'"id":3')
    assert len(behind.received) == 1


async def test_own_answers_are_json_rpc_errors(ruled, behind):
    """What oncegate itself says reads as a JSON-RPC error under the caller's id, with the problem as its data."""

    async def breaking(_: RawUpstream, __: object, writer: asyncio.StreamWriter, ___: Received) -> None:
        writer.close()

    behind.script = breaking
    for own_id in (1, "two"):
        answer = await ask(ruled.port, call("lost", own_id))
        message = json.loads(answer.body)
        assert (answer.status, answer.header("content-type"), message["id"]) == (200, b"application/json", own_id)
        assert message["error"]["code"] == -32010
        assert message["error"]["data"]["status"] == (502 if own_id == 1 else 409)
    # Also where it is not guarded.
    answer = await ask(ruled.port, call(None, 3))
    assert json.loads(answer.body)["error"]["data"]["error"]["code"] == "upstream_lost"
    assert len(behind.received) == 2


TAKEN_BACK = {"method": "notifications/cancelled", "params": {"requestId": 1}}


async def test_a_call_that_its_client_takes_back(ruled, behind):
    """Some servers never answer a call that was cancelled. Its key is unknown then, and nobody waits for it."""
    tap, session = Tap(), b"Content-Type: application/json\r\nMcp-Session-Id: s"

    async def script(
        upstream: RawUpstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, got: Received
    ) -> None:
        is_call = b"tools/call" in got.body
        await (tap.script if is_call else answering(ACCEPTED))(upstream, reader, writer, got)

    behind.script = script
    begun = [
        asyncio.ensure_future(
            ask(ruled.port, call(key, own_id).replace(b"Content-Type: application/json", session + one))
        )
        for key, own_id, one in (("taken-back", 1, b"1"), ("another id", 2, b"1"), ("another session", 1, b"2"))
    ]
    await until(lambda: len(behind.received) == 3)
    # The first is another tenant's, who knows the session.
    for one in (b"2\r\nAuthorization: Bearer b", b"1", b"3"):
        answer = await ask(
            ruled.port, post("/mcp", TAKEN_BACK).replace(b"Content-Type: application/json", session + one)
        )
        assert answer.status == 202
    again = await ask(ruled.port, call("taken-back", 3))
    assert json.loads(again.body)["error"]["data"]["reason"] == "cancelled"
    assert json.loads((await begun[0]).body)["error"]["data"]["error"]["code"] == "outcome_unknown"
    assert not begun[1].done()
    assert not begun[2].done()
    for one in begun[1:]:
        one.cancel()


async def test_a_client_that_leaves(ruled, behind):
    """A call without a key ends at once when its client leaves, half-closed or gone. A call with one goes on."""
    for key, leave in (("comes-back", RawClient.close), (None, RawClient.close), (None, RawClient.reset)):
        tap, ended = Tap(), asyncio.Event()

        async def script(
            upstream: RawUpstream,
            reader: asyncio.StreamReader,
            writer: asyncio.StreamWriter,
            got: Received,
            tap: Tap = tap,
            ended: asyncio.Event = ended,
        ) -> None:
            answering_it = asyncio.ensure_future(tap.script(upstream, reader, writer, got))
            await reader.read(1)  # the end of the connection: there is no second request
            ended.set()
            answering_it.cancel()

        behind.script = script
        client = await RawClient.open(ruled.port)
        client.writer.write(call(key, 1))
        tap.send(SSE, chunk(b": ping\n\n"))
        assert await client.reader.readuntil(b"ping")
        leave(client)
        if key is None:
            await asyncio.wait_for(ended.wait(), 5)
            continue
        await asyncio.sleep(0.2)
        assert not ended.is_set()
        tap.end(chunk(b'data: {"id":1,"result":{"number":1}}\n\n'), LAST_CHUNK)
        answer = await ask(ruled.port, call(key, 2))
        assert b'"id":2,"result"' in answer.body
    assert len(behind.received) == 3
