"""Preflights: a browser asks whether a page may send a request (https://fetch.spec.whatwg.org/#cors-preflight-fetch)."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from oncegate.adaptation.blocks import Lines, read_block, with_members, write_block
from oncegate.adaptation.cors import Cors, DecidedBy, grant, granted_to, is_granted, shows_cors_code
from oncegate.adaptation.origins import origin_of
from oncegate.messages.fields import Fields
from oncegate.messages.request_head import RequestHead

ALLOW_HEADERS, ALLOW_METHODS = b"Access-Control-Allow-Headers", b"Access-Control-Allow-Methods"
# Browsers ask again after that. Chromium takes at most two hours, Firefox a day.
MAX_AGE_S = 600
# What oncegate reads, and what a stream or a download is continued with.
REQUEST_HEADERS = (b"Prefer", b"Last-Event-ID", b"Range")
_METHODS = (b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE")
_VARY = (b"Origin", b"Access-Control-Request-Method", b"Access-Control-Request-Headers")
# RFC 9110, section 5.6.2.
_TOKEN = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,256}")
_MAX_REQUESTED = 256
# What a request may have beside what its preflight has or lists: safelisted fields, and the browser's own credentials.
_UNLISTED = frozenset(
    (b"accept", b"accept-language", b"authorization", b"content-language", b"content-type", b"cookie", b"range")
)
# So many other origins are asked for at most.
_MAX_OTHERS = 8
# Code that refuses a preflight without a field of the protocol answers like this.
_SILENT_REFUSALS = (204, 403)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a preflight asks for: whether a page of `origin` may send `method` with `headers` (as they came)."""

    origin: bytes
    method: bytes
    headers: tuple[bytes, ...]

    @property
    def names(self) -> frozenset[bytes]:
        """The lower-case names of the fields that the request may have and the preflight has not."""
        return _UNLISTED.union(name.lower() for name in self.headers)


def read_preflight(head: RequestHead) -> Asked | None:
    """Return what a request asks for as a preflight, None if it is none."""
    methods = head.fields.get(b"access-control-request-method", ())
    origin = origin_of(head.fields)
    if head.method != "OPTIONS" or not origin or len(methods) != 1 or not _TOKEN.fullmatch(methods[0].strip()):
        return None
    return Asked(origin, methods[0].strip(), _names(head.fields))


def _names(fields: Fields) -> tuple[bytes, ...]:
    lines = b",".join(fields.get(b"access-control-request-headers", ())).split(b",")
    return tuple(name for name in map(bytes.strip, lines[:_MAX_REQUESTED]) if _TOKEN.fullmatch(name))


@dataclass(frozen=True, slots=True)
class Preflight:
    """A preflight of a listed origin. `cors`: that of every rule under which the request may fall."""

    asked: Asked
    cors: tuple[Cors, ...]

    @property
    def asks_api(self) -> bool:
        """Whether the API is asked first."""
        return any(one.decided_by is not DecidedBy.ONCEGATE for one in self.cors)

    @property
    def is_decided_by_api(self) -> bool:
        """Whether only the API can grant it."""
        return any(one.decided_by is DecidedBy.API for one in self.cors)

    def granted(self, max_age_s: int) -> bytes:
        """Return the fields of oncegate's answer that grants it; the browser may believe it for `max_age_s`."""
        asked, method = self.asked, self.asked.method
        is_any = all(one.origins.any for one in self.cors)
        with_credentials = all(one.credentials for one in self.cors)
        lines = [
            *grant(b"*" if is_any else asked.origin, with_credentials),
            (ALLOW_METHODS, b", ".join(_METHODS if method in _METHODS else (*_METHODS, method))),
            (ALLOW_HEADERS, b", ".join(_unique((*asked.headers, *self._request_headers)))),
            (b"Access-Control-Max-Age", b"%d" % max_age_s),
            (b"Vary", b", ".join(_VARY)),
        ]
        return write_block(lines)

    @property
    def _request_headers(self) -> tuple[bytes, ...]:
        return (*(name for one in self.cors for name in one.key_headers), *REQUEST_HEADERS)

    def refused(self) -> bytes:
        """Return the fields of oncegate's answer that grants nothing."""
        return write_block([(b"Vary", b", ".join(_VARY))])

    def is_open(self, status: int, block: bytes) -> bool:
        """Return whether the API's own response leaves open who decides.

        The API has no CORS code, or code that grants the origin and does not know preflights, or code that refuses it
        without a sign.
        """
        lines = read_block(block)
        if self.is_decided_by_api:
            return False
        if granted := granted_to(lines):
            return is_granted(granted, self.asked.origin) and not 200 <= status <= 299 and status != 403
        return not shows_cors_code(lines) and not self._is_refused(status, lines)

    def _is_refused(self, status: int, lines: Lines) -> bool:
        # A server that answers OPTIONS by itself lists the methods (RFC 9110, section 9.3.7).
        return status in _SILENT_REFUSALS and not any(name.lower() == b"allow" for name, _ in lines)

    def for_others(self, head: RequestHead) -> Iterator[tuple[bytes, RequestHead]]:
        """Yield a few other listed origins, each with the preflight that a page of it would send."""
        others = dict.fromkeys(
            origin for one in self.cors for origin in one.origins.named if origin != self.asked.origin
        )
        for origin in islice(others, _MAX_OTHERS):
            pairs = [(name, origin if name.lower() == b"origin" else value) for name, value in head.pairs]
            yield origin, head._replace(pairs=pairs, fields={**head.fields, b"origin": [origin]})

    def is_grant(self, block: bytes, origin: bytes) -> bool:
        """Return whether a response grants something to an origin."""
        return is_granted(granted_to(read_block(block)), origin)

    def forwarded(self, block: bytes) -> bytes:
        """Return the fields of the API's own response to the preflight, with what oncegate needs added to a grant."""
        lines = with_members(read_block(block), b"Vary", _VARY)
        if is_granted(granted_to(lines), self.asked.origin):
            lines = with_members(lines, ALLOW_HEADERS, self._request_headers)
        return write_block(lines)


def _unique(names: Iterable[bytes]) -> list[bytes]:
    """Return names without repetitions; case does not count."""
    by_name: dict[bytes, bytes] = {}
    for name in names:
        by_name.setdefault(name.lower(), name)
    return list(by_name.values())
