"""Runs one client through every scenario of the table, with a proxy and an API of its own."""

import asyncio
import json
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import Valkey
from tests.parts import Received
from tests.real.browsers import Browser, Chromium, Firefox
from tests.real.clients.api import Api, answer_of
from tests.real.clients.clients import BROWSERS, Client
from tests.real.clients.way import Way
from tests.real.parts import CLIENTS, NODE_MODULES
from tests.zygote import Forked, Zygote

PROGRAMS = Path(__file__).parent / "programs"
# A lease of 2 s, so that a test does not wait for the default of 10 s after a kill.
SETTINGS = {"RULES_FILE": "rules.toml", "LEASE_MS": 2000}
PATIENT_S, IMPATIENT_S = 30.0, 2.0
# Longer than a client that was told to wait 2 s goes on asking.
LONGEST_S = 12.0


# What the page of a browser does.
FETCH = """
const order = ORDER;
try {
  const headers = { "Content-Type": "application/json", "Idempotency-Key": order.key };
  const [body, signal] = [JSON.stringify({ prompt: order.prompt }), AbortSignal.timeout(1000 * order.timeout_s)];
  const response = await fetch("/charges", { method: "POST", headers, body, signal });
  return response.ok ? await response.json() : { error: "Response", status: response.status };
} catch (error) { return { error: error.name, status: null }; }
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """What became of one call: how often it was executed, and what its caller saw."""

    executions: int
    seen: str

    def __str__(self) -> str:
        return f"{self.executions}: {self.seen}"


class Program:
    """The client as a process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def said(self) -> dict[str, Any]:
        assert self.process.stdout
        line = await asyncio.wait_for(self.process.stdout.readline(), 180)
        return json.loads(line)  # type: ignore[no-any-return]

    async def call(self, order: dict[str, Any]) -> dict[str, Any]:
        """Let it make one call, and return its result."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        return await self.said()


class Page:
    """A page in a browser, whose script makes the calls."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        browser.call("SetTimeouts", script=180_000)

    async def said(self) -> dict[str, Any]:
        return {"version": self._browser.session["capabilities"]["browserVersion"]}

    async def call(self, order: dict[str, Any]) -> dict[str, Any]:
        """Open the page where the call goes to, and let it make one."""
        return await asyncio.to_thread(self._call, order)

    def _call(self, order: dict[str, Any]) -> dict[str, Any]:
        self._browser.go(f"{order['url']}/page")
        self._browser.await_text("h1", "Page")
        found: dict[str, Any] = self._browser.evaluate(FETCH.replace("ORDER", json.dumps(order)))
        return found


@asynccontextmanager
async def started_browser(name: str) -> AsyncIterator[Page]:
    """Start a browser."""
    browser = await asyncio.to_thread({"chromium": Chromium, "firefox": Firefox}[name])
    try:
        yield Page(browser)
    finally:
        await asyncio.to_thread(browser.close)


@asynccontextmanager
async def started(client: Client, broker: str, folder: Path) -> AsyncIterator[Program]:
    """Start a client, with a Redis on the unix socket `broker` for its tasks."""
    if client.program[0].endswith(".mjs"):
        for one in PROGRAMS.glob("*.mjs"):
            shutil.copy(one, folder)
        (folder / "node_modules").symlink_to(NODE_MODULES)
        command = ["node", str(folder / client.program[0])]
    else:
        command = [str(CLIENTS), "-W", "ignore", str(PROGRAMS / client.program[0]), *client.program[1:]]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "BROKER": broker}
    pipe = asyncio.subprocess.PIPE
    with (folder / "client.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=log, env=environment)
    try:
        yield Program(process)
    finally:
        assert process.stdin
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), 20)
        except TimeoutError:
            process.kill()
            await process.wait()


class Bench:
    """One client, its proxy and its API."""

    def __init__(self, client: Client, program: Program | Page, api: Api, proxy: Forked) -> None:
        self.client, self.program, self.api, self.proxy = client, program, api, proxy

    async def _called(self, prompt: str, way: Way, timeout_s: float = PATIENT_S) -> Cell:
        """Return what the caller sees of one call. Where it has a key, it calls again after an error."""
        key = f"{self.proxy.folder.name}-{prompt}" if self.client.key else None
        order = {"prompt": prompt, "url": way.url, "key": key, "stream": self.client.streams, "timeout_s": timeout_s}
        first = await self.program.call(order)
        seen = _seen(first)
        if "answer" not in first and key:
            seen += f"; again: {_seen(await self.program.call(order | {'timeout_s': PATIENT_S}))}"
        return Cell(self.api.executions, seen)

    async def answer_lost(self) -> Cell:
        """The connection breaks when the answer is on its way."""
        self.api.begin("lost")
        async with Way(self.proxy.port, lost=True) as way:
            return await self._called("lost", way)

    async def cut(self) -> Cell:
        """The connection breaks in the middle of the answer."""
        self.api.begin("cut")
        async with Way(self.proxy.port, cut=True) as way:
            return await self._called("cut", way)

    async def slow(self) -> Cell:
        """The API takes longer than the client waits: until a retry waits for it, or the client has given up."""
        call: asyncio.Task[Cell]

        async def hold(number: int, _: Received) -> None:
            async with asyncio.timeout(LONGEST_S):
                while number == 1 and not call.done() and not await asyncio.to_thread(self.proxy.metric, "waiting"):
                    await asyncio.sleep(0.1)

        self.api.begin("slow", hold)
        async with Way(self.proxy.port) as way:
            call = asyncio.create_task(self._called("slow", way, IMPATIENT_S))
            return await call

    async def killed(self) -> Cell:
        """The proxy is killed while the API works, and started again."""

        async def kill(number: int, _: Received) -> None:
            if number == 1:
                await asyncio.to_thread(self.proxy.kill)
                await self.proxy.begin()

        self.api.begin("killed", kill)
        async with Way(self.proxy.port) as way:
            return await self._called("killed", way)

    async def worker_killed(self) -> Cell:
        """The process that runs the task is killed while the API works."""

        async def kill(number: int, got: Received) -> None:
            if number == 1:
                os.kill(int(got.header("x-worker-pid")[0]), signal.SIGKILL)
                await asyncio.sleep(0.5)

        self.api.begin("worker", kill)
        async with Way(self.proxy.port) as way:
            return await self._called("worker", way)


SCENARIOS = {
    "answer lost": Bench.answer_lost,
    "slower than the time-out": Bench.slow,
    "cut mid-stream": Bench.cut,
    "proxy killed": Bench.killed,
    "worker killed": Bench.worker_killed,
}


def _seen(result: dict[str, Any]) -> str:
    if "answer" in result:
        number = next((number for number in range(1, 9) if result["answer"] == answer_of(number)), None)
        assert number, result
        return "its answer" if number == 1 else f"the answer of execution {number}"
    return f"`{result['error']}`" + (f" {result['status']}" if result["status"] else "")


@asynccontextmanager
async def bench(client: Client, zygote: Zygote, store: Valkey, folder: Path) -> AsyncIterator[tuple[Bench, str]]:
    """Start all that one client needs. Yields it, and the client's version."""
    (folder / "rules.toml").write_text(f'[[rule]]\nname = "clients"\npreset = "{client.preset}"\n')
    api = Api()
    await api.start()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = SETTINGS | {"LISTEN": f"127.0.0.1:{port}", "NAMESPACE": folder.name}
    proxy = Forked(zygote, api.url, store.url, folder, settings)
    try:
        await proxy.begin()
        is_browser = client.group == BROWSERS
        start = started_browser(client.program[0]) if is_browser else started(client, store.socket, folder)
        async with start as program:
            yield Bench(client, program, api, proxy), (await program.said())["version"]
    finally:
        proxy.close()
        await api.close()
