"""Who asks: by a token, a session, a proxy that authenticates people, a client certificate, or from the machine."""

import hmac
import secrets
from collections.abc import Iterable
from hashlib import sha256
from typing import Any

from aiohttp import web

from oncegate.admin.attempts import Attempts
from oncegate.admin.origins import is_local, peer
from oncegate.admin.roles import Refused, Role, Visitor, Way
from oncegate.admin.sessions import Sessions
from oncegate.admin.tokens import Token, Tokens
from oncegate.settings.settings import Settings

_NO_WAY = (
    "Set ONCEGATE_ADMIN_TOKENS_FILE to give roles. Without it, only this machine itself reads this page, at a loopback "
    "address and under the name localhost."
)
_OTHER_WAYS = "A role comes from a proxy of ONCEGATE_ADMIN_USER_PROXIES, or from a client certificate."
_NO_TOKEN = "Log in at /login, or send a token: Authorization: Bearer TOKEN."


class Access:
    """Knows the tokens, and the roles of names."""

    def __init__(self, settings: Settings, tokens: Tokens, log: Any) -> None:
        self._settings, self.log = settings, log
        self.tokens = tokens
        self.sessions = Sessions(settings.admin_session_s)
        self._attempts = Attempts()
        # The same in every replica, one of which shows a form and another gets it.
        shared = settings.secret.get_secret_value().encode()
        self._form_key = hmac.digest(shared, b"forms of the admin pages", sha256) if shared else secrets.token_bytes(32)

    def follow(self, tokens: Tokens) -> None:
        """Take the tokens of a file that was read again. Sessions of a token that is gone have ended."""
        self.tokens = tokens

    async def visitor(self, request: web.Request) -> Visitor:
        """Return who sent a request. Raises Refused if nothing shows it."""
        if (name := self._user(request)) is not None:
            return self._named(Way.PROXY, [name])
        if "Authorization" in request.headers:
            token = await self.token(request, _bearer(request))
            return Visitor(token.name, token.role, Way.BEARER)
        if session := self.sessions.find(request, self.tokens):
            return Visitor(session.token.name, session.token.role, Way.SESSION, session.form_token)
        if names := _certified(request):
            return self._named(Way.CERTIFICATE, names)
        if self._is_forged(request):
            raise Refused(
                403, f"{self._settings.admin_user_header} is accepted from ONCEGATE_ADMIN_USER_PROXIES alone."
            )
        if self._settings.admin_local_view and self._is_local(request):
            return Visitor("loopback", Role.VIEW, Way.LOOPBACK, self._form_token("loopback"))
        if self.tokens:
            raise Refused(401, _NO_TOKEN)
        raise Refused(403, _OTHER_WAYS if self._settings.admin_users else _NO_WAY)

    async def token(self, request: web.Request, text: str) -> Token:
        """Return the token of this text. Raises Refused; each wrong one makes its address wait longer for the next."""
        client = str(peer(request))
        await self._attempts.wait(client)
        if token := self.tokens.find(text):
            return token
        count = self._attempts.note_wrong(client)
        # Ever fewer lines, so that guesses do not fill a disk.
        if count & (count - 1) == 0:
            self.log.warning("admin token refused", client=client, attempts=count)
        raise Refused(401, "This token is not known.")

    # A proxy that authenticates people ...

    def _user(self, request: web.Request) -> str | None:
        """Return the user that a named proxy names. Raises Refused where it names several."""
        users = self._user_fields(request)
        if not users or not self._is_user_proxy(request):
            return None
        if len(users) > 1 or not users[0] or not users[0].isprintable():
            raise Refused(403, f"{self._settings.admin_user_header} must name one user.")
        return users[0]

    def _user_fields(self, request: web.Request) -> list[str]:
        header = self._settings.admin_user_header
        return request.headers.getall(header, []) if header else []

    def _is_forged(self, request: web.Request) -> bool:
        return bool(self._user_fields(request)) and not self._is_user_proxy(request)

    def _is_local(self, request: web.Request) -> bool:
        # Whoever logs people in on the machine passes on what others ask.
        return is_local(request, self._settings.admin_hosts) and not self._is_user_proxy(request)

    def _is_user_proxy(self, request: web.Request) -> bool:
        address = peer(request)
        return address is not None and any(address in network for network in self._settings.admin_user_proxies)

    # Roles of names ...

    def _named(self, way: Way, names: Iterable[str]) -> Visitor:
        """Return the visitor with the highest role of its names. Raises Refused if none has a role."""
        roles = [
            (Role[user.role.upper()], name)
            for name in names
            for user in self._settings.admin_users
            if user.includes(name)
        ]
        if not roles:
            raise Refused(403, f"{', '.join(names)[:200]} has no role in ONCEGATE_ADMIN_USERS.")
        role, name = max(roles)
        return Visitor(name, role, way, self._form_token(f"{way.value} {name}"))

    def _form_token(self, visitor: str) -> str:
        return hmac.digest(self._form_key, visitor.encode("utf-8", "surrogateescape"), sha256).hex()


def _bearer(request: web.Request) -> str:
    """Return the token of the one Authorization field. Raises Refused for another scheme, and for several fields."""
    scheme, _, token = request.headers["Authorization"].partition(" ")
    if len(request.headers.getall("Authorization")) > 1 or scheme.lower() != "bearer":
        raise Refused(401, _NO_TOKEN)
    return token.strip()


def _certified(request: web.Request) -> list[str]:
    """Return the names in the client's certificate, which the TLS handshake has verified."""
    certificate = request.transport.get_extra_info("peercert") if request.transport else None
    if not certificate:
        return []
    subject = [value for part in certificate.get("subject", ()) for kind, value in part if kind == "commonName"]
    others = [value for kind, value in certificate.get("subjectAltName", ()) if kind in ("DNS", "email", "URI")]
    return [name for name in (*subject, *others) if name.isprintable()]
