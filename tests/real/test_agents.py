"""MCP with the real SDKs of Python and TypeScript, of both generations and protocols, against servers made with them.

A call whose answer is lost is issued again by the application, as the protocol says, and runs once.
"""

import asyncio
import json
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.parts import ROOT, abort
from tests.real.parts import CLIENTS, CLIENTS_MCP1, INSTALLED, NODE_MODULES
from tests.zygote import Forked

pytestmark = [INSTALLED, pytest.mark.timeout(120)]
PROGRAMS = Path(__file__).parent / "agents"
# A generation of an SDK: what runs a program made with it, and what the program is told of it.
PYTHON, PYTHON_1 = (CLIENTS, "py"), (CLIENTS_MCP1, "py")
NODE, NODE_1 = ("node", "mjs", "2"), ("node", "mjs", "1")
SERVERS = {"mcp 2": PYTHON, "mcp 1": PYTHON_1, "npm 2": NODE, "npm 1": NODE_1}
# The client: its SDK, and the protocol that it asks for.
CLIENT = {
    "2026-07-28": (PYTHON, "auto"),
    "mcp 2, older": (PYTHON, "legacy"),
    "mcp 1": (PYTHON_1, "legacy"),
    "npm 2026-07-28": (NODE, "auto"),
    "npm 2, older": (NODE, "legacy"),
    "npm 1": (NODE_1, "legacy"),
}
# Clients that name a call which they give up, as the older protocols say.
NAMES_IT = {"mcp 2, older", "npm 2, older", "npm 1"}
PAIRS = [
    *((server, client) for server in ("mcp 2", "mcp 1") for client in ("2026-07-28", "mcp 2, older", "mcp 1")),
    ("npm 2", "npm 2026-07-28"),
    ("npm 2", "npm 2, older"),
    ("npm 1", "npm 1"),
    ("npm 2", "2026-07-28"),
    ("mcp 2", "npm 2026-07-28"),
]
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


class Client(NamedTuple):
    """A client, which is a process for each order of calls."""

    name: str
    programs: Path


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


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs, where those for Node find their packages."""
    folder = tmp_path_factory.mktemp("programs")
    for one in PROGRAMS.glob("*.*"):
        shutil.copy(one, folder)
    (folder / "node_modules").symlink_to(NODE_MODULES)
    return folder


@pytest.fixture(scope="module")
def servers(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Tools]]:
    """The servers by name, each started once."""
    with ExitStack() as stack:
        yield cache(lambda name: stack.enter_context(running(name, programs, tmp_path_factory.mktemp("tools"))))


@contextmanager
def running(name: str, programs: Path, folder: Path) -> Iterator[Tools]:
    interpreter, suffix, *generation = SERVERS[name]
    with socket.create_server(("127.0.0.1", 0), backlog=64) as sock, (folder / "log").open("wb") as output:
        command = [interpreter, programs / f"server.{suffix}", str(sock.fileno()), folder / "runs", *generation]
        process = subprocess.Popen(command, pass_fds=[sock.fileno()], stdout=output, stderr=output)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    try:
        yield Tools(name, url, folder / "runs")
    finally:
        process.kill()
        process.wait()


@pytest.fixture(params=PAIRS, ids=" for ".join)
def pair(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A server and a client."""
    pair: tuple[str, str] = request.param
    return pair


@pytest.fixture
async def tools(pair, servers, tmp_path: Path, fork, valkey) -> Tools:
    tools: Tools = servers(pair[0])
    (tmp_path / "rules.toml").write_text(RULES)
    tools.proxy = await fork(tools, valkey.url, RULES_FILE="rules.toml")
    tools.forget()
    return tools


@pytest.fixture
def client(pair, programs: Path) -> Client:
    return Client(pair[1], programs)


def call(tool: str, key: str | None = None, **more: Any) -> dict[str, Any]:
    options = {name: more.pop(name) for name in ("timeout", "progress") if name in more}
    return {"tool": tool, "key": key, "arguments": more or {"amount": 1}, **options}


async def calls(client: Client, url: str, *some: dict[str, Any], **order: Any) -> list[dict[str, Any]]:
    """Return what calls by a client of its own came to."""
    (interpreter, suffix, *generation), mode = CLIENT[client.name]
    text = json.dumps({"url": url, "mode": mode, "calls": some, **order})
    command = [interpreter, client.programs / f"client.{suffix}", *generation, text]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
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
    [left] = await calls(client, tools.at, {**one, "timeout": 0.4}, pause=1.5)
    assert left["timeout"]
    # `notifications/cancelled` reaches the server, and is not undone. That of TypeScript says no more about the call.
    is_named = client.name in NAMES_IT or (tools.name, client.name) == ("mcp 1", "2026-07-28")
    assert tools.runs == ["slow begins", "slow is cancelled" if is_named else "slow ends"]
    [again] = await calls(client, tools.at, one)
    assert again.get("problem") == "outcome_unknown" if is_named else again["text"] == "done"
    tools.forget()
    [left] = await calls(client, tools.at, {**call("slow", seconds=5), "timeout": 0.4}, pause=1)
    assert left["timeout"]
    if client.name != "mcp 1":  # which says nothing, and whose protocol takes closing for no cancellation
        assert tools.runs == ["slow begins", "slow is cancelled"]


@pytest.mark.parametrize("pair", [("mcp 2", ""), ("npm 2", "")])
async def test_the_example_calls_a_real_tool(tools, tmp_path):
    """The client of config/agents, which has no SDK, calls a tool on the wire of 2026-07-28, and again with its key."""
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
