"""The rows of docs/reference/clients.md for MCP: the real SDK of Python where the answer to a call does not come.

Every call has a key, and the application makes it again: no SDK does that by itself.
"""

import asyncio
import json
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.parts import abort, until
from tests.real.clients import page
from tests.real.parts import CLIENTS, CLIENTS_MCP1, INSTALLED
from tests.zygote import Forked

pytestmark = [INSTALLED, pytest.mark.timeout(120)]
PROGRAMS = Path(__file__).parent / "agents"
RULES = '[[rule]]\nname = "tools"\npath = "/mcp"\npreset = "mcp"\n'


class Client(NamedTuple):
    """One row: an SDK, the protocol that it asks for, and the SDK of the server that speaks it."""

    name: str
    python: Path
    mode: str
    server: Path


ROWS = [
    Client("mcp (Python), 2026-07-28", CLIENTS, "auto", CLIENTS),
    Client("mcp (Python), 2025-11-25", CLIENTS, "legacy", CLIENTS),
    Client("mcp 1 (Python), 2025-11-25", CLIENTS_MCP1, "legacy", CLIENTS_MCP1),
]


class Bench:
    """A client, the proxy, and a server with a tool that takes its time."""

    def __init__(self, client: Client, proxy: Forked, log: Path) -> None:
        self.client, self.proxy, self.log = client, proxy, log

    @property
    def executions(self) -> int:
        return self.log.read_text().count("slow begins") if self.log.exists() else 0

    async def call(self, key: str, port: int, timeout: float = 20) -> str:
        """Make a call and return what its caller sees."""
        url, one = f"http://127.0.0.1:{port}/mcp", {"tool": "slow", "arguments": {"seconds": 1}, "key": key}
        order = {"url": url, "mode": self.client.mode, "calls": [{**one, "progress": True, "timeout": timeout}]}
        command = [str(self.client.python), str(PROGRAMS / "client.py"), json.dumps(order)]
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        output, _ = await process.communicate()
        return seen(json.loads(output.splitlines()[-1])[0])


def seen(answer: dict[str, Any]) -> str:
    if "text" in answer:
        return "its answer"
    if "problem" in answer:
        return f"`MCPError` {answer['code']}" + (f" `{answer['problem']}`" if answer["problem"] else "")
    return "`TimeoutError`" if "timeout" in answer else f"`{answer['broken'].partition('(')[0]}`"


@pytest.fixture(params=ROWS, ids=lambda row: row.name)
def client(request: pytest.FixtureRequest) -> Client:
    row: Client = request.param
    return row


@pytest.fixture
async def bench(client: Client, tmp_path: Path, fork, valkey) -> AsyncIterator[Bench]:
    (tmp_path / "rules.toml").write_text(RULES)
    for process, url in _server(client.server, tmp_path):
        proxy = await fork(url, valkey.url, RULES_FILE="rules.toml", LEASE_MS=3000)
        yield Bench(client, proxy, tmp_path / "runs")
        process.kill()


def _server(python: Path, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as sock, (folder / "log").open("wb") as output:
        command = [python, PROGRAMS / "server.py", str(sock.fileno()), folder / "runs"]
        process = subprocess.Popen(command, pass_fds=[sock.fileno()], stdout=output, stderr=output)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    yield process, url
    process.wait()


class Breaking:
    """A relay to the proxy that breaks once: before the first byte of a call's answer, or in its middle."""

    def __init__(self, port: int, *, in_the_middle: bool) -> None:
        self._proxy_port, self._in_the_middle = port, in_the_middle
        self.broken = False

    async def __aenter__(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._proxy_port)
        asked = bytearray()
        out = asyncio.create_task(self._out(reader, back, asked))
        with suppress(OSError):
            while data := await there.read(65536):
                if not self.broken and b'"tools/call"' in asked:
                    self.broken = not self._in_the_middle or b"progressToken" in data
                    if self._in_the_middle and self.broken:
                        writer.write(data)
                        await writer.drain()
                        await asyncio.sleep(0.2)
                    if self.broken:
                        abort(writer)
                        break
                writer.write(data)
                await writer.drain()
        out.cancel()
        back.close()
        writer.close()

    async def _out(self, reader: asyncio.StreamReader, back: asyncio.StreamWriter, asked: bytearray) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                asked += data
                back.write(data)
                await back.drain()
            back.write_eof()


async def test_where_the_answer_to_a_call_does_not_come(bench):
    """Whatever breaks, the tool runs once. The second call has its result, or says that nobody knows."""
    cells = []
    for key, in_the_middle in (("lost", False), ("cut", True)):
        async with Breaking(bench.proxy.port, in_the_middle=in_the_middle) as port:
            first = await bench.call(key, port)
        cells.append(f"{bench.executions}: {first}; again: {await bench.call(key, bench.proxy.port)}")
        bench.log.write_text("")
    slow = await bench.call("slow", bench.proxy.port, timeout=0.5)
    cells.insert(1, f"{bench.executions}: {slow}; again: {await bench.call('slow', bench.proxy.port)}")
    bench.log.write_text("")
    killed = asyncio.ensure_future(bench.call("killed", bench.proxy.port))
    await until(lambda: bench.executions)
    await asyncio.to_thread(bench.proxy.kill)
    bench.proxy.start()
    first = await killed
    cells.append(f"{bench.executions}: {first}; again: {await bench.call('killed', bench.proxy.port)}")
    assert [cell.partition(":")[0] for cell in cells] == ["1"] * 4
    # A client of the older protocols that gives up ends its session, and the server ends the calls that run in it.
    assert all(cell.endswith(("again: its answer", "`outcome_unknown`")) for cell in cells)
    assert cells[0].endswith("again: its answer")
    assert cells[3].endswith("`outcome_unknown`")
    packages = await asyncio.to_thread(
        subprocess.check_output,
        [bench.client.python, "-c", "from importlib.metadata import version as v; print(v('mcp'))"],
    )
    page.show("MCP and A2A", bench.client.name, packages.decode().strip(), "`mcp`", *cells)
