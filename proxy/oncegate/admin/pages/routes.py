"""All pages with the role that each needs, and what they watch."""

import asyncio
from collections.abc import AsyncIterator

from aiohttp import web

from oncegate.admin.pages.deciding import deciding_routes
from oncegate.admin.pages.explaining import explaining_routes
from oncegate.admin.pages.frame import badge
from oncegate.admin.pages.now import now_part, now_routes
from oncegate.admin.pages.record import record_routes
from oncegate.admin.pages.unknown import unknown_routes
from oncegate.admin.parts import AdminParts
from oncegate.admin.roles import Role, Route, Visitor
from oncegate.admin.watching.live import Streams
from oncegate.admin.watching.overview import Overview


class Pages:
    """The routes of all pages. `life` runs what they watch while the application does."""

    def __init__(self, parts: AdminParts) -> None:
        self._parts, self.overview, self.streams = parts, Overview(parts), Streams()
        watched = parts, self.overview
        self.routes = [
            *now_routes(*watched),
            *unknown_routes(*watched),
            *deciding_routes(*watched),
            *record_routes(*watched),
            *explaining_routes(*watched),
            Route("GET", "/events", Role.VIEW, self._events),
        ]

    async def _events(self, request: web.Request, _visitor: Visitor) -> web.StreamResponse:
        shows_now = request.query.get("part") == "now"

        async def page_parts() -> dict[str, str]:
            await self.overview.look()
            now = {"part-now": now_part(self._parts.settings, self.overview)} if shows_now else {}
            return {"part-badge": badge(self.overview), **now}

        return await self.streams.send(request, page_parts)

    async def life(self, _: web.Application) -> AsyncIterator[None]:
        """Read the metrics while the application runs, and close the store at its end."""
        reading = asyncio.create_task(self.overview.run())
        yield
        reading.cancel()
        await self.overview.close()

    async def end_streams(self, _: web.Application | None = None) -> None:
        """End what would hold the application's end up."""
        self.streams.end()
