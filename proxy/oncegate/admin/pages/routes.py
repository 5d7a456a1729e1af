"""All pages with the role that each needs, and what they watch."""

import asyncio
from collections.abc import AsyncIterator

from aiohttp import web

from oncegate.admin.pages.deciding import deciding_routes
from oncegate.admin.pages.explaining import explaining_routes
from oncegate.admin.pages.frame import badge
from oncegate.admin.pages.now import now_part, now_routes
from oncegate.admin.pages.probing import probing_routes
from oncegate.admin.pages.record import record_routes
from oncegate.admin.pages.unknown import unknown_routes
from oncegate.admin.parts import AdminParts
from oncegate.admin.roles import Role, Route, Visitor
from oncegate.admin.watching.live import Streams
from oncegate.admin.watching.overview import Look, Overview


class Pages:
    """The routes of all pages. `life` runs what they watch while the application does."""

    def __init__(self, parts: AdminParts) -> None:
        self._parts, self.overview, self.streams = parts, Overview(parts), Streams()
        # The parts of pages at the last look, made once for all who watch.
        self._shown: tuple[Look | None, dict[str, str]] = None, {}
        watched = parts, self.overview
        self.routes = [
            *now_routes(*watched),
            *unknown_routes(*watched),
            *deciding_routes(*watched),
            *record_routes(*watched),
            *probing_routes(*watched),
            *explaining_routes(*watched),
            Route("GET", "/events", Role.VIEW, self._events),
        ]

    async def _events(self, request: web.Request, _visitor: Visitor) -> web.StreamResponse:
        shows_now = request.query.get("part") == "now"

        async def page_parts() -> dict[str, str]:
            look = await self.overview.look()
            if self._shown[0] is not look:
                now = now_part(self._parts.settings, self.overview)
                self._shown = look, {"part-badge": badge(self.overview), "part-now": now}
            parts = self._shown[1]
            return parts if shows_now else {"part-badge": parts["part-badge"]}

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
