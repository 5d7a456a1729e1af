"""Every rule about header fields: what is stripped, added and passed on. Pure.

Fields are pairs of bytes in the order and spelling in which they came. A message is always written
anew from its parsed form: framing, hop-by-hop and forwarding fields are ours, never passed through.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from itertools import chain
from typing import NamedTuple

Pairs = Sequence[tuple[bytes, bytes]]
Fields = dict[bytes, list[bytes]]

# RFC 9110, section 7.6.1, and what older proxies still send.
HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"proxy-connection",
        b"keep-alive",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
        b"proxy-authorization",
    )
)
FORWARDING = frozenset(
    (
        b"forwarded",
        b"via",
        b"x-real-ip",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-port",
        b"x-forwarded-prefix",
        b"x-forwarded-proto",
        b"x-forwarded-server",
    )
)
# Given for one exchange or one person's browser: a replay must not hand them on.
NOT_REPLAYED = frozenset((b"set-cookie", b"www-authenticate", b"authentication-info", b"age"))
FENCE = b"idempotency-fence"  # ours alone: an upstream that compares fences must not meet one of a client's making
# What this proxy reads and acts on: stripping one by nominating it in Connection is an attack.
ACTED_ON = FORWARDING | frozenset(
    (
        b"authorization",
        b"content-encoding",
        b"content-length",
        b"content-type",
        b"cookie",
        b"expect",
        b"host",
        FENCE,
        b"prefer",
        b"transfer-encoding",
        b"x-api-key",
    )
)
MAX_HEAD_BYTES = 65536  # of an answer, or of a request that comes in parts
OURS = b"oncegate-"  # and whatever follows

_USUAL = ([b"keep-alive"], [b"close"])
_CONTROLS = bytes(code for code in (*range(32), 127) if code != 9)
_KNOWN = 4096  # names, or hosts, of at most
_KNOWN_BYTES = 64  # that are remembered


class Labels(dict[bytes, bytes]):
    """A field's name -> how its line begins, `Name: `, empty if it ends at this hop.

    Names repeat from message to message: an answer's block takes 13k instructions so, 20k when each
    line is formatted (measured). Bounded.
    """

    def __init__(self, gone: Collection[bytes], gone_prefix: bytes | None = None) -> None:
        self._gone, self._gone_prefix = gone, gone_prefix

    def __missing__(self, name: bytes) -> bytes:
        lower = name.lower()
        gone = lower in self._gone or (self._gone_prefix is not None and lower.startswith(self._gone_prefix))
        label = b"" if gone else name + b": "
        if len(name) <= _KNOWN_BYTES:
            if len(self) >= _KNOWN:
                self.clear()
            self[name] = label
        return label


class RequestHead(NamedTuple):
    """A request's head that passed all checks. `target` is in origin form, byte for byte as received."""

    method: str
    target: bytes
    http10: bool
    host: bytes
    pairs: Pairs
    fields: Fields  # values by lower-case name


_VIA = (b"Via: 1.1 oncegate", b"Via: 1.0 oncegate")  # by whether the request came in HTTP/1.0


@dataclass(frozen=True, slots=True)
class Hop:
    """What the forwarding fields say of the client's side; the same for a whole connection."""

    client: bytes
    scheme: bytes
    trusted: bool
    lines: tuple[tuple[bytes, ...], ...] = field(init=False)  # for a client that is not trusted

    def __post_init__(self) -> None:
        lines = (b"X-Forwarded-For: " + self.client, b"X-Forwarded-Proto: " + self.scheme)
        object.__setattr__(self, "lines", tuple((*lines, via) for via in _VIA))


def by_name(pairs: Pairs) -> Fields:
    """Return the values by lower-case name, in order."""
    fields: Fields = {name.lower(): [value] for name, value in pairs}
    if len(fields) != len(pairs):
        fields = {}
        for name, value in pairs:
            fields.setdefault(name.lower(), []).append(value)
    return fields


def tokens(values: Iterable[bytes]) -> list[bytes]:
    """Return the members of a comma-separated field, in lower case."""
    return [token for value in values for token in map(bytes.strip, value.lower().split(b",")) if token]


def nominated(fields: Fields) -> Collection[bytes]:
    """Return what Connection names beyond its usual words: RFC 9110, section 7.6.1, strips that as well."""
    values = fields.get(b"connection")
    return () if values is None or values in _USUAL else tokens(values)


def remember(known: set[bytes], more: Iterable[bytes]) -> None:
    """Keep short words that passed a check, so that one look tells next time. Bounded."""
    if len(known) >= _KNOWN:
        known.clear()
    known.update(word for word in more if len(word) <= _KNOWN_BYTES)


_FORWARDED = Labels(HOP_BY_HOP | FORWARDING | {b"host", b"content-length", b"expect", FENCE})


def request_head(
    head: RequestHead, hop: Hop, host: bytes, prefix: bytes, length: int | None, drop: Collection[bytes] = ()
) -> bytes:
    """Return a request's head for the upstream; `length` None: chunked, negative: no body."""
    method, target, http10, asked_host, pairs, fields = head
    named = nominated(fields)
    if drop or named:
        gone = {*drop, *named}
        pairs = [pair for pair in pairs if pair[0].lower() not in gone]
    lines = [label + value for name, value in pairs if (label := _FORWARDED[name])]
    lines += _forwarding_on(head, hop) if hop.trusted else hop.lines[http10]
    if asked_host and not hop.trusted:  # what a client claims counts only if it is trusted
        lines.append(b"X-Forwarded-Host: " + asked_host)
    if length is None:
        lines.append(b"Transfer-Encoding: chunked\r\n\r\n")
    else:
        lines.append(b"Content-Length: %d\r\n\r\n" % length if length >= 0 else b"\r\n")
    # Joined, not formatted with %s: 14k instructions a head instead of 19k (measured).
    return b"".join((method.encode(), b" ", prefix, target, b" HTTP/1.1\r\nHost: ", host, b"\r\n", b"\r\n".join(lines)))


def with_fence(head: bytes, fence: bytes) -> bytes:
    """Return a request's head with the claim's fence: an upstream that saw a higher one can refuse it."""
    return b"%sIdempotency-Fence: %d\r\n\r\n" % (head[:-2], int(fence))


def renamed(pairs: Pairs, name: bytes, to: bytes) -> Pairs:
    """Return the fields with `name` (lower case) under another name, or without it where that is empty.

    What a client sends under the other name itself would be taken for ours, and goes.
    """
    gone = to.lower() if to.lower() != name else b""
    kept = (pair for pair in pairs if pair[0].lower() != gone)
    return [
        (to, value) if field.lower() == name else (field, value) for field, value in kept if to or field.lower() != name
    ]


def is_websocket(head: RequestHead) -> bool:
    """Return whether a request opens a WebSocket as RFC 6455, section 4.1, says, and nothing else."""
    fields = head.fields
    framed = b"content-length" in fields or b"transfer-encoding" in fields
    asked = head.method == "GET" and not head.http10 and not framed and len(fields.get(b"sec-websocket-key", ())) == 1
    return asked and tokens(fields.get(b"upgrade", ())) == [b"websocket"]


SWITCHING = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"  # this hop's own, both ways


def _forwarding_on(head: RequestHead, hop: Hop) -> list[bytes]:
    """Return the forwarding fields of a trusted proxy, with this hop added."""
    fields = head.fields
    lines = [
        b"X-Forwarded-For: " + b", ".join([*fields.get(b"x-forwarded-for", ()), hop.client]),
        b"X-Forwarded-Proto: " + (fields.get(b"x-forwarded-proto") or [hop.scheme])[-1],
        b"Via: " + b", ".join([*fields.get(b"via", ()), _VIA[head.http10].removeprefix(b"Via: ")]),
    ]
    if forwarded_host := (fields.get(b"x-forwarded-host") or [head.host])[-1]:
        lines.append(b"X-Forwarded-Host: " + forwarded_host)
    for name in (b"forwarded", b"x-forwarded-port", b"x-forwarded-prefix", b"x-forwarded-server", b"x-real-ip"):
        lines += [b"%s: %s" % (name.title(), value) for value in fields.get(name, ())]
    return lines


@dataclass(slots=True)
class AnswerHead:
    """The head of an upstream's final answer. `length` is None where its framing does not tell one."""

    status: int
    reason: bytes
    pairs: Pairs
    fields: Fields
    length: int | None
    bodiless: bool
    eof_framed: bool
    # Its end-to-end fields as they are written now, and as they are on a replay. Each line is ended; a length the
    # upstream stated stays in its place among them.
    passed_on: bytes
    kept: bytes
    streamed_by_nature: bool = field(init=False)  # somebody is waiting for single events of it
    age_s: int = field(init=False)  # that it had when it came, 0 where it says none
    _begun: blake2b | None = field(init=False, default=None, compare=False)

    def __post_init__(self) -> None:
        kinds = self.fields.get(b"content-type")
        self.streamed_by_nature = kinds is not None and kinds[-1].lower().startswith(b"text/event-stream")
        self.age_s = _number(self.fields[b"age"][0]) if b"age" in self.fields else 0

    def digest(self) -> blake2b:
        """Return the running digest of an answer with this head, as it is replayed."""
        if self._begun is None:
            self._begun = answer_digest(self.status, self.reason, self.kept)
        return self._begun.copy()


def answer_digest(status: int, reason: bytes, block: bytes) -> blake2b:
    """Return the running digest of an answer that begins so; its body is fed to it."""
    return blake2b(b"%d %s\r\n%s" % (status, reason, block), digest_size=16)


def read_answer_head(status: int, reason: bytes, pairs: Pairs, head_only: bool) -> AnswerHead | str:
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
    passed_on, kept = answer_blocks(pairs, fields)
    if status == 101:
        return AnswerHead(status, reason, pairs, fields, None, False, True, passed_on, kept)
    bodiless = head_only or status in (204, 304)
    length = None
    if b"content-length" in fields:
        length = _stated_length(fields[b"content-length"])
        if length is None:
            return "a content length that is no number"
    if b"transfer-encoding" in fields:
        if tokens(fields[b"transfer-encoding"]) != [b"chunked"] or length is not None:
            return "a transfer coding other than chunked alone"
        return AnswerHead(status, reason, pairs, fields, None, bodiless, False, passed_on, kept)
    eof_framed = length is None and not bodiless
    return AnswerHead(status, reason, pairs, fields, length, bodiless, eof_framed, passed_on, kept)


def _stated_length(lengths: Sequence[bytes]) -> int | None:
    length = lengths[0].strip()
    return int(length) if len(lengths) == 1 and length.isdigit() and len(length) <= 18 else None


_PASSED_ON = Labels(HOP_BY_HOP | {b"idempotent-replayed"}, OURS)


def answer_blocks(pairs: Pairs, fields: Fields) -> tuple[bytes, bytes]:
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


def preferred_wait_s(values: Iterable[bytes]) -> int | None:
    """Return N of `Prefer: wait=N` in seconds (RFC 7240), None where it is not asked for or malformed."""
    for preference in tokens(values):
        name, _, value = preference.partition(b";")[0].partition(b"=")
        value = value.strip().strip(b'"')
        if name.strip() == b"wait":
            return int(value) if value.isdigit() and len(value) < 10 else None
    return None
