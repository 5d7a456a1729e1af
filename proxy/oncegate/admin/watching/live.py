"""Streams of server-sent events: what has changed on a page, once a second."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress

from aiohttp import web

from oncegate.admin.watching.overview import LOOK_S

# A stream ends before the listener takes it for a slow connection; the browser comes again at once.
STREAM_S = 14.0
COMES_AGAIN_MS = 500
# Watchers beyond these see the page as it was when they loaded it.
MOST_STREAMS = 64
# How long a watcher may take for one event.
WRITE_S = 5.0

# Returns the parts of a page that may have changed, as HTML by the id of their element.
PageParts = Callable[[], Awaitable[dict[str, str]]]


class Streams:
    """The streams that are open. All end at once when the listener does."""

    def __init__(self) -> None:
        self._ended = asyncio.Event()
        self.count = 0

    async def send(self, request: web.Request, page_parts: PageParts) -> web.StreamResponse:
        """Send what changes for STREAM_S, or until the watcher leaves."""
        if self.count >= MOST_STREAMS or self._ended.is_set():
            return web.Response(text="too many watch already\n", status=503, headers={"Retry-After": "10"})
        if request.method == "HEAD":
            return web.Response(content_type="text/event-stream")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        self.count += 1
        try:
            # A watcher may leave, or take nothing.
            with suppress(ConnectionError, TimeoutError):
                await response.prepare(request)
                await response.write(b"retry: %d\n\n" % COMES_AGAIN_MS)
                await self._send(response, page_parts)
        finally:
            self.count -= 1
        return response

    async def _send(self, response: web.StreamResponse, page_parts: PageParts) -> None:
        loop, sent = asyncio.get_running_loop(), dict[str, str]()
        ends_at = loop.time() + STREAM_S
        while loop.time() < ends_at and not self._ended.is_set():
            now = await page_parts()
            changed = {name: html for name, html in now.items() if sent.get(name) != html}
            # Also without a change: the page says that it is live.
            data = json.dumps(changed).encode()
            async with asyncio.timeout(WRITE_S):
                await response.write(b"event: parts\ndata: " + data + b"\n\n")
            sent |= changed
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), LOOK_S)

    def end(self) -> None:
        """End all streams, and refuse others."""
        self._ended.set()
