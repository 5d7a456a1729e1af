"""What a policy adapts in the responses to its requests."""

from dataclasses import dataclass, field
from functools import lru_cache

from oncegate.adaptation.addresses import Addresses, outer_prefix
from oncegate.adaptation.blocks import read_block, write_block
from oncegate.adaptation.cookies import REPLAYED_MS, Cookies, without_cookies
from oncegate.adaptation.cors import Cors, replayed_to
from oncegate.adaptation.origins import origin_of
from oncegate.messages.request_head import ForwardedInfo, RequestHead


@dataclass(frozen=True, slots=True)
class Adaptation:
    """What is adapted in the responses of a policy; None for what is not.

    `replays_cookies`: a replay repeats the cookies of its original for a short time.
    """

    cors: Cors | None = None
    addresses: Addresses | None = None
    cookies: Cookies | None = None
    replays_cookies: bool = False

    # Whether every response may be adapted, and not only one that names an address.
    adapts_all: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapts_all", self.cors is not None or self.cookies is not None)

    def adapts_replay(self, block: bytes) -> bool:
        """Return whether a stored response may be another one for each requester.

        It may where it has a field that depends on the requester, or looks as if it had.
        """
        # Written out: a quarter of the time of a loop. `in` costs six times as much as `find` between bytes: it first
        # tries to take what it looks for as a number, and forgets the error (Python 3.11, counted).
        find = block.lower().find
        is_address = find(b"location:") >= 0 or find(b"refresh:") >= 0
        return is_address or find(b"set-cookie:") >= 0 or find(b"allow-origin:") >= 0 or self.cors is not None

    @property
    def acted_on(self) -> frozenset[bytes]:
        """The lower-case names of the request's fields that decide about its response."""
        return frozenset((b"origin",)) if self.cors else frozenset()

    def for_request(self, head: RequestHead, info: ForwardedInfo) -> "Requester":
        """Return the requester of one request; `info` is about its connection."""
        return Requester(self, origin_of(head.fields), outer_prefix(head.fields) if info.trusted else b"")


NOTHING = Adaptation()


def _says_nothing(block: bytes) -> bool:
    """Return whether a block says nothing about origins, so that fields are only added to it."""
    lowered = block.lower()
    return not (b"access-control-" in lowered or b"vary:" in lowered)


@lru_cache(64)
def _added(cors: Cors, origin: bytes) -> bytes:
    """Return the fields that a response gets which says nothing itself, stored or not."""
    return write_block(cors.forwarded([], origin))


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
        cors, block = self.adaptation.cors, self._addressed(block)
        if cors is None:
            return block
        if _says_nothing(block):
            return block + _added(cors, self.origin)
        return write_block(cors.forwarded(read_block(block), self.origin))

    def replayed(self, block: bytes, age_ms: int) -> bytes:
        """Return the fields of a stored response; `age_ms` is the time since it was complete."""
        cors = self.adaptation.cors
        if not self.adaptation.replays_cookies or age_ms > REPLAYED_MS:
            block = without_cookies(block)
        block = self._addressed(block)
        if _says_nothing(block):
            return block if cors is None else block + _added(cors, self.origin)
        lines = read_block(block)
        return write_block(replayed_to(lines, self.origin) if cors is None else cors.replayed(lines, self.origin))

    def own_fields(self) -> bytes:
        """Return further fields of an answer of oncegate's own."""
        cors = self.adaptation.cors
        return b"" if cors is None else write_block(cors.own(self.origin))

    def _addressed(self, block: bytes) -> bytes:
        """Return the fields with the addresses and cookies that the client needs."""
        addresses, cookies = self.adaptation.addresses, self.adaptation.cookies
        if addresses is not None:
            block = addresses.adapted(block, self.outer)
        return block if cookies is None else cookies.adapted(block, self.outer)
