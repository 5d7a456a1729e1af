"""A login of a browser: a signed cookie that names its token, and ends with it."""

import hmac
import secrets
import time
from dataclasses import dataclass
from hashlib import sha256

from aiohttp import web
from itsdangerous import BadData, TimestampSigner

from oncegate.admin.tokens import Token, Tokens

COOKIE = "oncegate_session"
# A browser takes a cookie of this name only over TLS, and from this very host (RFC 6265bis, section 4.1.3.2).
SECURE_COOKIE = f"__Host-{COOKIE}"


@dataclass(frozen=True, slots=True)
class Session:
    """A session: its token, and its own name of 32 characters."""

    token: Token
    name: str

    @property
    def form_token(self) -> str:
        return hmac.digest(self.token.session_key, f"form {self.name}".encode(), sha256).hex()


class Sessions:
    """Begins, finds and ends sessions. Nothing is kept of one but its end: a restart ends none."""

    def __init__(self, seconds: float) -> None:
        self._seconds = int(seconds)
        # The names of sessions that were ended, each with the time from which nobody needs it.
        self._ended: dict[str, float] = {}

    def begin(self, response: web.StreamResponse, token: Token, *, secure: bool) -> None:
        """Give a browser the cookie of a new session."""
        value = _signer(token).sign(f"{token.id}.{secrets.token_hex(16)}").decode()
        response.set_cookie(
            SECURE_COOKIE if secure else COOKIE,
            value,
            max_age=self._seconds,
            path="/",
            httponly=True,
            samesite="Strict",
            secure=secure,
        )

    def find(self, request: web.Request, tokens: Tokens) -> Session | None:
        """Return the session that a request belongs to, if it has not ended and its token still exists."""
        value = _cookie(request)
        token_id, _, rest = value.partition(".")
        token = tokens.with_id(token_id)
        if token is None:
            return None
        try:
            _signer(token).unsign(value, max_age=self._seconds)
        except BadData:
            return None
        name = rest.partition(".")[0]
        return None if name in self._ended else Session(token, name)

    def end(self, session: Session, response: web.StreamResponse) -> None:
        """End a session also for those who have a copy of its cookie."""
        now = time.monotonic()
        self._ended = {name: end for name, end in self._ended.items() if end > now}
        self._ended[session.name] = now + self._seconds
        for name, secure in ((COOKIE, False), (SECURE_COOKIE, True)):
            response.del_cookie(name, path="/", secure=secure, httponly=True, samesite="Strict")


def _signer(token: Token) -> TimestampSigner:
    return TimestampSigner(token.session_key, salt="session", key_derivation="hmac", digest_method=sha256)


def _cookie(request: web.Request) -> str:
    """Return the cookie's value, empty for none and for several, of which one may be a stranger's."""
    pairs = [pair.strip().partition("=") for field in request.headers.getall("Cookie", []) for pair in field.split(";")]
    for wanted in (SECURE_COOKIE, COOKIE):
        if values := [value for name, _, value in pairs if name == wanted]:
            return values[0] if len(values) == 1 else ""
    return ""
