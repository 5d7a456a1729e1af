"""What would make a process stand still in the midst of its work: a table that grows, garbage that is looked for."""

import asyncio
import gc
import json
from pathlib import Path

import pytest

from tests.e2e.test_workers import workers
from tests.parts import OK, Proxy, RawClient, abort, answering, ask, chunk, request, until

# What runs in every process of a proxy: at its end it says what its garbage collection was like, and what it found.
SITE = """
import atexit, gc, json, os
from collections import Counter

def say():
    frozen, thresholds = gc.get_freeze_count(), gc.get_threshold()
    gc.collect()
    found = Counter(f"{type(one).__module__}.{type(one).__qualname__}" for one in gc.garbage)
    with open(f"garbage-{os.getpid()}.json", "w") as file:
        json.dump({"frozen": frozen, "thresholds": thresholds, "found": found}, file)

gc.set_debug(gc.DEBUG_SAVEALL)
atexit.register(say)
"""
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
# Of what is made for each request, what may be large or refers to it.
HEAVY = (
    "oncegate.downstream.body.", "oncegate.downstream.minimum_rate.", "oncegate.gateway.exchange.",
    "oncegate.gateway.recording.", "oncegate.upstream.", "httptools.", "aiohttp.web_protocol.",
)  # fmt: skip


@pytest.fixture
def watched(upstream, valkey, tmp_path, monkeypatch):
    """Start a proxy whose processes leave files about their garbage."""
    (tmp_path / "sitecustomize.py").write_text(SITE)
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{root}/proxy:{root}")
    started = []

    def start(**settings: object) -> Proxy:
        started.append(proxy := Proxy(upstream.url, valkey.url, tmp_path, settings))
        proxy.start()
        return proxy

    yield start
    for proxy in started:
        proxy.close()


def told(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in folder.glob("garbage-*.json")]


def file_table(pid: int) -> int:
    """Return for how many open files the kernel has room for this process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("FDSize:"))


@pytest.mark.parametrize("count", [1, 2])
async def test_the_table_of_open_files_does_not_grow_under_load(fork, upstream, valkey, count):
    """It has room for all connections from the start, in each process that serves."""
    gate = await fork(
        upstream, valkey.url, WORKERS=count, MAX_CONNECTIONS=500, MAX_UPSTREAM_CONNECTIONS=20, DRAIN_DELAY_S=0
    )
    await until(lambda: gate.serves())
    serving = workers(gate) if count > 1 else [gate.process.pid]
    assert len(serving) == count
    for pid in serving:
        assert file_table(pid) >= 500 + 20


@pytest.mark.parametrize("count", [1, 2])
async def test_what_is_there_for_good_is_left_out_of_collections(watched, tmp_path, count):
    """Each process that serves has frozen the program itself, and seldom looks at everything."""
    gate = watched(WORKERS=count)
    assert gate.stop() == 0
    serving = [one for one in told(tmp_path) if one["frozen"]]
    assert len(serving) == count
    for one in serving:
        assert one["frozen"] > len(gc.get_objects()) // 10
        assert one["thresholds"][2] > 10


async def test_what_fails_leaves_no_garbage(watched, upstream, tmp_path):
    """Requests that end badly, at either side, let go of what they had; none waits for a collection."""
    gate = watched()

    async def closes(server, reader, writer, request):
        writer.close()

    async def breaks_off(server, reader, writer, request):
        writer.write(EVENTS + chunk(b"data: some\n\n"))
        await writer.drain()
        await asyncio.sleep(0.1)
        writer.close()

    async def short(server, reader, writer, request):
        writer.write(OK[:-1])
        await writer.drain()
        writer.close()

    scripts = {closes: 502, breaks_off: 200, short: 502, answering(b"nonsense\r\n\r\n"): 502, answering(OK): 200}
    for number, (script, status) in enumerate(scripts.items()):
        upstream.script = script
        assert (await ask(gate.port, request(key=f"k{number}"))).status == status
        await ask(gate.port, request(key=None))  # passed through
    assert (await ask(gate.port, b"nonsense\r\n\r\n")).status == 400
    for body in (b"some", b"3\r\nsom\r\nnonsense\r\n"):
        client = await RawClient.open(gate.port)
        framing = "Transfer-Encoding: chunked" if b"nonsense" in body else "Content-Length: 9"
        client.writer.write(request("POST", "/", "left", body, framing))
        await asyncio.sleep(0.1)
        abort(client.writer)
    assert gate.stop() == 0
    (found,) = (one["found"] for one in told(tmp_path))
    assert found.get("argparse.ArgumentParser")  # garbage of a kind there is, so it would have been seen
    assert {name: count for name, count in found.items() if name.startswith(HEAVY)} == {}
