"""`oncegate demo`: three short scenes with a real proxy, a slow upstream and an impatient client.

The proxy is a process of its own, on a store in a temporary folder.
"""

import asyncio
import contextlib
import json
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import NamedTuple

import aiohttp
from aiohttp import web

from oncegate.commands.demo_store import EMBEDDED, bare_environment, free_port, store_settings
from oncegate.operating.errors import OperatorError

# The upstream takes twice as long for a charge as the client waits for it.
CHARGE_S = 2.0
PATIENCE_S = 1.0
WORDS = ("Money", " moves", " once,", " however", " often", " you", " ask", " for", " it.")
WORD_S = 0.15
START_TIMEOUT_S = 15.0

# The upstream ...


def demo_upstream() -> web.Application:
    """Return a slow API that charges cards and streams texts. `GET /executions` returns how often it did each."""
    executed = {"charges": 0, "texts": 0}

    async def charge(request: web.Request) -> web.Response:
        order = await request.json()
        await asyncio.sleep(CHARGE_S)
        executed["charges"] += 1
        return web.json_response({"id": f"ch_{executed['charges']}", "amount": order["amount"]}, status=201)

    async def complete(request: web.Request) -> web.StreamResponse:
        await request.read()
        executed["texts"] += 1
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for word in WORDS:
            await response.write(f"data: {json.dumps(word)}\n\n".encode())
            await asyncio.sleep(WORD_S)
        return response

    async def executions(_: web.Request) -> web.Response:
        return web.json_response(executed)

    app = web.Application()
    app.router.add_post("/v1/charges", charge)
    app.router.add_post("/v1/completions", complete)
    app.router.add_get("/executions", executions)
    return app


async def _listen(host: str, port: int) -> tuple[web.AppRunner, int]:
    runner = web.AppRunner(demo_upstream(), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, host, port)
    await site.start()
    return runner, runner.addresses[0][1]


def serve_upstream(listen: str) -> int:
    """Serve the demo upstream on `host:port` until stopped."""
    host, _, port = listen.rpartition(":")
    web.run_app(demo_upstream(), host=host, port=int(port), access_log=None)
    return 0


# The proxy ...


@contextlib.asynccontextmanager
async def _proxy(upstream: str, folder: Path, store: Mapping[str, str]) -> AsyncIterator[str]:
    """Run `oncegate serve` on a store, yield its URL, and stop it at the end."""
    # Another process may take a free port before the proxy binds it: the demo then fails to start, and can be
    # repeated.
    public, admin = (f"127.0.0.1:{free_port()}" for _ in range(2))
    env = {
        **bare_environment(),
        **store,
        "ONCEGATE_UPSTREAM": upstream,
        "ONCEGATE_LISTEN": public,
        "ONCEGATE_ADMIN_LISTEN": admin,
        "ONCEGATE_DATA_DIR": str(folder / "store"),
        # Lines for single requests would hide the story.
        "ONCEGATE_LOG_LEVEL": "warning",
    }
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "oncegate", "serve", env=env)
    try:
        await _until_ready(f"http://{admin}/readyz", process)
        yield f"http://{public}"
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _until_ready(url: str, process: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(START_TIMEOUT_S), aiohttp.ClientSession() as session:
        while process.returncode is None:
            # Until the proxy has bound the port, connections are refused.
            with contextlib.suppress(aiohttp.ClientConnectionError):
                async with session.get(url) as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.02)
    raise RuntimeError("the proxy did not start")


# The story ...


class Answer(NamedTuple):
    """A response as the client got it; `outcome` is its Oncegate-Status."""

    status: int
    body: str
    outcome: str


class Story:
    """Plays the client's part against a proxy, prints the scenes, and collects broken promises in `failures`."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self._url = session, url
        self.failures: list[str] = []

    def _expect(self, promise: str, is_kept: bool) -> None:
        print(f"   {'ok ' if is_kept else 'NOT'} {promise}")
        if not is_kept:
            self.failures.append(promise)

    async def _executions(self) -> dict[str, int]:
        async with self._session.get(f"{self._url}/executions") as response:
            return await response.json()  # type: ignore[no-any-return]

    async def _charge(self, key: str, patience_s: float, **headers: str) -> Answer:
        """Ask for a charge. Raises TimeoutError after `patience_s` seconds."""
        timeout = aiohttp.ClientTimeout(total=patience_s)
        fields = {"Idempotency-Key": key, **headers}
        url, order = f"{self._url}/v1/charges", {"amount": 2000}
        async with self._session.post(url, json=order, headers=fields, timeout=timeout) as response:
            return Answer(response.status, await response.text(), response.headers["Oncegate-Status"])

    async def impatient_client(self) -> None:
        """Show that a client that gives up too early and retries is charged once."""
        print(f"\n1. A charge takes {CHARGE_S:g} s; the client gives up after {PATIENCE_S:g} s and tries again.")
        before, key = await self._executions(), str(uuid.uuid4())
        try:
            await self._charge(key, PATIENCE_S)
        except TimeoutError:
            print("      try 1: timed out. Was the card charged? The client cannot know.")
        refused = await self._charge(key, PATIENCE_S)
        print(f"      try 2: {refused.status} ({json.loads(refused.body)['title'].lower()})")
        # By now the upstream has finished the charge of the first try.
        await asyncio.sleep(CHARGE_S - PATIENCE_S)
        replayed = await self._charge(key, 10, Prefer="wait=10")
        print(f"      try 3: {replayed.status} {replayed.body} ({replayed.outcome})")
        charges = (await self._executions())["charges"] - before["charges"]
        self._expect("three tries, one charge", charges == 1 and replayed.outcome == "replayed")

    async def concurrent_duplicates(self) -> None:
        """Show that ten duplicates at the same time are executed once."""
        print("\n2. Ten duplicates at the same time, each ready to wait for the original (Prefer: wait=10).")
        before, key = await self._executions(), str(uuid.uuid4())
        answers = await asyncio.gather(*[self._charge(key, 10, Prefer="wait=10") for _ in range(10)])
        after = await self._executions()
        for outcome in ("executed", "replayed"):
            print(f"      {sum(answer.outcome == outcome for answer in answers):2} {outcome}")
        self._expect("ten responses, all the same", len({(answer.status, answer.body) for answer in answers}) == 1)
        self._expect("one charge", after["charges"] - before["charges"] == 1)

    async def broken_stream(self) -> None:
        """Show that a stream whose client disconnects is paid once and replayed in full."""
        print("\n3. A streamed response, as LLMs send them; the client's connection breaks in the middle.")
        before, key = await self._executions(), str(uuid.uuid4())
        headers = {"Idempotency-Key": key, "Prefer": "wait=10"}
        url = f"{self._url}/v1/completions"
        async with self._session.post(url, data=b"{}", headers=headers) as response:
            first_event = await response.content.readuntil(b"\n\n")
        # aiohttp closes the connection of a response that is not read to its end: the proxy sees the client leave.
        print(f"      try 1: {first_event.decode().strip()} ... and the connection breaks")
        await asyncio.sleep(WORD_S)
        async with self._session.post(url, data=b"{}", headers=headers) as response:
            stream, outcome = await response.text(), response.headers["Oncegate-Status"]
        text = "".join(json.loads(line[6:]) for line in stream.split("\n\n") if line)
        print(f"      try 2: {text!r} ({outcome})")
        after = await self._executions()
        self._expect("the whole text", text == "".join(WORDS) and outcome == "replayed")
        self._expect("written and paid once", after["texts"] - before["texts"] == 1)


async def _play(url: str) -> int:
    """Play all scenes against the proxy at `url`; return 0 if it kept every promise."""
    # Without a credential, a warning would interrupt the story.
    async with aiohttp.ClientSession(headers={"Authorization": "Bearer demo"}) as session:
        story = Story(session, url)
        await story.impatient_client()
        await story.concurrent_duplicates()
        await story.broken_stream()
    failures = "; ".join(story.failures)
    print(f"\n{f'NOT as promised: {failures}' if failures else 'Every job was done, and none of them twice.'}")
    return 1 if failures else 0


async def _run(proxy_url: str | None, store: str) -> int:
    if proxy_url is not None:
        return await _play(proxy_url)
    runner, port = await _listen("127.0.0.1", 0)
    try:
        with tempfile.TemporaryDirectory(prefix="oncegate-") as folder:
            async with (
                store_settings(store) as named,
                _proxy(f"http://127.0.0.1:{port}", Path(folder), named) as url,
            ):
                return await _play(url)
    finally:
        await runner.cleanup()


def run(proxy_url: str | None, store: str = EMBEDDED) -> int:
    """Run the demo on a proxy of its own, or on the running one at `proxy_url`; return the exit code."""
    try:
        return asyncio.run(_run(proxy_url, store))
    except OperatorError as error:
        print(error, file=sys.stderr)
        return 1
