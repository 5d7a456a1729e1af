"""What clients make of interim responses: the table in docs/reference/interim.md is what they really do."""

import asyncio
import json
import os
import re
import shutil
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.parts import CHUNKED, LAST_CHUNK, ROOT, Proxy, RawUpstream, Received, ask, chunk, request
from tests.real.parts import CLIENTS as SDKS
from tests.real.parts import INSTALLED, NODE_MODULES

PROGRAMS = Path(__file__).with_name("interim")
PAGE = ROOT / "docs/reference/interim.md"
# By their names on the page.
CLIENTS = {
    "Python `http.client`": [sys.executable, "http_client.py"],
    "Python `requests`": [sys.executable, "requests_session.py"],
    "Python `httpx`": [sys.executable, "httpx_client.py"],
    "Python `aiohttp`": [sys.executable, "aiohttp_session.py"],
    "curl": ["sh", "curl.sh"],
    "Node `fetch` (undici)": ["node", "fetch.mjs"],
    "Node `http`": ["node", "node_http.mjs"],
    "PHP streams (`file_get_contents`)": ["php", "streams.php"],
    "Java `HttpURLConnection`": ["java", "UrlConnection.java"],
    "Java `HttpClient`": ["java", "NewClient.java"],
}
# How many interim responses with which status.
CASES = [(1, 102), (1, 103), (4, 102), (12, 102)]
NAMED = ["curl/*", "node", "python-httpx/*", "Python/* aiohttp/*", "Java-http-client/*"]
RULES = f"""
[[rule]]
name = "passing"
path = "/passing/**"
pass_interim = true

[[rule]]
name = "beaten"
path = "/beaten/**"
heartbeat_s = 0.1
heartbeat_agents = {json.dumps(NAMED)}

[[rule]]
name = "llm"
path = "/v1/**"
heartbeat_s = 0.1
"""
RIGHT = "right"
ASKED = ("first", "second", "third")

pytestmark = INSTALLED


async def script(_: RawUpstream, __: asyncio.StreamReader, writer: asyncio.StreamWriter, received: Received) -> None:
    """Answer with the last segment of the path, after interim responses: `/.../{count}x{status}/...`."""
    path = received.line.split(b" ")[1]
    if case := re.search(rb"/(\d+)x(\d+)/", path):
        for _number in range(int(case[1])):
            writer.write(b"HTTP/1.1 %s Interim\r\n\r\n" % case[2])
            await asyncio.sleep(0.05)
    elif b"/slow/" in path:
        await asyncio.sleep(0.6)
    body = path.rpartition(b"/")[2]
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


@pytest.fixture
async def gate(fork, upstream: RawUpstream, valkey, tmp_path: Path):
    upstream.script = script
    (tmp_path / "rules.toml").write_text(RULES)
    return await fork(upstream, valkey.url, RULES_FILE="rules.toml")


async def run(client: str, *urls: str) -> list[Any]:
    """Return what a client got for requests one after the other: status and body, or the name of an error."""
    program, name = CLIENTS[client]
    assert shutil.which(program), f"{program} is not installed"
    command = [program, str(PROGRAMS / name), *urls]
    environment = {"PATH": os.environ["PATH"]}
    process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=asyncio.subprocess.PIPE)
    try:
        output, _ = await asyncio.wait_for(process.communicate(), 60)
    finally:
        if process.returncode is None:
            process.kill()
    return json.loads(output)  # type: ignore[no-any-return]


def described(found: list[Any]) -> str:
    """Return in words what the requests `first`, `second` and `third` got."""
    first, *later = found
    is_apart = later == [[200, "second"], [200, "third"]]
    if first == [200, "first"] and is_apart:
        return RIGHT
    if isinstance(first, str):
        return "no answer" if is_apart else "no answer, and the next are wrong"
    assert first[0] < 200, "that is no interim response"
    return "wrong" if is_apart else "wrong, and so are the next"


def urls(gate: Proxy, client: str, path: str, *numbers: int) -> list[str]:
    """Return the URLs of the requests of one client. Each is its key as well, so no two clients share one."""
    place = f"http://127.0.0.1:{gate.port}/{path}/{list(CLIENTS).index(client)}"
    return [f"{place}/{ASKED[number]}" for number in numbers or range(3)]


async def row(gate: Proxy, client: str) -> str:
    cells = []
    for count, status in CASES:
        case = f"{count}x{status}"
        asked = urls(gate, client, f"passing/{case}", 0) + urls(gate, client, f"other/{case}", 1, 2)
        cells.append(described(await run(client, *asked)))
    return f"| {client} | {' | '.join(cells)} |"


async def each(what: Callable[[str], Awaitable[Any]]) -> list[Any]:
    """Return what comes of each client, some of them at a time: most of it is waiting."""
    turns = asyncio.Semaphore(3)

    async def one(client: str) -> Any:
        async with turns:
            return await what(client)

    return await asyncio.gather(*map(one, CLIENTS))


async def test_the_table_on_the_page(gate):
    """Each row of the page is what the client does with interim responses that are passed on."""
    rows = await each(lambda client: row(gate, client))
    table = PAGE.read_text().partition("<!-- measured: by make test-real -->\n")[2].partition("\n<!-- end -->")[0]
    assert table.splitlines()[2:] == rows


async def test_by_default_no_client_is_shifted(gate):
    """Interim responses of the API end at oncegate, and a client that is not named gets none of its own."""
    found = await each(lambda client: run(client, *urls(gate, client, "other/4x102")))
    assert [described(one) for one in found] == [RIGHT] * len(CLIENTS), found


async def test_signs_of_life_to_the_clients_that_take_them(gate, upstream):
    """Those that the rule names get four, and the right answers; the others get none, and the right answers."""
    found = await each(lambda client: run(client, *urls(gate, client, "beaten/slow")))
    assert [described(one) for one in found] == [RIGHT] * len(CLIENTS), found


def event(data: dict[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (str(data.get("type", "x")).encode(), json.dumps(data).encode())


def chat(delta: dict[str, str]) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": None}
    one = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: %s\n\n" % json.dumps(one).encode()


MESSAGE = {
    "id": "m", "type": "message", "role": "assistant", "content": [], "model": "m", "stop_reason": None,
    "stop_sequence": None, "usage": {"input_tokens": 1, "output_tokens": 1},
}  # fmt: skip
STREAMS = {
    "completions": [chat({"content": "Hel"}), chat({"content": "lo"}), b"data: [DONE]\n\n"],
    "messages": [
        event({"type": "message_start", "message": MESSAGE}),
        event({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}),
        event({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hel"}}),
        event({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "lo"}}),
        event({"type": "content_block_stop", "index": 0}),
        event({"type": "message_stop"}),
    ],
}


async def stream(_: RawUpstream, __: asyncio.StreamReader, writer: asyncio.StreamWriter, received: Received) -> None:
    """Stream an answer as an LLM's API does, with a silence before each event."""
    writer.write(CHUNKED.replace(b"text/plain", b"text/event-stream"))
    for one in STREAMS[received.line.split(b" ")[1].partition(b"?")[0].rpartition(b"/")[2].decode()]:
        await asyncio.sleep(0.15)
        writer.write(chunk(one))
    writer.write(LAST_CHUNK)


async def test_sdks_read_past_comments(gate, upstream):
    """Comments stand in the streams, and the SDKs of LLMs read the same text."""
    upstream.script = stream
    raw = await ask(gate.port, request("POST", "/v1/chat/completions", None, b"{}"))
    assert raw.body.count(b":\n\n") >= 3
    url, expected = f"http://127.0.0.1:{gate.port}", "Hello"
    environment = {"PATH": os.environ["PATH"], "NODE_PATH": str(NODE_MODULES), "AI_SDK_LOG_WARNINGS": "false"}
    for program, name in ((str(SDKS), "stream_text.py"), ("node", "stream_text.cjs")):
        command = [program, str(PROGRAMS / name), url]
        process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=asyncio.subprocess.PIPE)
        output, _ = await asyncio.wait_for(process.communicate(), 60)
        read = json.loads(output.splitlines()[-1])
        assert set(read.values()) == {expected}, read
