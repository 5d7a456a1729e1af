"""The first page: whether the proxy is ready, and what an operator should look at."""

from aiohttp import web

from oncegate.admin.parts import AdminParts
from oncegate.admin.roles import Role, Route, Visitor
from oncegate.admin.templates import page


def now_routes(parts: AdminParts) -> list[Route]:
    """Return the route of the page."""

    async def now(_: web.Request, visitor: Visitor) -> web.Response:
        return page(visitor, "now.html", reasons=await parts.not_ready_reasons(), notices=await parts.notices())

    return [Route("GET", "/", Role.VIEW, now)]
