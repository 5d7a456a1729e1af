"""The write half of Durable Streams in front of the proxy, and the API behind it: what writers append is its response.

A stream is one request with a key. Its API sends each append as it comes, and closes when the stream is closed.
Reads go to the address of that response, untouched but for one thing: a read without an offset begins at -1.
"""

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field

from aiohttp import ClientError, ClientSession, TCPConnector, web
from yarl import URL

OFFSET, CLOSED = "Stream-Next-Offset", "Stream-Closed"
# What this server adds itself, and what was for one hop.
DROPPED = {"transfer-encoding", "content-length", "connection", "content-encoding"}
SAFE = {"X-Content-Type-Options": "nosniff"}


@dataclass
class Stream:
    """One stream: what it is called at the proxy, and what its API still has to send."""

    content_type: str
    address: str = ""
    size: int = 0
    closed: bool = False
    pieces: asyncio.Queue[bytes | None] = field(default_factory=asyncio.Queue)
    writer: asyncio.Task[None] | None = None


class Shim:
    """Both servers. `proxy`: the URL of the proxy between them, known once the API listens."""

    def __init__(self) -> None:
        self.streams: dict[str, Stream] = {}
        self.proxy = self.streams_url = ""
        self._runners: list[web.AppRunner] = []

    async def start(self) -> None:
        """Listen."""
        # A stream that is open holds a connection.
        self._session = ClientSession(connector=TCPConnector(limit=0), auto_decompress=False)
        urls = []
        for handler in (self._api, self._serve):
            app = web.Application(client_max_size=1 << 26)
            app.router.add_route("*", "/{rest:.*}", handler)
            runner = web.AppRunner(app)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self._runners.append(runner)
            urls.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        self.api, self.streams_url = urls

    async def close(self) -> None:
        for stream in self.streams.values():
            stream.pieces.put_nowait(None)
        await self._session.close()
        for runner in self._runners:
            await runner.cleanup()

    async def _api(self, request: web.Request) -> web.StreamResponse:
        """Answer the request of a stream, as long as that is open."""
        stream = self.streams[(await request.read()).decode()]
        answer = web.StreamResponse(headers={"Content-Type": stream.content_type})
        await answer.prepare(request)
        while (piece := await stream.pieces.get()) is not None:
            await answer.write(piece)
        await answer.write_eof()
        return answer

    # Writers ...

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        path, body = request.path, await request.read()
        stream = self.streams.get(path)
        if request.method == "PUT" and stream is None:
            return await self._create(request, path, body)
        if request.method in ("GET", "HEAD", "OPTIONS"):
            return await self._read(request, stream)
        if stream is None:
            return web.Response(status=404, headers=SAFE)
        if request.method == "PUT":
            is_same = request.headers.get("Content-Type", stream.content_type) == stream.content_type
            return web.Response(status=200 if is_same else 409, headers=SAFE)
        if request.method == "DELETE":
            stream.pieces.put_nowait(None)
            del self.streams[path]
            return web.Response(status=204, headers=SAFE)
        return await self._append(request, stream, body)

    async def _create(self, request: web.Request, path: str, body: bytes) -> web.Response:
        stream = self.streams[path] = Stream(request.headers.get("Content-Type", "application/octet-stream"))
        begun = asyncio.get_running_loop().create_future()
        stream.writer = asyncio.create_task(self._write(stream, path, begun))
        await begun
        return await self._written(stream, request, body, 201)

    async def _write(self, stream: Stream, path: str, begun: "asyncio.Future[None]") -> None:
        """Be the client of the request that is the stream."""
        headers = {"Idempotency-Key": path}
        async with self._session.post(f"{self.proxy}/v1/streams", data=path, headers=headers, timeout=None) as answer:
            stream.address = answer.headers["Link"].partition(">")[0][1:]
            begun.set_result(None)
            # It ends with the test.
            with suppress(ClientError, RuntimeError):
                async for _ in answer.content.iter_any():
                    pass

    async def _append(self, request: web.Request, stream: Stream, body: bytes) -> web.Response:
        is_closing = request.headers.get(CLOSED) == "true"
        if not body and not is_closing:
            return web.Response(status=400, headers=SAFE)
        if stream.closed and not (is_closing and not body):
            return web.Response(status=409, headers={**SAFE, CLOSED: "true"})
        return await self._written(stream, request, body, 204)

    async def _written(self, stream: Stream, request: web.Request, body: bytes, status: int) -> web.Response:
        """Write, and answer once readers see it."""
        if body:
            stream.size += len(body)
            stream.pieces.put_nowait(body)
        if request.headers.get(CLOSED) == "true" and not stream.closed:
            stream.closed = True
            stream.pieces.put_nowait(None)
        while True:
            async with self._session.head(self.proxy + stream.address) as seen:
                # Only a shim may look into an offset.
                if int(seen.headers[OFFSET].partition("_")[0]) >= stream.size and (
                    not stream.closed or seen.headers.get(CLOSED) == "true"
                ):
                    headers = {**SAFE, OFFSET: seen.headers[OFFSET], "Content-Type": stream.content_type}
                    if stream.closed:
                        headers[CLOSED] = "true"
                    if status == 201:
                        headers["Location"] = str(request.url)
                    return web.Response(status=status, headers=headers)
            await asyncio.sleep(0.01)

    # Readers ...

    async def _read(self, request: web.Request, stream: Stream | None) -> web.StreamResponse:
        """Pass a read on."""
        address = "/.oncegate/streams/nobody" if stream is None else stream.address
        query = request.rel_url.raw_query_string
        if "offset" not in request.query and "live" not in request.query and request.method == "GET":
            query = "&".join(filter(None, (query, "offset=-1")))
        headers = {name: value for name, value in request.headers.items() if name.lower() != "host"}
        url = f"{self.proxy}{address}" + (f"?{query}" if query else "")
        # As it is written.
        target = URL(url, encoded=True)
        async with self._session.request(request.method, target, headers=headers, timeout=None) as seen:
            kept = [(name, value) for name, value in seen.headers.items() if name.lower() not in DROPPED]
            answer = web.StreamResponse(status=seen.status, reason=seen.reason)
            for name, value in kept:
                answer.headers.add(name, value)
            if "Content-Length" in seen.headers:
                answer.content_length = int(seen.headers["Content-Length"])
            # The reader may leave.
            with suppress(ConnectionError):
                await answer.prepare(request)
                async for piece in seen.content.iter_any():
                    await answer.write(piece)
                await answer.write_eof()
            return answer
