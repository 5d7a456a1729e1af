"""What a policy adapts in the responses to its requests."""

from dataclasses import dataclass

from oncegate.messages.request_head import ForwardedInfo, RequestHead


@dataclass(frozen=True, slots=True)
class Adaptation:
    """What is adapted for the requester at hand. A policy that adapts nothing has None in its place."""

    @property
    def acted_on(self) -> frozenset[bytes]:
        """The lower-case names of the request's fields that decide about its response."""
        return frozenset()

    def for_request(self, head: RequestHead, info: ForwardedInfo) -> "Requester":
        """Return the requester of one request; `info` is about its connection."""
        return Requester(self, head, info)


@dataclass(slots=True)
class Requester:
    """Whoever sent the request at hand, as far as the response's head depends on it.

    Blocks are header fields in wire form, each line ended. The stored response stays as it came.
    """

    adaptation: Adaptation
    head: RequestHead
    info: ForwardedInfo

    def forwarded(self, block: bytes) -> bytes:
        """Return the fields of a response that comes from the upstream now: executed or passed through."""
        return block

    def replayed(self, block: bytes) -> bytes:
        """Return the fields of a stored response."""
        return block

    def own_fields(self) -> bytes:
        """Return further fields of an answer of oncegate's own."""
        return b""
