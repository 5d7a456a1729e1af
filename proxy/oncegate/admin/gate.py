"""Lets a request to a route of the admin listener, or not: each route names the role that it needs."""

import hmac
import secrets
from collections.abc import Awaitable, Callable
from hashlib import sha256
from ipaddress import ip_address

from aiohttp import web

from oncegate.admin.roles import NOBODY, Role, Route, Visitor
from oncegate.settings.addresses import split_authority

FORM_TOKEN = "form_token"
# What a proxy adds to a request that it passes on. Its own address says nothing of who asked then.
_PASSED_ON = ("Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP")


class Refused(Exception):
    """Why a request gets nowhere: the status and a sentence."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Gate:
    """Knows who asks, and whether they may."""

    def __init__(self) -> None:
        self._form_key = secrets.token_bytes(32)

    def guarded(self, route: Route) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """Return the handler of a route for those who may use it. Others get a refusal."""

        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                visitor = NOBODY if route.role is Role.OPEN else await self._admit(request, route)
            except Refused as refused:
                return web.Response(text=f"{refused.reason}\n", status=refused.status)
            return await route.handler(request, visitor)

        return handle

    async def _admit(self, request: web.Request, route: Route) -> Visitor:
        """Return who asks. Raises Refused."""
        if not _is_local(request):
            raise Refused(403, "This page needs a role; set ONCEGATE_ADMIN_TOKENS_FILE.")
        visitor = self._visitor("loopback", Role.VIEW)
        if visitor.role < route.role:
            raise Refused(403, f"This needs the role {route.role.name.lower()}; you have {visitor.role.name.lower()}.")
        if request.method not in ("GET", "HEAD"):
            await _check_form(request, visitor)
        return visitor

    def _visitor(self, name: str, role: Role) -> Visitor:
        token = hmac.digest(self._form_key, name.encode(), sha256).hex()
        return Visitor(name, role, token)


async def _check_form(request: web.Request, visitor: Visitor) -> None:
    """Raise Refused unless a form of this visitor's own page sent the request."""
    given = (await request.post()).get(FORM_TOKEN)
    if not isinstance(given, str) or not hmac.compare_digest(given.encode(), visitor.form_token.encode()):
        raise Refused(403, "The form is too old, or not from this page; load the page again.")


def _is_local(request: web.Request) -> bool:
    """Return whether this machine itself asked, under a name of its own.

    A web page can reach a loopback address under a name of its own that resolves to it (DNS rebinding).
    """
    if any(name in request.headers for name in _PASSED_ON):
        return False
    peer = request.transport.get_extra_info("peername") if request.transport else None
    return peer is not None and _is_loopback(peer[0]) and _is_loopback(_host(request))


def _host(request: web.Request) -> str:
    hosts = request.headers.getall("Host", [])
    try:
        return split_authority(hosts[0])[0].strip("[]") if len(hosts) == 1 else ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        return host.lower() == "localhost"
    # A listener of both families sees clients of IPv4 as ::ffff:127.0.0.1.
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
