"""An answer's head: how its body is framed, what goes on to the client, what a replay says again. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from itertools import chain

from oncegate.messages.fields import (
    HOP_BY_HOP,
    MAX_HEAD_BYTES,
    Fields,
    Labels,
    Pairs,
    by_name,
    nominated,
    remember,
    tokens,
)

# Given for one exchange or one person's browser: a replay must not hand them on.
NOT_REPLAYED = frozenset((b"set-cookie", b"www-authenticate", b"authentication-info", b"age"))

OURS = b"oncegate-"  # and whatever follows

_CONTROLS = bytes(code for code in (*range(32), 127) if code != 9)


@dataclass(slots=True)
class ResponseHead:
    """The head of an upstream's final answer. `length` is None where its framing does not tell one."""

    status: int
    reason: bytes
    pairs: Pairs
    fields: Fields
    length: int | None
    bodiless: bool
    close_delimited: bool
    # Its end-to-end fields as they are written now, and as they are on a replay. Each line is ended; a length the
    # upstream stated stays in its place among them.
    forwarded_block: bytes
    replayed_block: bytes
    is_event_stream: bool = field(init=False)  # somebody is waiting for single events of it
    age_s: int = field(init=False)  # that it had when it came, 0 where it says none
    _begun: blake2b | None = field(init=False, default=None, compare=False)

    def __post_init__(self) -> None:
        kinds = self.fields.get(b"content-type")
        self.is_event_stream = kinds is not None and kinds[-1].lower().startswith(b"text/event-stream")
        self.age_s = _number(self.fields[b"age"][0]) if b"age" in self.fields else 0

    def digest(self) -> blake2b:
        """Return the running digest of an answer with this head, as it is replayed."""
        if self._begun is None:
            self._begun = response_digest(self.status, self.reason, self.replayed_block)
        return self._begun.copy()


def response_digest(status: int, reason: bytes, block: bytes) -> blake2b:
    """Return the running digest of an answer that begins so; its body is fed to it."""
    return blake2b(b"%d %s\r\n%s" % (status, reason, block), digest_size=16)


def read_response_head(status: int, reason: bytes, pairs: Pairs, head_only: bool) -> ResponseHead | str:
    """Return the head of a final answer and how its body is framed, or what makes it unusable.

    101 is final, too: what follows is another protocol, up to the end of the connection.
    """
    if not (200 <= status <= 599 or status == 101):
        return f"status {status}"
    text = b"".join(chain((reason,), *pairs))
    if len(text) + 4 * len(pairs) > MAX_HEAD_BYTES:
        return "the head is too large"
    if len(text.translate(None, _CONTROLS)) != len(text):  # it could split a message on its way
        return "a control character in the head"
    fields = by_name(pairs)
    if status == 204:  # a client that believed its length would wait for a body that never comes (RFC 9110, 8.6)
        pairs = [pair for pair in pairs if pair[0].lower() != b"content-length"]
    forwarded, replayed = response_blocks(pairs, fields)
    if status == 101:
        return ResponseHead(status, reason, pairs, fields, None, False, True, forwarded, replayed)
    bodiless = head_only or status in (204, 304)
    length = None
    if b"content-length" in fields:
        length = _stated_length(fields[b"content-length"])
        if length is None:
            return "a content length that is no number"
    if b"transfer-encoding" in fields:
        if tokens(fields[b"transfer-encoding"]) != [b"chunked"] or length is not None:
            return "a transfer coding other than chunked alone"
        return ResponseHead(status, reason, pairs, fields, None, bodiless, False, forwarded, replayed)
    close_delimited = length is None and not bodiless
    return ResponseHead(status, reason, pairs, fields, length, bodiless, close_delimited, forwarded, replayed)


def _stated_length(lengths: Sequence[bytes]) -> int | None:
    length = lengths[0].strip()
    return int(length) if len(lengths) == 1 and length.isdigit() and len(length) <= 18 else None


_PASSED_ON = Labels(HOP_BY_HOP | {b"idempotent-replayed"}, OURS)


def response_blocks(pairs: Pairs, fields: Fields) -> tuple[bytes, bytes]:
    """Return the fields of an answer that go on. A replay leaves out what belongs to the first exchange alone."""
    if named := nominated(fields):
        # An answer that lost its length this way would have no end on a connection that is kept.
        gone = {*named} - {b"content-length"}
        pairs = [pair for pair in pairs if pair[0].lower() not in gone]
    passed_on = _block(pairs)
    if _REPLAYED.issuperset(fields):
        return passed_on, passed_on
    replayed = set(filter(_is_replayed, fields))
    remember(_REPLAYED, replayed)
    return passed_on, _block([pair for pair in pairs if pair[0].lower() in replayed])


def _block(pairs: Pairs) -> bytes:
    lines = [label + value for name, value in pairs if (label := _PASSED_ON[name])]
    lines.append(b"")
    return b"\r\n".join(lines)


def _is_replayed(name: bytes) -> bool:
    return name not in NOT_REPLAYED and not name.startswith(b"proxy-")


_REPLAYED: set[bytes] = set()  # names found to be so: bounded


@lru_cache(64)
def status_line(status: int, reason: bytes) -> bytes:
    """Return the first line of an answer."""
    return b"HTTP/1.1 %d %s\r\n" % (status, reason)


def _number(text: bytes) -> int:
    """Return a number of few digits, 0 for what is none."""
    text = text.strip()
    return int(text) if text.isdigit() and len(text) < 10 else 0
