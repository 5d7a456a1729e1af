"""Rules that match by the body: what is read for them, what falls to the next rule, and what streams on."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.parts import (
    OK,
    Proxy,
    RawClient,
    RawUpstream,
    answering,
    ask,
    request,
    standing_upstream,
    until,
)
from tests.zygote import Zygote, standing_proxy

RULES = """
[[rule]]
name = "calls"
path = "/mcp"
when = { "body:/method" = "tools/call" }
guard = "required"
key = "header:Idempotency-Key"
max_request_bytes = 2_000_000

[[rule]]
name = "small"
path = "/mcp"
when = { "body:/method" = "small" }
max_request_bytes = 10
"""
CALL, PING = b'{"method":"tools/call"}', b'{"method":"ping"}'


def asked(body: bytes, key: str | None = None, *extra: str) -> bytes:
    return request("POST", "/mcp", key, body, *extra)


@pytest.fixture(scope="module")
def ruled(zygote: Zygote, shared_valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """One proxy with those rules for all tests of this file."""
    folder = tmp_path_factory.mktemp("ruled")
    with standing_proxy(zygote, shared_valkey.url, folder, {}, rules=RULES) as proxy:
        yield proxy


@pytest.fixture
async def behind(ruled: Proxy, valkey) -> AsyncIterator[RawUpstream]:
    async with standing_upstream(ruled) as server:
        yield server


async def test_the_body_chooses_the_rule(ruled, behind):
    """A body that meets the condition has the rule's policy; any other, encoded or broken ones too, has the next's."""
    assert (await ask(ruled.port, asked(CALL))).slug == "key-missing"
    for body, *extra in ((PING,), (b"",), (b"{",), (CALL, "Content-Encoding: gzip")):
        answer = await ask(ruled.port, asked(body, None, *extra))
        assert (answer.status, answer.header("oncegate-status")) == (200, None), body
    assert [one.body for one in behind.received] == [PING, b"", b"{", CALL]
    # A batch may not carry a call past its rule.
    assert (await ask(ruled.port, asked(b"[" + PING + b"," + CALL + b"]"))).slug == "key-missing"


async def test_one_head_two_bodies(ruled, behind):
    """A head that repeats decides nothing where the body does: the same connection and head, two rules."""
    behind.script = answering(OK)
    client = await RawClient.open(ruled.port)
    statuses = []
    for body in (CALL, PING.ljust(len(CALL)), CALL, PING.ljust(len(CALL))) * 3:
        answer = await client.ask(asked(body, "one-head"))
        assert answer is not None
        statuses.append((answer.status, answer.header("oncegate-status"), answer.header("idempotent-replayed")))
    client.close()
    first, passed, again, *_ = statuses
    assert first == (200, b"executed", None)
    assert again == (200, b"replayed", b"true")
    assert passed[0] == 422  # guarded by the default rule, under the same key
    assert len(behind.received) == 1
    assert set(statuses[2::2]) == {again}


async def test_a_long_body_streams_on(ruled, behind):
    """A body whose stated length is over 1 MiB is not held back for a rule; a chunked one is, up to the limit."""
    long = b'{"method":"tools/call","x":"' + b"a" * 1_048_576 + b'"}'
    client = await RawClient.open(ruled.port)
    raw = asked(long)
    client.writer.write(raw[: -len(long) // 2])
    await until(lambda: behind.connections == 1)  # before the body has ended
    answer = await client.ask(raw[-len(long) // 2 :])
    assert answer is not None
    assert answer.status == 200
    chunked = b"POST /mcp HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n"
    assert (await ask(ruled.port, chunked % (len(CALL), CALL))).slug == "key-missing"
    assert (await ask(ruled.port, chunked % (len(long), long))).status == 200  # spooled, and not looked into
    assert (await ask(ruled.port, chunked % (2_000_001, b" " * 2_000_001))).slug == "body-too-large"
    assert [len(one.body) for one in behind.received] == [len(long), len(long)]
    client.close()


async def test_the_limit_of_the_chosen_rule(ruled, behind):
    """The limit of the rule that the body chose holds, and a client that waits for a 100 (Continue) gets it."""
    answer = await ask(ruled.port, asked(b'{"method":"small"}', "k-small"))
    assert answer.slug == "body-too-large"
    client = await RawClient.open(ruled.port)
    raw = asked(CALL, "k-100", "Expect: 100-continue")
    client.writer.write(raw[: -len(CALL)])
    assert await asyncio.wait_for(client.reader.readuntil(b"\r\n\r\n"), 5) == b"HTTP/1.1 100 Continue\r\n\r\n"
    answer = await client.ask(raw[-len(CALL) :])
    assert answer is not None
    assert answer.status == 200
    client.close()
