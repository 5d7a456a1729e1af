"""The rows of docs/reference/clients.md for MCP and A2A: real SDKs where the answer to a call does not come.

Every call has a key, and the application makes it again: no SDK does that by itself.
"""

import asyncio
import json
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.parts import abort
from tests.real.clients import page
from tests.real.parts import CLIENTS, CLIENTS_MCP1, INSTALLED, NODE_MODULES
from tests.zygote import Forked

pytestmark = [INSTALLED, pytest.mark.timeout(180)]
PROGRAMS = Path(__file__).parent / "agents"


class Protocol(NamedTuple):
    """What a preset guards: its path, a word in the body of a call, and one in the middle of the answer to it."""

    preset: str
    asks: bytes
    in_the_middle: bytes
    # What the server notes as often as it executes the call.
    noted: str

    def order(self, mode: str, key: str, timeout_s: float) -> dict[str, Any]:
        """Return what a client is told to do. `mode`: of MCP's client, or the version of A2A."""
        if self is A2A:
            return {
                "version": mode,
                "stream": True,
                "messages": [{"id": key, "text": "slow pay", "timeout": timeout_s}],
            }
        one = {"tool": "slow", "arguments": {"seconds": 1}, "key": key, "progress": True, "timeout": timeout_s}
        return {"mode": mode, "calls": [one]}


MCP = Protocol("mcp", b'"tools/call"', b"progressToken", "slow begins")
A2A = Protocol("a2a", b"SendStreamingMessage", b"begun: slow pay", "slow pay")


class Client(NamedTuple):
    """One row: an SDK, its package, the protocol that it asks for, and a server that speaks it.

    `client`, `server`: an interpreter, a program, and arguments of the program.
    """

    name: str
    package: str
    client: tuple[str | Path, ...]
    mode: str
    server: tuple[str | Path, ...]
    protocol: Protocol = MCP


PYTHON, PYTHON_1 = (CLIENTS, "client.py"), (CLIENTS_MCP1, "client.py")
SERVER, SERVER_1 = (CLIENTS, "server.py"), (CLIENTS_MCP1, "server.py")
NODE, NODE_1 = ("node", "client.mjs", "2"), ("node", "client.mjs", "1")
NODE_SERVER, NODE_SERVER_1 = ("node", "server.mjs", "2"), ("node", "server.mjs", "1")
AGENT = (CLIENTS, "a2a_server.py")
ROWS = [
    Client("mcp (Python), 2026-07-28", "mcp", PYTHON, "auto", SERVER),
    Client("mcp (Python), 2025-11-25", "mcp", PYTHON, "legacy", SERVER),
    Client("mcp 1 (Python), 2025-11-25", "mcp", PYTHON_1, "legacy", SERVER_1),
    Client("@modelcontextprotocol/client (npm), 2026-07-28", "@modelcontextprotocol/client", NODE, "auto", NODE_SERVER),
    Client(
        "@modelcontextprotocol/client (npm), 2025-11-25", "@modelcontextprotocol/client", NODE, "legacy", NODE_SERVER
    ),
    Client("@modelcontextprotocol/sdk (npm), 2025-11-25", "@modelcontextprotocol/sdk", NODE_1, "legacy", NODE_SERVER_1),
    Client("a2a-sdk (Python), 1.0", "a2a-sdk", (CLIENTS, "a2a_client.py"), "1.0", AGENT, A2A),
    Client("@a2a-js/sdk (npm), 1.0", "@a2a-js/sdk", ("node", "a2a_client.mjs"), "1.0", AGENT, A2A),
]


class Bench:
    """A client, the proxy, and a server with a tool that takes its time."""

    def __init__(self, client: Client, proxy: Forked, folder: Path) -> None:
        self.client, self.proxy, self.folder = client, proxy, folder
        self.log = folder / "runs"

    @property
    def executions(self) -> int:
        return self.log.read_text().count(self.client.protocol.noted) if self.log.exists() else 0

    async def call(self, key: str, port: int, timeout_s: float = 20) -> str:
        """Make a call and return what its caller sees."""
        protocol, (interpreter, program, *words) = self.client.protocol, self.client.client
        order = protocol.order(self.client.mode, key, timeout_s) | {"url": f"http://127.0.0.1:{port}/{protocol.preset}"}
        process = await asyncio.create_subprocess_exec(
            interpreter, self.folder / program, *words, json.dumps(order),
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        output, _ = await process.communicate()
        return seen(json.loads(output.splitlines()[-1])[0])

    async def restart(self) -> None:
        """Kill the proxy, and start another."""
        await asyncio.to_thread(self.proxy.kill)
        self.proxy.start()

    async def version(self) -> str:
        """Return the version of the client's SDK."""
        interpreter, package = self.client.client[0], self.client.package
        if interpreter == "node":
            return json.loads((NODE_MODULES / package / "package.json").read_text())["version"]  # type: ignore[no-any-return]
        code = f"from importlib.metadata import version as v; print(v('{package}'))"
        return (await asyncio.to_thread(subprocess.check_output, [interpreter, "-c", code])).decode().strip()


def seen(answer: dict[str, Any]) -> str:
    if "text" in answer or "texts" in answer:
        return "its answer"
    name = answer.get("name") or ("MCPError" if "problem" in answer else "TimeoutError" if "timeout" in answer else "")
    if "problem" in answer:
        return f"`{name}` {answer['code']}" + (f" `{answer['problem']}`" if answer["problem"] else "")
    if "error" in answer and "outcome" in answer["error"]:
        # The SDKs of A2A show the message alone.
        return f"`{name}` `outcome_unknown`"
    return f"`{name or answer['broken'].partition('(')[0]}`"


@pytest.fixture(params=ROWS, ids=lambda row: row.name)
def client(request: pytest.FixtureRequest) -> Client:
    row: Client = request.param
    return row


@pytest.fixture
async def bench(client: Client, tmp_path: Path, fork, valkey) -> AsyncIterator[Bench]:
    preset = client.protocol.preset
    (tmp_path / "rules.toml").write_text(f'[[rule]]\nname = "tools"\npath = "/{preset}"\npreset = "{preset}"\n')
    for one in PROGRAMS.glob("*.*"):
        shutil.copy(one, tmp_path)
    (tmp_path / "node_modules").symlink_to(NODE_MODULES)
    with running(client.server, tmp_path) as url:
        proxy = await fork(url, valkey.url, RULES_FILE="rules.toml", LEASE_MS=3000)
        yield Bench(client, proxy, tmp_path)


@contextmanager
def running(server: tuple[str | Path, ...], folder: Path) -> Iterator[str]:
    interpreter, program, *words = server
    with socket.create_server(("127.0.0.1", 0), backlog=64) as sock, (folder / "log").open("wb") as output:
        command = [interpreter, folder / program, str(sock.fileno()), folder / "runs", *words]
        process = subprocess.Popen(command, pass_fds=[sock.fileno()], stdout=output, stderr=output)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    try:
        yield url
    finally:
        process.kill()
        process.wait()


class Breaking:
    """A relay to the proxy that breaks once: before the first byte of a call's answer, or in its middle.

    `before`: what is done first.
    """

    def __init__(
        self,
        port: int,
        protocol: Protocol,
        *,
        in_the_middle: bool,
        before: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._proxy_port, self._protocol, self._in_the_middle = port, protocol, in_the_middle
        self._before = before
        self._tasks: set[asyncio.Task[None]] = set()
        self.broken = False

    async def __aenter__(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())  # type: ignore[arg-type]
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._proxy_port)
        except OSError:
            # The proxy was killed, and is not back.
            abort(writer)
            return
        asked = bytearray()
        out = asyncio.create_task(self._out(reader, back, asked))
        with suppress(OSError, asyncio.CancelledError):
            while data := await there.read(65536):
                if not self.broken and self._protocol.asks in asked:
                    self.broken = not self._in_the_middle or self._protocol.in_the_middle in data
                    if self._in_the_middle and self.broken:
                        writer.write(data)
                        await writer.drain()
                        await asyncio.sleep(0.2)
                    if self.broken and self._before is not None:
                        await self._before()
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
        async with Breaking(bench.proxy.port, bench.client.protocol, in_the_middle=in_the_middle) as port:
            first = await bench.call(key, port)
        cells.append(f"{bench.executions}: {first}; again: {await bench.call(key, bench.proxy.port)}")
        bench.log.write_text("")
    slow = await bench.call("slow", bench.proxy.port, timeout_s=0.5)
    cells.insert(1, f"{bench.executions}: {slow}; again: {await bench.call('slow', bench.proxy.port)}")
    bench.log.write_text("")
    async with Breaking(bench.proxy.port, bench.client.protocol, in_the_middle=True, before=bench.restart) as port:
        first = await bench.call("killed", port)
    cells.append(f"{bench.executions}: {first}; again: {await bench.call('killed', bench.proxy.port)}")
    assert [cell.partition(":")[0] for cell in cells] == ["1"] * 4
    # A client of the older protocols that gives up ends its session, and the server ends the calls that run in it.
    assert all(cell.endswith(("again: its answer", "`outcome_unknown`")) for cell in cells)
    assert cells[0].endswith("again: its answer")
    assert cells[3].endswith("`outcome_unknown`")
    row = bench.client
    page.show("MCP and A2A", row.name, await bench.version(), f"`{row.protocol.preset}`", *cells)
