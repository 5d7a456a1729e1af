"""A request's head: as it was checked, and as it goes to the upstream. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from oncegate.messages.fields import HOP_BY_HOP, Fields, Labels, Pairs, nominated, tokens

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
class ForwardedInfo:
    """What the forwarding fields say of the client's side; the same for a whole connection."""

    client: bytes
    scheme: bytes
    trusted: bool
    lines: tuple[tuple[bytes, ...], ...] = field(init=False)  # for a client that is not trusted

    def __post_init__(self) -> None:
        lines = (b"X-Forwarded-For: " + self.client, b"X-Forwarded-Proto: " + self.scheme)
        object.__setattr__(self, "lines", tuple((*lines, via) for via in _VIA))


_FORWARDED = Labels(HOP_BY_HOP | FORWARDING | {b"host", b"content-length", b"expect", FENCE})


def request_head(head: RequestHead, hop: ForwardedInfo, host: bytes, prefix: bytes, length: int | None) -> bytes:
    """Return a request's head for the upstream; `length` None: chunked, negative: no body."""
    method, target, http10, asked_host, pairs, fields = head
    if names := nominated(fields):
        pairs = [pair for pair in pairs if pair[0].lower() not in names]
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


def _forwarding_on(head: RequestHead, hop: ForwardedInfo) -> list[bytes]:
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


def preferred_wait_s(values: Iterable[bytes]) -> int | None:
    """Return N of `Prefer: wait=N` in seconds (RFC 7240), None where it is not asked for or malformed."""
    for preference in tokens(values):
        name, _, value = preference.partition(b";")[0].partition(b"=")
        value = value.strip().strip(b'"')
        if name.strip() == b"wait":
            return int(value) if value.isdigit() and len(value) < 10 else None
    return None
