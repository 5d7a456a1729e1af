"""What a policy adapts in the responses to its requests."""

from dataclasses import dataclass

from oncegate.adaptation.addresses import Addresses, outer_prefix
from oncegate.adaptation.blocks import Lines, changed, read_block, without, write_block
from oncegate.adaptation.cookies import REPLAYED_MS, SET_COOKIE, Cookies
from oncegate.adaptation.cors import Cors, replayed_to
from oncegate.adaptation.origins import origin_of
from oncegate.messages.request_head import ForwardedInfo, RequestHead
from oncegate.messages.response_head import ADDRESS_FIELDS

_SET_COOKIE = frozenset((SET_COOKIE,))
_REFRESH = frozenset((b"refresh",))
_URLS = ADDRESS_FIELDS - _REFRESH
# What makes a stored response another one for another requester, whatever the policy.
_ADAPTED_IN_REPLAYS = (b"location:", b"allow-origin:", b"set-cookie:", b"refresh:")


@dataclass(frozen=True, slots=True)
class Adaptation:
    """What is adapted in the responses of a policy; None for what is not.

    `replays_cookies`: a replay repeats the cookies of its original for a short time.
    """

    cors: Cors | None = None
    addresses: Addresses | None = None
    cookies: Cookies | None = None
    replays_cookies: bool = False

    @property
    def adapts_all(self) -> bool:
        """Whether every response may be adapted, and not only one that names an address."""
        return self.cors is not None or self.cookies is not None

    def adapts_replay(self, block: bytes) -> bool:
        """Return whether a stored response may be another one for each requester."""
        if self.cors is not None:
            return True
        lowered = block.lower()
        return any(name in lowered for name in _ADAPTED_IN_REPLAYS)

    @property
    def acted_on(self) -> frozenset[bytes]:
        """The lower-case names of the request's fields that decide about its response."""
        return frozenset((b"origin",)) if self.cors else frozenset()

    def for_request(self, head: RequestHead, info: ForwardedInfo) -> "Requester":
        """Return the requester of one request; `info` is about its connection."""
        return Requester(self, origin_of(head.fields), outer_prefix(head.fields) if info.trusted else b"")


NOTHING = Adaptation()


@dataclass(slots=True)
class Requester:
    """Whoever sent the request at hand, as far as the response's head depends on it.

    `origin` is the page's, empty for none; `outer` the path prefix that trusted proxies in front took off. Blocks are
    header fields in wire form, each line ended. The stored response stays as it came.
    """

    adaptation: Adaptation
    origin: bytes = b""
    outer: bytes = b""

    def forwarded(self, block: bytes) -> bytes:
        """Return the fields of a response that comes from the upstream now: executed or passed through."""
        cors, lines = self.adaptation.cors, self._addressed(read_block(block))
        return write_block(lines if cors is None else cors.forwarded(lines, self.origin))

    def replayed(self, block: bytes, age_ms: int) -> bytes:
        """Return the fields of a stored response; `age_ms` is the time since it was complete."""
        cors, lines = self.adaptation.cors, read_block(block)
        if not self.adaptation.replays_cookies or age_ms > REPLAYED_MS:
            lines = without(lines, _SET_COOKIE)
        lines = self._addressed(lines)
        return write_block(replayed_to(lines, self.origin) if cors is None else cors.replayed(lines, self.origin))

    def own_fields(self) -> bytes:
        """Return further fields of an answer of oncegate's own."""
        cors = self.adaptation.cors
        return b"" if cors is None else write_block(cors.own(self.origin))

    def _addressed(self, lines: Lines) -> Lines:
        """Return the fields with the addresses and cookies that the client needs."""
        addresses, cookies, outer = self.adaptation.addresses, self.adaptation.cookies, self.outer
        if addresses is not None:
            lines = changed(lines, _URLS, lambda value: addresses.shown(value, outer))
            lines = changed(lines, _REFRESH, lambda value: addresses.refreshed(value, outer))
        if cookies is not None:
            lines = changed(lines, _SET_COOKIE, lambda value: cookies.shown(value, outer))
        return lines
