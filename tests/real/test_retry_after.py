"""OpenAI's own SDK, which obeys Retry-After and gives up after two retries, at a proxy that does not let it wait."""

import asyncio
import json
from pkgutil import resolve_name
from typing import Any

import pytest

from tests.parts import answering

pytestmark = pytest.mark.xdist_group("llm")  # of one process, which imports that SDK when it is used
TEXT = json.dumps(
    {
        "id": "c-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hello"}}],
    }
).encode()
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(TEXT), TEXT)
# It tries at about 0 s, 1 s (0.5 s of patience and a pause of half a second) and then when it is told to come.
TAKES_S, PATIENCE_S = 2.6, 0.5


async def test_a_409_says_when_the_original_is_done(fork, upstream, valkey):
    """Once such a request took 2.6 s, the SDK's last retry comes after that, and gets the one answer.

    Without that it came after 1 s more, as long as the original had been running, and gave up.
    """
    upstream.script = answering(ANSWER, delay_s=TAKES_S)
    proxy = await fork(upstream, valkey.url)
    sdk = resolve_name("openai.AsyncOpenAI")
    client = sdk(api_key="sk-test", base_url=f"http://127.0.0.1:{proxy.port}/v1", max_retries=2)

    async def write(key: str, seconds: float) -> Any:
        return await client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "hello"}],
            extra_headers={"Idempotency-Key": key},
            timeout=seconds,
        )

    async with client:
        await write("prompt-1", 20)
        text = await asyncio.wait_for(write("prompt-2", PATIENCE_S), 20)
    assert text.choices[0].message.content == "hello"
    assert len(upstream.received) == 2
    assert proxy.metric('requests_total{outcome="in_flight"}') == 1
