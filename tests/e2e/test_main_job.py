"""The main job: executed once, answered the same every time."""

import pytest

from tests.conftest import with_and_without_head_cache
from tests.parts import answering, ask, request

pytestmark = with_and_without_head_cache
CREATED = (
    b"HTTP/1.1 201 Very Created\r\nX-Two: 1\r\nx-two: 2\r\nETag: \"a\"\r\nSet-Cookie: s=1\r\n"
    b"Content-Type: application/json\r\nContent-Length: 7\r\n\r\n{\"a\":1}"
)  # fmt: skip


@pytest.fixture
async def gate(upstream, stored, proxies):
    """One proxy with default settings in front of `upstream`."""
    return proxies(upstream, stored.url)


async def test_a_retry_is_answered_from_the_store(gate, upstream):
    """The same key and request again: one execution, the same status, reason, fields and bytes."""
    upstream.script = answering(CREATED)
    first = await ask(gate.port, request())
    again = await ask(gate.port, request(key='"key-1"'))
    assert len(upstream.received) == 1
    assert (first.status, first.reason, first.body) == (again.status, again.reason, again.body)
    assert first.header("oncegate-status") == b"executed"
    assert again.header("oncegate-status") == b"replayed"
    assert again.header("idempotent-replayed") == b"true"
    assert again.header("set-cookie") is None
    assert [pair for pair in again.headers if pair[0].lower() == b"x-two"] == [(b"X-Two", b"1"), (b"x-two", b"2")]


@pytest.mark.fault(17)
async def test_another_request_under_the_same_key_is_a_mismatch(gate, upstream):
    """The same key with another body never executes and never replays: 422."""
    await ask(gate.port, request(body=b"1"))
    answer = await ask(gate.port, request(body=b"2"))
    assert (answer.status, answer.slug) == (422, "key-reused")
    assert len(upstream.received) == 1
