"""MCP with the real SDK of Python, in both generations of SDK and protocol, against servers that are made with it.

A call whose answer is lost is issued again by the application, as the protocol says, and runs once.
"""

import asyncio
import json
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.parts import ROOT, abort
from tests.real.parts import CLIENTS, CLIENTS_MCP1, INSTALLED
from tests.zygote import Forked

pytestmark = [INSTALLED, pytest.mark.timeout(120)]
PROGRAMS = Path(__file__).parent / "agents"
SERVERS = {"mcp 2": CLIENTS, "mcp 1": CLIENTS_MCP1}
# The client: its SDK, and the protocol that it asks for.
CLIENT = {"2026-07-28": (CLIENTS, "auto"), "mcp 2, older": (CLIENTS, "legacy"), "mcp 1": (CLIENTS_MCP1, "legacy")}
RULES = """
[[rule]]
name = "refunds without a key"
path = "/mcp"
preset = "mcp"
key = "derived:60"
when = { "body:/method" = "tools/call", "body:/params/name" = "refund" }

[[rule]]
name = "tools"
path = "/mcp"
preset = "mcp"
"""


class Tools:
    """A server as a process, and in each test the proxy before it."""

    proxy: Forked

    def __init__(self, name: str, url: str, log: Path) -> None:
        self.name, self.url, self._log = name, url, log

    @property
    def at(self) -> str:
        """Where the proxy serves them."""
        return f"http://127.0.0.1:{self.proxy.port}/mcp"

    def forget(self) -> None:
        self._log.write_text("")

    @property
    def runs(self) -> list[str]:
        """What ran since `forget`."""
        return self._log.read_text().splitlines()


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tools]:
    folder = tmp_path_factory.mktemp("tools")
    with socket.create_server(("127.0.0.1", 0), backlog=64) as sock, (folder / "log").open("wb") as output:
        command = [SERVERS[request.param], PROGRAMS / "server.py", str(sock.fileno()), folder / "runs"]
        process = subprocess.Popen(command, pass_fds=[sock.fileno()], stdout=output, stderr=output)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    yield Tools(request.param, url, folder / "runs")
    process.kill()
    process.wait()


@pytest.fixture
async def tools(server: Tools, tmp_path: Path, fork, valkey) -> Tools:
    (tmp_path / "rules.toml").write_text(RULES)
    server.proxy = await fork(server, valkey.url, RULES_FILE="rules.toml")
    server.forget()
    return server


@pytest.fixture(params=CLIENT)
def client(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def call(tool: str, key: str | None = None, **more: Any) -> dict[str, Any]:
    options = {name: more.pop(name) for name in ("timeout", "progress") if name in more}
    return {"tool": tool, "key": key, "arguments": more or {"amount": 1}, **options}


async def calls(client: str, url: str, *some: dict[str, Any], **order: Any) -> list[dict[str, Any]]:
    """Return what calls by a client of its own came to."""
    python, mode = CLIENT[client]
    text = json.dumps({"url": url, "mode": mode, "calls": some, **order})
    process = await asyncio.create_subprocess_exec(
        python, PROGRAMS / "client.py", text, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    async with asyncio.timeout(60):
        output, errors = await process.communicate()
    assert output, errors.decode()
    return json.loads(output.splitlines()[-1])  # type: ignore[no-any-return]


class LosingWay:
    """A relay to the proxy that loses the answer to the first call of a tool. `begun`: only its result."""

    def __init__(self, port: int, begun: bool) -> None:
        self._proxy_port, self._begun = port, begun
        self.lost = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "LosingWay":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/mcp"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())  # type: ignore[arg-type]
        there, back = await asyncio.open_connection("127.0.0.1", self._proxy_port)
        asked = bytearray()
        out = asyncio.create_task(self._out(reader, back, asked))
        with suppress(OSError, asyncio.CancelledError):
            while data := await there.read(65536):
                is_answer = b'"tools/call"' in asked and not self.lost
                if is_answer and (not self._begun or b'"result"' in data):
                    self.lost = True
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


async def test_a_lost_answer(tools, client):
    """An answer is lost on its way. The application calls again, with the same key: the tool has run once."""
    for tool, begun, text in (("charge", False, "charged 1"), ("slow", True, "done")):
        tools.forget()
        one = call(tool, f"lost-{tool}", **({"seconds": 0.5, "progress": True} if tool == "slow" else {}))
        async with LosingWay(tools.proxy.port, begun) as way:
            first = await calls(client, way.url, {**one, "timeout": 5})
            assert way.lost
        assert "text" not in first[0]
        [again] = await calls(client, tools.at, one)
        assert again == {"text": text, "is_error": False, "progress": [1.0] if begun else []}
        assert len([line for line in tools.runs if line in ("charge 1", "slow begins")]) == 1


async def test_what_runs_once_and_what_runs_twice(tools, client):
    """Calls with one key run once, under whatever id; other keys, other calls and calls without a key run."""
    first = await calls(client, tools.at, call("charge", "a"), call("charge", "b"), call("fail", "c"), call("pay", "d"))
    again = await calls(
        client, tools.at, call("charge"), call("charge", "a"), call("fail", "c"), call("pay", "d"), call("charge"),
        call("charge", "a", amount=2),
    )  # fmt: skip
    assert [one.get("text") for one in first[:2]] == ["charged 1", "charged 1"]
    assert again[1:4] == [first[0], first[2], first[3]]
    assert first[2]["is_error"]
    assert first[3]["text"] == "paid 1: True"
    assert again[5]["problem"] == "key_reused"
    assert again[5]["code"] == -32010
    assert tools.runs == ["charge 1", "charge 1", "fail 1", "pay 1", "charge 1", "charge 1"]


async def test_a_call_again_while_the_first_one_runs(tools, client):
    """A call that is made again while the tool still runs waits, and gets the result and the progress."""
    one = call("slow", "waits", seconds=1, progress=True)
    answers = await calls(client, tools.at, one, one, at_once=True)
    expected = {"text": "done", "is_error": False, "progress": [1.0]}
    assert answers == [expected, expected]
    assert tools.runs == ["slow begins", "slow ends"]


async def test_calls_without_a_key_under_a_window(tools, client):
    """A derived key needs nothing of the client: an equal call within the window runs once, another one runs."""
    answers = await calls(client, tools.at, *(call("refund", amount=amount) for amount in (1, 1, 2)))
    again = await calls(client, tools.at, call("refund", amount=1))
    assert [one["text"] for one in [*answers, *again]] == [f"refunded {amount}" for amount in (1, 1, 2, 1)]
    assert tools.runs == ["refund 1", "refund 2"]


async def test_a_client_that_leaves(tools, client):
    """Closing does not cancel a call with a key; a call without one is cancelled, and so is one that is named."""
    one = call("slow", "leaves", seconds=1.5)
    left, again = await calls(client, tools.at, {**one, "timeout": 0.4}, one)
    assert left == {"timeout": True}
    # On the older protocols, the new SDK says `notifications/cancelled`, which reaches the server, and is not undone.
    is_named = tools.runs == ["slow begins", "slow is cancelled"]
    assert again.get("problem") == "outcome_unknown" if is_named else again["text"] == "done"
    assert is_named or tools.runs == ["slow begins", "slow ends"]
    assert not (is_named and client == "mcp 1")
    tools.forget()
    [left] = await calls(client, tools.at, {**call("slow", seconds=5), "timeout": 0.4}, pause=1)
    assert left == {"timeout": True}
    if client != "mcp 1":  # which says nothing, and whose protocol takes closing for no cancellation
        assert tools.runs == ["slow begins", "slow is cancelled"]


async def test_the_example_calls_a_real_tool(tools, tmp_path):
    """The client of config/agents, which has no SDK, calls a tool on the wire of 2026-07-28, and again with its key."""
    if tools.name != "mcp 2":
        pytest.skip("this server does not speak the protocol of 2026-07-28")
    jobs = tmp_path / "jobs.db"

    async def program(*words: str) -> list[str]:
        command = [sys.executable, "-m", "config.agents.client", jobs, *words]
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, cwd=ROOT)
        return (await process.communicate())[0].decode().splitlines()

    [key] = await program("add", "charge", '{"amount": 7}')
    assert await program("run", tools.at) == ["charged 7", f"{key} answered 200"]
    with sqlite3.connect(jobs) as rows:
        rows.execute("UPDATE jobs SET outcome = NULL")
    assert await program("run", tools.at) == ["charged 7", f"{key} answered 200"]
    assert tools.runs == ["charge 7"]
