"""A response's head: how its body is framed, what is forwarded to the client, and what a replay repeats. Pure."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import blake2b
from itertools import chain
from typing import NamedTuple

from oncegate.messages.bound_authentication import challenge_binds_connection
from oncegate.messages.fields import (
    HOP_BY_HOP,
    MAX_HEAD_BYTES,
    Fields,
    LinePrefixes,
    Pairs,
    by_name,
    nominated,
    remember,
    tokens,
)
from oncegate.messages.framing import CLOSING, COUNTED, STATED, Framing

# Meant for one exchange or one browser alone. Age is written anew for each replay.
NOT_REPLAYED = frozenset((b"set-cookie", b"www-authenticate", b"authentication-info", b"age"))

# The fields that name an address (RFC 9110, sections 10.2.2 and 8.7; the HTML standard has Refresh).
ADDRESS_FIELDS = frozenset((b"location", b"content-location", b"refresh"))

# The fields that `read_response_head` reads, beside Content-Length: what they say is in its members.
DECIDING_FIELDS = ADDRESS_FIELDS | {b"age", b"connection", b"content-type", b"transfer-encoding", b"www-authenticate"}

# An upstream's fields with this prefix are dropped: a client would take them for statements of this oncegate.
OWN_FIELD_PREFIX = b"oncegate-"

# What no field value can contain (RFC 9110, section 5.5): all controls but the tab.
_CONTROLS = bytes(code for code in (*range(32), 127) if code != 9)


@dataclass(slots=True)
class ResponseHead:
    """The head of an upstream's final response (RFC 9110, section 15), and how its body is framed.

    `length`: of the body in bytes, None where the framing does not state it. `bodiless`: it has no body, whatever
    its fields say. `close_delimited`: the end of the connection ends the body (RFC 9112, section 6.3).
    `forwarded_block`, `replayed_block`: the end-to-end fields as they are written now, and on a replay. Each line
    is ended; a Content-Length of the upstream stays in its place among them.
    `is_event_stream`: a client waits for single events of the body. `age_s`: its Age in seconds, 0 without one.
    `names_address`: a field of it names a host to which a client goes. `framing`: how the response to the client marks
    the end of its body. `binds_connection`: its user is, or would be, authenticated for the whole connection.
    `names`: of its fields, in lower case.
    `pairs` and `fields` are its own, whoever made it: where its bytes were not parsed, they are read from `_lines`.
    """

    status: int
    reason: bytes
    length: int | None
    bodiless: bool
    close_delimited: bool
    forwarded_block: bytes
    replayed_block: bytes
    is_event_stream: bool
    age_s: int
    names_address: bool
    binds_connection: bool
    framing: Framing
    names: Collection[bytes] = field(default=frozenset(), compare=False)
    _pairs: Pairs | None = field(default=None, compare=False)
    _fields: Fields | None = field(default=None, compare=False)
    # The head as it came, where `_pairs` is None: each line is `Name: value`.
    _lines: bytes = field(default=b"", compare=False)
    # By `says_own` of `passed_block`; None before.
    _passed_blocks: tuple[bytes, bytes] | None = field(init=False, default=None, compare=False)
    _digest: blake2b | None = field(init=False, default=None, compare=False)

    @property
    def pairs(self) -> Pairs:
        """The fields, in order and spelling."""
        if self._pairs is None:
            self._pairs = plain_pairs(self._lines)
        return self._pairs

    @property
    def fields(self) -> Fields:
        """The values by lower-case name."""
        if self._fields is None:
            self._fields = by_name(self.pairs)
        return self._fields

    def with_values(
        self, lines: bytes, length: int | None, forwarded: bytes, replayed: bytes, names_address: bool
    ) -> "ResponseHead":
        """Return the head `lines`, which is this one but for its length, and for values that decide nothing."""
        return ResponseHead(
            # Positions, as every response may make one of these: arguments by name cost more.
            self.status, self.reason, length, self.bodiless, self.close_delimited, forwarded, replayed,
            self.is_event_stream, self.age_s, names_address, self.binds_connection, self.framing, self.names, None,
            None, lines,
        )  # fmt: skip

    @property
    def has_own_fields(self) -> bool:
        """Whether it has fields that an oncegate writes."""
        return any(name == b"idempotent-replayed" or name.startswith(OWN_FIELD_PREFIX) for name in self.fields)

    def passed_block(self, says_own: bool) -> bytes:
        """Return the fields of a response that this proxy neither guards nor stores.

        An upstream's `Idempotent-Replayed` stays among them, and where this proxy says nothing of its own (`says_own`)
        its `Oncegate-*` fields do: it may be another oncegate.
        """
        if self._passed_blocks is None:
            self._passed_blocks = self.forwarded_block, self.forwarded_block
            # No head with such fields is made of values.
            if not self._lines and self.has_own_fields:
                pairs = _end_to_end(self.pairs, self.fields)
                self._passed_blocks = _block(pairs, _PASSED_PREFIXES), _block(pairs, _PASSED_BESIDE_OWN_PREFIXES)
        return self._passed_blocks[says_own]

    def with_cookies(self) -> "ResponseHead":
        """Return this head with its cookies among the fields that a replay repeats."""
        lines = [
            line
            for line in self.forwarded_block.split(b"\r\n")
            if _is_replayed(name := _name(line)) or name == b"set-cookie"
        ]
        return replace(self, replayed_block=b"\r\n".join(lines))

    def digest(self) -> blake2b:
        """Return the digest of the response as it is replayed, to be updated with its body."""
        if self._digest is None:
            self._digest = response_digest(self.status, self.reason, self.replayed_block)
        return self._digest.copy()


# As in store/record.py.
_empty_digest = blake2b(digest_size=16).copy


def response_digest(status: int, reason: bytes, block: bytes) -> blake2b:
    """Return the digest (16 bytes) of a stored response, to be updated with its body; `block`: its fields."""
    digest = _empty_digest()
    digest.update(b"%d %s\r\n%s" % (status, reason, block))
    return digest


def read_response_head(status: int, reason: bytes, pairs: Pairs, head_only: bool) -> ResponseHead | str:
    """Return the head of a final response, or the reason why it cannot be used.

    101 is final as well: another protocol follows it, up to the end of the connection. `head_only`: the request was
    a HEAD.
    """
    # RFC 9110, section 15, knows none above 599. Clients take such a response for a 5xx.
    if not (200 <= status <= 999 or status == 101):
        return f"status {status}"
    text = b"".join(chain((reason,), *pairs))
    if len(text) + 4 * len(pairs) > MAX_HEAD_BYTES:
        return "the head is too large"
    # A line end among them could split the message for the next reader.
    if has_controls(text):
        return "a control character in the head"
    fields = by_name(pairs)
    # A 204 has no body (RFC 9110, section 8.6): a client that believes its length would wait for one.
    if status == 204:
        pairs = [pair for pair in pairs if pair[0].lower() != b"content-length"]
    body = _body_framing(status, fields, head_only)
    if isinstance(body, str):
        return body
    forwarded, replayed = response_blocks(pairs, fields)
    content_types, challenges = fields.get(b"content-type"), fields.get(b"www-authenticate")
    states_length = body.length is not None or body.bodiless
    return ResponseHead(
        status=status,
        reason=reason,
        length=body.length,
        bodiless=body.bodiless,
        close_delimited=body.close_delimited,
        forwarded_block=forwarded,
        replayed_block=replayed,
        is_event_stream=content_types is not None and content_types[-1].lower().startswith(b"text/event-stream"),
        age_s=_number(fields[b"age"][0]) if b"age" in fields else 0,
        names_address=names_address(fields, ADDRESS_FIELDS),
        binds_connection=challenges is not None and challenge_binds_connection(challenges),
        names=frozenset(fields),
        framing=CLOSING if body.close_delimited else STATED if states_length else COUNTED,
        _pairs=pairs,
        _fields=fields,
    )


class Interim(NamedTuple):
    """The head of an interim response."""

    status: int
    reason: bytes
    pairs: Pairs

    def forwarded(self) -> bytes:
        """Return the head as it is passed on, or nothing where it is not.

        100 is between two neighbours, as they agree on it (RFC 9110, section 10.1.1); no protocol is switched by 101.
        """
        text = b"".join(chain((self.reason,), *self.pairs))
        if self.status in (100, 101) or has_controls(text):
            return b""
        # It has no content (RFC 9110, section 8.6).
        pairs = [pair for pair in self.pairs if pair[0].lower() != b"content-length"]
        block, _ = response_blocks(pairs, by_name(pairs))
        return b"%s%s\r\n" % (status_line(self.status, self.reason), block)


def has_controls(text: bytes) -> bool:
    """Return whether a part of a message has control characters, which no field value can contain."""
    return len(text.translate(None, _CONTROLS)) != len(text)


def names_address(fields: Fields, names: Iterable[bytes]) -> bool:
    """Return whether a field with one of these names has the address of a host."""
    return any(b"//" in value for name in names for value in fields.get(name, ()))


def plain_pairs(head: bytes) -> Pairs:
    """Return the fields of a head in which each line is `Name: value`; its first line is none."""
    lines = head[:-4].split(b"\r\n")
    return [(name, value) for name, _, value in [line.partition(b": ") for line in lines[1:]]]


class _BodyFraming(NamedTuple):
    """The members of `ResponseHead` that say where the body ends."""

    length: int | None = None
    bodiless: bool = False
    close_delimited: bool = False


def _body_framing(status: int, fields: Fields, head_only: bool) -> _BodyFraming | str:
    """Return how the body is framed (RFC 9112, section 6.3), or the reason why the response cannot be used."""
    if status == 101:
        return _BodyFraming(close_delimited=True)
    bodiless = head_only or status in (204, 304)
    length = None
    if b"content-length" in fields:
        length = _stated_length(fields[b"content-length"])
        if length is None:
            return "a Content-Length that is not a number"
    if b"transfer-encoding" in fields:
        # With both fields, two readers could disagree on where the response ends (RFC 9112, section 11.2).
        if tokens(fields[b"transfer-encoding"]) != [b"chunked"] or length is not None:
            return "a transfer coding other than chunked alone"
        return _BodyFraming(bodiless=bodiless)
    return _BodyFraming(length=length, bodiless=bodiless, close_delimited=length is None and not bodiless)


def _stated_length(lengths: Sequence[bytes]) -> int | None:
    """Return the one Content-Length as a number, None where it is malformed or repeated."""
    length = lengths[0].strip()
    return int(length) if len(lengths) == 1 and length.isdigit() and len(length) <= 18 else None


_LINE_PREFIXES = LinePrefixes(HOP_BY_HOP | {b"idempotent-replayed"}, OWN_FIELD_PREFIX)
_PASSED_PREFIXES, _PASSED_BESIDE_OWN_PREFIXES = LinePrefixes(HOP_BY_HOP), LinePrefixes(HOP_BY_HOP, OWN_FIELD_PREFIX)


def response_blocks(pairs: Pairs, fields: Fields) -> tuple[bytes, bytes]:
    """Return the fields of a response that are forwarded, and those that a replay repeats."""
    pairs = _end_to_end(pairs, fields)
    forwarded = _block(pairs)
    if _REPLAYED_NAMES.issuperset(fields):
        return forwarded, forwarded
    replayed = set(filter(_is_replayed, fields))
    remember(_REPLAYED_NAMES, replayed)
    return forwarded, _block([pair for pair in pairs if pair[0].lower() in replayed])


def _end_to_end(pairs: Pairs, fields: Fields) -> Pairs:
    """Return the fields without those that Connection nominates."""
    if names := nominated(fields):
        # Without its length, the response would have no end on a connection that stays open.
        dropped = {*names} - {b"content-length"}
        pairs = [pair for pair in pairs if pair[0].lower() not in dropped]
    return pairs


def _block(pairs: Pairs, prefixes: LinePrefixes = _LINE_PREFIXES) -> bytes:
    lines = [start + value for name, value in pairs if (start := prefixes[name])]
    lines.append(b"")
    return b"\r\n".join(lines)


def _name(line: bytes) -> bytes:
    return line.partition(b":")[0].lower()


def _is_replayed(name: bytes) -> bool:
    return name not in NOT_REPLAYED and not name.startswith(b"proxy-")


# Names that `_is_replayed` accepted: one look-up for a head instead of a call for each field. Bounded.
_REPLAYED_NAMES: set[bytes] = set()


@lru_cache(64)
def status_line(status: int, reason: bytes) -> bytes:
    """Return the first line of a response."""
    return b"HTTP/1.1 %d %s\r\n" % (status, reason)


def _number(text: bytes) -> int:
    """Return a number of at most 9 digits, 0 for any other text."""
    text = text.strip()
    return int(text) if text.isdigit() and len(text) < 10 else 0
