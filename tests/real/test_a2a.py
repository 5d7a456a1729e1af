"""A2A with the real SDKs of Python and JavaScript against an agent made with that of Python.

An answer is lost, and the application sends its message again with the same `messageId`: the agent works once.
"""

import asyncio
import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.parts import abort
from tests.real.parts import CLIENTS, INSTALLED, NODE_MODULES
from tests.zygote import Forked

pytestmark = [INSTALLED, pytest.mark.timeout(120)]
PROGRAMS = Path(__file__).parent / "agents"
# The client's SDK, and the version of the protocol, whose methods have other names in 0.3.
SENDERS = [("py", "1.0"), ("py", "0.3"), ("mjs", "1.0")]
RULES = '[[rule]]\nname = "agent"\npath = "/a2a"\npreset = "a2a"\n'


class Agent:
    """An agent as a process, and in each test the proxy before it."""

    proxy: Forked

    def __init__(self, url: str, log: Path) -> None:
        self.url, self._log = url, log

    @property
    def work(self) -> list[str]:
        """What it was told to do."""
        return self._log.read_text().splitlines() if self._log.exists() else []

    def forget(self) -> None:
        self._log.write_text("")


@pytest.fixture(scope="module")
def one_agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    folder = tmp_path_factory.mktemp("agent")
    for one in PROGRAMS.glob("a2a*"):
        shutil.copy(one, folder)
    (folder / "node_modules").symlink_to(NODE_MODULES)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as sock, (folder / "log").open("wb") as output:
        command = [CLIENTS, folder / "a2a_server.py", str(sock.fileno()), folder / "work"]
        process = subprocess.Popen(command, pass_fds=[sock.fileno()], stdout=output, stderr=output)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    yield Agent(url, folder / "work")
    process.kill()
    process.wait()


@pytest.fixture
async def agent(one_agent: Agent, tmp_path: Path, fork, valkey) -> Agent:
    (tmp_path / "rules.toml").write_text(RULES)
    one_agent.proxy = await fork(one_agent, valkey.url, RULES_FILE="rules.toml", LEASE_MS=3000)
    one_agent.forget()
    return one_agent


@pytest.fixture(params=SENDERS, ids=" ".join)
def sender(request: pytest.FixtureRequest) -> tuple[str, str]:
    sender: tuple[str, str] = request.param
    return sender


@pytest.fixture(params=[True, False], ids=["stream", "send"])
def stream(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def message(key: str, text: str, **more: Any) -> dict[str, Any]:
    return {"id": key, "text": text, **more}


class Sender:
    """A client, which is a process for each order of messages."""

    def __init__(self, agent: Agent, kind: tuple[str, str], stream: bool) -> None:
        (self._suffix, self._version), self._stream = kind, stream
        self._agent, self._folder = agent, agent._log.parent

    async def send(self, *messages: dict[str, Any], port: int | None = None) -> list[dict[str, Any]]:
        """Send messages, through another port than the proxy's if that is given."""
        url = f"http://127.0.0.1:{port or self._agent.proxy.port}/a2a"
        order = {"url": url, "version": self._version, "stream": self._stream, "messages": messages}
        interpreter = CLIENTS if self._suffix == "py" else "node"
        process = await asyncio.create_subprocess_exec(
            interpreter, self._folder / f"a2a_client.{self._suffix}", json.dumps(order),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        async with asyncio.timeout(60):
            output, errors = await process.communicate()
        assert output, errors.decode()
        return json.loads(output)  # type: ignore[no-any-return]


class Breaking:
    """A relay to the proxy that breaks once: instead of the first bytes of an answer that have `mark`."""

    def __init__(self, port: int, mark: bytes) -> None:
        self._proxy_port, self._mark, self.broken = port, mark, False
        self._tasks: set[asyncio.Task[None]] = set()

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
        there, back = await asyncio.open_connection("127.0.0.1", self._proxy_port)
        out = asyncio.create_task(self._out(reader, back))
        with suppress(OSError, asyncio.CancelledError):
            while data := await there.read(65536):
                if not self.broken and self._mark in data:
                    self.broken = True
                    abort(writer)
                    break
                writer.write(data)
                await writer.drain()
        out.cancel()
        back.close()
        writer.close()

    async def _out(self, reader: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                back.write(data)
                await back.drain()


async def test_a_message_whose_answer_is_lost(agent, sender, stream):
    """The second try gets the answer to the first one, under its own id; another message is worked on."""
    client = Sender(agent, sender, stream)
    async with Breaking(agent.proxy.port, b"done: slow pay") as port:
        [lost] = await client.send(message("lost", "slow pay"), port=port)
    assert lost["error"]
    first, again, other = await client.send(
        message("lost", "slow pay"), message("lost", "slow pay"), message("other", "slow pay")
    )
    assert first == again
    assert first["texts"] == other["texts"] == ["begun: slow pay", "done: slow pay"]
    assert first["tasks"] != other["tasks"]
    assert agent.work == ["slow pay"] * 2


async def test_a_message_that_is_sent_again_while_the_agent_works(agent, sender, stream):
    """The second try waits for the first one, and gets its answer. Another text under the same id is refused."""
    client = Sender(agent, sender, stream)
    left, again, reused = await client.send(
        message("early", "slow pay", timeout=0.4), message("early", "slow pay"), message("early", "refund")
    )
    assert left["timeout"]
    assert again["texts"] == ["begun: slow pay", "done: slow pay"]
    assert "key was used for another request" in reused["error"]
    assert agent.work == ["slow pay"]
