"""The pages of the admin listener for a visitor of one role, on a real store, and keys for an operator to decide."""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import ClientResponse, ClientSession, web

from oncegate.admin.pages.routes import Pages
from oncegate.admin.parts import AdminParts, at_once
from oncegate.admin.roles import Role, Visitor, Way
from oncegate.observe.metrics import Metrics
from oncegate.store.kept import Kept
from oncegate.store.record_view import RecordView
from oncegate.store.store import Store
from tests.admin_parts import admin_parts
from tests.stores import PATIENCE_S, Claim, claim, key

FORM_TOKEN = "0123"


class Log:
    """Keeps the lines of a log."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def warning(self, event: str, **facts: Any) -> None:
        self.lines.append({"event": event, **facts})


class Site:
    """The pages as one visitor gets them. `html`: of the last response."""

    def __init__(self, session: ClientSession, base: str, parts: AdminParts, pages: Pages) -> None:
        self._session, self._base, self.parts, self.pages = session, base, parts, pages
        self.log: Log = parts.log
        self.html, self.status, self.url = "", 0, ""

    async def get(self, path: str) -> str:
        async with self._session.get(f"{self._base}{path}") as response:
            self.html, self.status, self.url = await response.text(), response.status, str(response.url.relative())
        return self.html

    async def post(self, path: str, *fields: tuple[str, str]) -> str:
        """Send a form with these fields, as a page does."""
        data = [("form_token", FORM_TOKEN), *fields]
        async with self._session.post(f"{self._base}{path}", data=data) as response:
            self.html, self.status, self.url = await response.text(), response.status, str(response.url.relative())
        return self.html

    @asynccontextmanager
    async def stream(self, path: str) -> AsyncIterator[AsyncIterator[dict[str, str]]]:
        """Yield the events of a stream, each as the parts of the page that changed."""

        async def events(response: ClientResponse) -> AsyncIterator[dict[str, str]]:
            async for line in response.content:
                if line.startswith(b"data: "):
                    yield json.loads(line.removeprefix(b"data: "))

        async with self._session.get(f"{self._base}{path}") as response:
            yield events(response)

    def values(self, name: str) -> list[str]:
        """Return the values of the fields of this name."""
        return re.findall(rf'name="{name}" value="([^"]*)"', self.html)

    def text(self) -> str:
        """Return the page without its tags."""
        return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", self.html))


@asynccontextmanager
async def site(
    store_url: str, role: Role = Role.OPERATE, metrics: Metrics | None = None, **settings: Any
) -> AsyncIterator[Site]:
    """Serve the pages on a store to a visitor of this role."""
    log = Log()
    counted = {"metrics": at_once(lambda: metrics)} if metrics else {}
    parts: AdminParts = admin_parts({"store_url": store_url, **settings}, log=log, **counted)
    pages, visitor = Pages(parts), Visitor("ana", role, Way.SESSION, FORM_TOKEN)
    app = web.Application()
    app.cleanup_ctx.append(pages.life)
    app.on_shutdown.append(pages.end_streams)

    def serving(handler: Any) -> Any:
        async def handle(request: web.Request) -> web.StreamResponse:
            response: web.StreamResponse = await handler(request, visitor)
            return response

        return handle

    for route in pages.routes:
        if role >= route.role:
            app.router.add_route(route.method, route.path, serving(route.handler))
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.05)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with ClientSession() as session:
            yield Site(session, f"http://127.0.0.1:{runner.addresses[0][1]}", parts, pages)
    finally:
        await runner.cleanup()


async def unknown_key(store: Store, number: int, kept: Kept, reason: str = "lost", status: int = 0) -> RecordView:
    """Return the record of a key whose outcome is unknown."""
    owner = await claim(store, key(number), kept=kept)
    assert isinstance(owner, Claim)
    await store.mark_unknown(owner, reason, PATIENCE_S, status)
    record = await store.records.read(owner.key)
    assert record is not None
    return record
