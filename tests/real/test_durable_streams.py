"""The Durable Streams protocol at the address of a response: clients of others, and the suite of the protocol."""

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from durable_streams import stream

from tests.e2e.test_stream_addresses import address_in
from tests.parts import CHUNKED, LAST_CHUNK, Proxy, RawClient, RawUpstream, Tap, chunk, request
from tests.real.durable.shim import Shim
from tests.real.parts import INSTALLED, NODE_MODULES

pytestmark = [INSTALLED, pytest.mark.timeout(400)]
PROGRAMS = Path(__file__).parent / "durable"
RULES = '[[rule]]\nname = "s"\npath = "/v1/**"\nresumable = true\ncors_origins = ["*"]\n'
SETTINGS = {"RULES_FILE": "rules.toml", "SECRET": "a secret of many bytes"}
# The suite's tests about reading. All others are about writing, which is not ours.
READS = (
    "Read Operations", "Long-Poll", "Browser Security", "HEAD Metadata", "Offset Validation and Resumability",
    "Caching and ETag", "SSE Mode", "Chunking", "Read-Your-Writes",
    "Stream Closure HEAD", "Stream Closure Read Closed", "Stream Closure Long-poll", "Stream Closure SSE",
    "Property-Based Tests .fast-check. Byte-Exactness", "Property-Based Tests .fast-check. Immutability",
)  # fmt: skip
PASSED = 93
JSON = "a response is bytes, also where it is JSON: its messages are not told apart"
LEFT_OUT = {
    "should return empty JSON array for offset=now on JSON streams": JSON,
    "JSON SSE catch-up pairs every data event with a control event": JSON,
    "should wrap JSON data in arrays for SSE and produce valid JSON": JSON,
    "should handle JSON payloads with embedded newlines safely": JSON,
    "should return TTL metadata if configured": "a writer configures it; an address ends with the retention",
    "should allow If-None-Match in CORS preflight responses": "it asks at an address that nobody was given: 404",
}
BODY = b": hello\n\ndata: one\nid: 1\n\n", "data: zwölf 🎈\nid: 2\n\n".encode(), b"data:  three\nid: 3\n\n"


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with the programs for Node and what they need."""
    folder = tmp_path / "node"
    folder.mkdir()
    for one in PROGRAMS.glob("*.mjs"):
        shutil.copy(one, folder)
    (folder / "node_modules").symlink_to(NODE_MODULES)
    return folder


@pytest.fixture
async def shim() -> AsyncIterator[Shim]:
    shim = Shim()
    await shim.start()
    yield shim
    await shim.close()


async def test_the_read_part_of_the_conformance_suite(shim: Shim, programs: Path, fork, valkey, tmp_path):
    """Each test about reading passes, but for those that are left out, each with its reason."""
    (tmp_path / "rules.toml").write_text(RULES)
    proxy: Proxy = await fork(shim.api, valkey.url, **SETTINGS)
    shim.proxy = f"http://127.0.0.1:{proxy.port}"
    runner = "node_modules/@durable-streams/server-conformance-tests/dist/test-runner.js"
    process = await asyncio.create_subprocess_exec(
        "node", "node_modules/vitest/vitest.mjs", "run", runner, "--reporter=json",
        f"--outputFile={programs / 'results.json'}", f"--config={programs / 'vitest.config.mjs'}",
        "--root", NODE_MODULES.parent, "-t", f"^ ?({'|'.join(READS)})",
        cwd=NODE_MODULES.parent, env={**os.environ, "CONFORMANCE_TEST_URL": shim.streams_url},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await process.communicate()
    file = programs / "results.json"
    assert file.exists(), output.decode()[-2000:]
    results = [one for part in json.loads(file.read_text())["testResults"] for one in part["assertionResults"]]
    failed = {one["title"]: one["failureMessages"] for one in results if one["status"] == "failed"}
    assert failed.keys() == LEFT_OUT.keys(), failed
    assert len([one for one in results if one["status"] == "passed"]) == PASSED


@pytest.fixture
async def running(upstream: RawUpstream, fork, valkey, tmp_path) -> AsyncIterator[tuple[Tap, str]]:
    """A response that has begun, and the URL of its address at another replica."""
    (tmp_path / "rules.toml").write_text(RULES)
    owner: Proxy = await fork(upstream, valkey.url, **SETTINGS)
    other: Proxy = await fork(upstream, valkey.url, **SETTINGS)
    tap = Tap()
    upstream.script = tap.script
    tap.send(CHUNKED.replace(b"text/plain", b"text/event-stream"), chunk(BODY[0]))
    client = await RawClient.open(owner.port)
    client.writer.write(request())
    address = address_in(await client.reader.readuntil(b"\r\n\r\n"))
    yield tap, f"http://127.0.0.1:{other.port}{address}"
    client.close()


async def _say_the_rest(tap: Tap) -> None:
    for piece in BODY[1:]:
        await asyncio.sleep(1)
        tap.send(chunk(piece))
    tap.end(LAST_CHUNK)


@pytest.mark.parametrize("live", ["long-poll", "sse"])
async def test_the_client_of_npm_reads_to_the_end(live, running, programs: Path):
    """A stream that still comes, byte for byte; and once more when it is complete."""
    tap, url = running
    saying = asyncio.ensure_future(_say_the_rest(tap))
    for mode in (live, "false"):
        process = await asyncio.create_subprocess_exec(
            "node", "read.mjs", url, mode, cwd=programs, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        output, errors = await asyncio.wait_for(process.communicate(), 60)
        assert output == b"".join(BODY), errors.decode()
    await saying


@pytest.mark.parametrize("live", ["long-poll", "sse"])
async def test_the_client_of_python_reads_what_comes(live, running):
    """Its version 0.1 does not know the end of a stream: it reads until it has all, and once more what is complete."""
    tap, url = running
    saying = asyncio.ensure_future(_say_the_rest(tap))

    def read() -> str:
        came = ""
        with stream(url, offset="-1", live=live) as reading:
            for text in reading.iter_text():
                came += text
                if came.endswith("three\nid: 3\n\n"):
                    return came
        return came

    whole = b"".join(BODY).decode()
    assert await asyncio.wait_for(asyncio.to_thread(read), 60) == whole
    await saying
    with await asyncio.to_thread(stream, url, offset="-1", live=False) as reading:
        assert await asyncio.to_thread(reading.read_text) == whole
