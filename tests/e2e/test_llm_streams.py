"""Streams of the SDKs of OpenAI and Anthropic: broken, continued elsewhere and joined, byte for byte, and paid once."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_llm import CALLS, KEY, STREAMED, paid
from tests.parts import Proxy, until

pytestmark = pytest.mark.xdist_group("llm")

RULES = """
[[rule]]
name = "anthropic"
path = "/anthropic/**"
preset = "anthropic"
resume = true
sse_ids = true
on_duplicate = "join"

[[rule]]
name = "openai"
path = "/v1/**"
preset = "openai"
resume = true
sse_ids = true
on_duplicate = "join"
"""


@pytest.fixture
def replicas(proxies, llmock_server, llmock, valkey, tmp_path: Path) -> list[Proxy]:
    (tmp_path / "rules.toml").write_text(RULES)
    return [proxies(llmock_server.url, valkey.url, RULES_FILE="rules.toml") for _ in range(2)]


def behind(event: bytes) -> dict[str, Any]:
    """Return the options of a call for what comes behind an event."""
    last_id = event.partition(b"id: ")[2].partition(b"\n")[0].decode()
    return {"extra_headers": KEY["extra_headers"] | {"Last-Event-ID": last_id}}


@pytest.mark.parametrize("name", STREAMED)
async def test_a_stream_is_joined_and_goes_on_elsewhere(replicas, llmock, name):
    """One reader stays, one joins at another replica, and one leaves there and goes on here.

    All have the same bytes, the SDK reads the rest as it reads the whole, and it is paid once.
    """
    call, (one, other) = CALLS[name], replicas
    llmock.pace(100)

    def read(gate: Proxy, *arguments: Any) -> tuple[bytes, str | None]:
        with call.client(gate.port) as client:
            return call.raw(client, *arguments)

    original = asyncio.create_task(asyncio.to_thread(read, one))
    await until(lambda: one.metric("in_flight") == 1)
    joined = asyncio.create_task(asyncio.to_thread(read, other))
    begun, _ = await asyncio.to_thread(read, other, KEY, 2)
    events = begun.split(b"\n\n")[:-1]
    first = b"".join(event + b"\n\n" for event in events)
    rest, said = await asyncio.to_thread(read, one, behind(events[-1]))
    assert said == "resumed"
    assert await original == (first + rest, "executed")
    body, said = await joined
    # On a machine that is busy, it comes when all is over.
    assert (body, said in ("joined", "replayed")) == (first + rest, True)
    with call.client(other.port) as client:
        assert call.made_with(client, **behind(events[0])) == call.made_with(client, **KEY)[1:]
    assert paid(llmock) == [(200, 0)]
