"""The main job as a short story: a slow upstream, a client that gives up too early, and its retries."""

import asyncio
import contextlib
import json
import os
import socket
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
from aiohttp import web

CHARGE_S = 2.0  # how long the upstream takes to charge
PATIENCE_S = 1.0  # how long the client waits for it
WORDS = ("Money", " moves", " once,", " however", " often", " you", " ask", " for", " it.")
WORD_S = 0.15
START_S = 15.0

# The upstream ...


def demo_upstream() -> web.Application:
    """Return an API that charges cards and writes texts, slowly, and counts what it does."""
    done = {"charges": 0, "texts": 0}

    async def charge(request: web.Request) -> web.Response:
        order = await request.json()
        await asyncio.sleep(CHARGE_S)
        done["charges"] += 1
        return web.json_response({"id": f"ch_{done['charges']}", "amount": order["amount"]}, status=201)

    async def complete(request: web.Request) -> web.StreamResponse:
        await request.read()
        done["texts"] += 1
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        for word in WORDS:
            await answer.write(f"data: {json.dumps(word)}\n\n".encode())
            await asyncio.sleep(WORD_S)
        return answer

    async def executions(_: web.Request) -> web.Response:
        return web.json_response(done)

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


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextlib.asynccontextmanager
async def _proxy(upstream: str, folder: Path) -> AsyncIterator[str]:
    """Run `oncegate serve` on the embedded store, and stop it at the end."""
    url, admin = (f"127.0.0.1:{_free_port()}" for _ in range(2))
    env = {name: value for name, value in os.environ.items() if not name.startswith("ONCEGATE_")}
    env |= {
        "ONCEGATE_UPSTREAM": upstream,
        "ONCEGATE_LISTEN": url,
        "ONCEGATE_ADMIN_LISTEN": admin,
        "ONCEGATE_DATA_DIR": str(folder / "store"),
        "ONCEGATE_LOG_LEVEL": "warning",
    }
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "oncegate", "serve", env=env)
    try:
        await _until_ready(f"http://{admin}/readyz", process)
        yield f"http://{url}"
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _until_ready(url: str, process: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(START_S), aiohttp.ClientSession() as session:
        while process.returncode is None:
            with contextlib.suppress(aiohttp.ClientConnectionError):
                async with session.get(url) as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.02)
    raise RuntimeError("the proxy did not start")


# The story ...


class Teller:
    """Plays the client against a proxy, tells what happens, and keeps what went wrong."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self._url = session, url
        self.wrong: list[str] = []

    def _expect(self, what: str, holds: bool) -> None:
        print(f"   {'ok ' if holds else 'NOT'} {what}")
        if not holds:
            self.wrong.append(what)

    async def _executions(self) -> dict[str, int]:
        async with self._session.get(f"{self._url}/executions") as answer:
            return await answer.json()  # type: ignore[no-any-return]

    async def _charge(self, key: str, seconds: float, **headers: str) -> tuple[int, str, str]:
        """Return status, body and what the proxy says it did."""
        timeout = aiohttp.ClientTimeout(total=seconds)
        fields = {"Idempotency-Key": key, **headers}
        order = {"amount": 2000}
        async with self._session.post(f"{self._url}/v1/charges", json=order, headers=fields, timeout=timeout) as answer:
            return answer.status, await answer.text(), answer.headers["Oncegate-Status"]

    async def impatient(self) -> None:
        """Tell how a client that gives up too early is charged once."""
        print(f"\n1. A charge takes {CHARGE_S:g} s; the client gives up after {PATIENCE_S:g} s and tries again.")
        before, key = await self._executions(), str(uuid.uuid4())
        try:
            await self._charge(key, PATIENCE_S)
        except TimeoutError:
            print("      try 1: timed out. Was the card charged? The client cannot know.")
        status, body, how = await self._charge(key, PATIENCE_S)
        print(f"      try 2: {status} ({json.loads(body)['title'].lower()})")
        await asyncio.sleep(CHARGE_S - PATIENCE_S)
        status, body, how = await self._charge(key, 10, Prefer="wait=10")
        print(f"      try 3: {status} {body} ({how})")
        after = await self._executions()
        self._expect("three tries, one charge", after["charges"] - before["charges"] == 1 and how == "replayed")

    async def crowd(self) -> None:
        """Tell how ten duplicates at once are one execution."""
        print("\n2. Ten duplicates at once, each ready to wait for the original (Prefer: wait=10).")
        before, key = await self._executions(), str(uuid.uuid4())
        answers = await asyncio.gather(*[self._charge(key, 10, Prefer="wait=10") for _ in range(10)])
        after = await self._executions()
        for how in ("executed", "replayed"):
            print(f"      {sum(answer[2] == how for answer in answers):2} {how}")
        self._expect("ten answers, all the same", len({answer[:2] for answer in answers}) == 1)
        self._expect("one charge", after["charges"] - before["charges"] == 1)

    async def stream(self) -> None:
        """Tell how a stream that is cut off is paid once and replayed whole."""
        print("\n3. A streamed answer (as LLMs give them); the client's connection breaks in the middle.")
        before, key = await self._executions(), str(uuid.uuid4())
        headers = {"Idempotency-Key": key, "Prefer": "wait=10"}
        url = f"{self._url}/v1/completions"
        async with self._session.post(url, data=b"{}", headers=headers) as answer:
            begun = await answer.content.readuntil(b"\n\n")
        print(f"      try 1: {begun.decode().strip()} ... and the line goes dead")
        await asyncio.sleep(WORD_S)
        async with self._session.post(url, data=b"{}", headers=headers) as answer:
            whole, how = await answer.text(), answer.headers["Oncegate-Status"]
        text = "".join(json.loads(line[6:]) for line in whole.split("\n\n") if line)
        print(f"      try 2: {text!r} ({how})")
        after = await self._executions()
        self._expect("the whole text", text == "".join(WORDS) and how == "replayed")
        self._expect("written and paid once", after["texts"] - before["texts"] == 1)


async def _tell(url: str) -> int:
    async with aiohttp.ClientSession() as session:
        teller = Teller(session, url)
        await teller.impatient()
        await teller.crowd()
        await teller.stream()
    print(f"\n{'NOT as promised: ' + '; '.join(teller.wrong) if teller.wrong else 'Every job was done exactly once.'}")
    return 1 if teller.wrong else 0


async def _run(proxy_url: str | None) -> int:
    if proxy_url is not None:
        return await _tell(proxy_url)
    runner, port = await _listen("127.0.0.1", 0)
    try:
        with tempfile.TemporaryDirectory(prefix="oncegate-") as folder:
            async with _proxy(f"http://127.0.0.1:{port}", Path(folder)) as url:
                return await _tell(url)
    finally:
        await runner.cleanup()


def run(proxy_url: str | None) -> int:
    """Tell the story on a proxy of its own, or on a running one; return 0 where all went as promised."""
    return asyncio.run(_run(proxy_url))
