"""Which page may read a response (the CORS protocol of Fetch, https://fetch.spec.whatwg.org/#http-cors-protocol).

The API's own word counts: what it granted stays, and what it refused is not granted. oncegate speaks where the API says
nothing: in its own answers, in replays to another page, and for an API without CORS code.
"""

from dataclasses import dataclass
from enum import Enum

from oncegate.adaptation.blocks import Lines, members, values, with_members, without
from oncegate.adaptation.origins import Origins

ALLOW_ORIGIN, ALLOW_CREDENTIALS = b"Access-Control-Allow-Origin", b"Access-Control-Allow-Credentials"
EXPOSE_HEADERS = b"Access-Control-Expose-Headers"
_GRANT = frozenset((ALLOW_ORIGIN.lower(), ALLOW_CREDENTIALS.lower()))
# What a script may read: what oncegate says about the request, and what a client has to act on.
EXPOSED = (
    *(
        b"Oncegate-Status",
        b"Oncegate-Key-Id",
        b"Oncegate-Request-Id",
        b"Idempotent-Replayed",
        b"Retry-After",
        b"Link",
        b"Location",
    ),
    b"Preference-Applied",
)


class DecidedBy(Enum):
    """Whose CORS code decides about preflights, and about the responses that the API sends."""

    # The API's, where its responses show that it has some; else oncegate's.
    AUTO = "auto"
    # The API's alone.
    API = "api"
    # Preflights do not reach the API.
    ONCEGATE = "oncegate"


@dataclass(frozen=True, slots=True)
class Cors:
    """The CORS choices of a policy. `key_headers`: where its keys are, which a page may always send. `exposed`: what a
    script may read, as far as oncegate decides about it."""

    origins: Origins
    credentials: bool = False
    decided_by: DecidedBy = DecidedBy.AUTO
    key_headers: tuple[bytes, ...] = ()
    exposed: tuple[bytes, ...] = EXPOSED

    def grant(self, origin: bytes) -> Lines:
        """Return the fields by which a page of a listed origin may read a response."""
        return grant(b"*" if self.origins.any else origin, self.credentials)

    def own(self, origin: bytes) -> Lines:
        """Return the fields of an answer of oncegate's own; `origin` is empty where the request names none."""
        return varying(self._exposing(self.grant(origin)) if origin in self.origins else [])

    def forwarded(self, lines: Lines, origin: bytes) -> Lines:
        """Return the fields of a response that the API sends now."""
        if origin not in self.origins:
            return varying(lines)
        if granted := granted_to(lines):
            return varying(self._exposing(lines) if is_granted(granted, origin) else lines)
        return varying(self._exposing(lines + self.grant(origin)) if self.may_grant(lines) else lines)

    def replayed(self, lines: Lines, origin: bytes) -> Lines:
        """Return the fields of a stored response, which another page may have asked for."""
        kept = replayed_to(lines, origin)
        if origin not in self.origins:
            return varying(kept)
        if granted_to(kept):
            return varying(self._exposing(kept))
        # What the API granted to one page, the operator's list grants to another.
        return varying(
            self._exposing(kept + self.grant(origin)) if granted_to(lines) or self.may_grant(lines) else kept
        )

    def _exposing(self, lines: Lines) -> Lines:
        """Return the fields with those exposed that scripts need."""
        return with_members(lines, EXPOSE_HEADERS, self.exposed)

    def may_grant(self, lines: Lines) -> bool:
        """Return whether oncegate decides about a response in which the API grants nothing to anybody."""
        return self.decided_by is not DecidedBy.API and not shows_cors_code(lines)


def grant(origin: bytes, with_credentials: bool) -> Lines:
    """Return the fields by which a page of an origin, or of any (`*`), may read a response."""
    lines = [(ALLOW_ORIGIN, origin)]
    return [*lines, (ALLOW_CREDENTIALS, b"true")] if with_credentials else lines


def granted_to(lines: Lines) -> list[bytes]:
    """Return the origins to which a response's fields grant it."""
    return values(lines, ALLOW_ORIGIN.lower())


def is_granted(granted: list[bytes], origin: bytes) -> bool:
    """Return whether a page may read a response whose Access-Control-Allow-Origin has these values."""
    return granted in ([b"*"], [origin])


def shows_cors_code(lines: Lines) -> bool:
    """Return whether fields of a response show that code of the API decided about origins.

    Most CORS code says so in a refusal as well: by `Vary: Origin`, or by other fields of the protocol.
    """
    return any(name.lower().startswith(b"access-control-") for name, _ in lines) or b"origin" in members(lines, b"vary")


def replayed_to(lines: Lines, origin: bytes) -> Lines:
    """Return the fields of a stored response without a grant to another origin.

    Pages without an origin are all called `null`, and are not the same one.
    """
    granted = granted_to(lines)
    if not granted or granted == [b"*"] or (granted == [origin] and origin != b"null"):
        return lines
    return without(lines, _GRANT)


def varying(lines: Lines) -> Lines:
    """Return the fields with `Vary: Origin`: a cache must not give one page's response to another."""
    return lines if b"*" in members(lines, b"vary") else with_members(lines, b"Vary", (b"Origin",))
