"""Request heads that came before, whatever idempotency key they carried."""

import re
from dataclasses import dataclass
from typing import Any

from oncegate.known_heads.recent import RecentHeads
from oncegate.messages.request_head import RequestHead

# A key that is its field's whole value as it is on the wire, and within the limit. Others go through the parser.
_PLAIN_KEY = re.compile(rb'[!#-+\--\[\]-~]{1,255}|"[!#-\[\]-~]{1,253}"')


class KnownHead:
    """A request's head that passed every check, with a gap where its key was.

    `plan` belongs to the gateway: what the head alone decides about the request, whatever its key (see
    `gateway.keyed_request.HeadPlan`), or None.
    """

    __slots__ = ("_key_index", "body_bytes", "head", "key_field", "message", "plan")

    def __init__(self, message: Any, head: RequestHead, body_bytes: int, key_index: int, key_field: bytes) -> None:
        # aiohttp's message without its fields, which would hold the first key.
        self.message = message._replace(headers=None, raw_headers=(), url=None)
        self.head, self.body_bytes = head, body_bytes
        # Which of the head's fields has the key; negative where none has.
        self._key_index, self.key_field = key_index, key_field
        self.plan: Any = None

    def with_key(self, key: bytes) -> RequestHead:
        """Return the head with `key` as the value of its key field."""
        if self._key_index < 0:
            return self.head
        method, target, http10, host, pairs, fields = self.head
        with_key = [*pairs]
        with_key[self._key_index] = (pairs[self._key_index][0], key)
        return RequestHead(method, target, http10, host, with_key, {**fields, self.key_field: [key]})


@dataclass(slots=True)
class KnownRequest:
    """A whole request under a known head: the value of its key field and its body."""

    known: KnownHead
    key: bytes
    body: bytes


class HeadCache:
    """The request heads that a worker remembers.

    Heads are stored in two parts, before and after the key, so that requests with other keys find them. `key_label` is
    how the line with the key began in the newest head (`\\r\\nIdempotency-Key: `), empty where there was none: new
    connections look for that.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._heads = RecentHeads[KnownHead](enabled=enabled)
        self._key_field = b""
        self.enabled = enabled
        self.key_label = b""

    def reset(self, key_field: bytes) -> None:
        """Forget every head; from now on keys are in the field `key_field` (lower case)."""
        self._heads.clear()
        self._key_field, self.key_label = key_field, b""

    def find(self, data: bytes, key_label: bytes) -> KnownRequest | None:
        """Return the request that `data` is, no more and no less, if its head is known."""
        end, key = data.find(b"\r\n\r\n") + 4, b""
        if not key_label or (at := data.find(key_label, 0, end)) < 0:
            known = self._heads.find((data[:end], b""))
        else:
            start = at + len(key_label)
            stop = data.find(b"\r\n", start)
            key = data[start:stop]
            known = self._heads.find((data[:start], data[stop:end])) if _PLAIN_KEY.fullmatch(key) else None
        if known is None or known.body_bytes != len(data) - end:
            return None
        self._heads.misses = 0
        return KnownRequest(known, key, data[end:])

    def store(self, data: bytes, message: Any, head: RequestHead) -> KnownHead | None:
        """Remember the head of a request that passed every check, if it may come again; `data` is all of it.

        None: it is not remembered, because its key is not plain, or because hardly any head repeats here.
        """
        if not self._heads.wants_more():
            return None
        end = data.find(b"\r\n\r\n") + 4
        if (values := head.fields.get(self._key_field)) is None:
            known = KnownHead(message, head, len(data) - end, -1, self._key_field)
            self._heads.store((data[:end], b""), end, known)
            return known
        index = [name.lower() for name, _ in head.pairs].index(self._key_field)
        label = b"\r\n%s: " % head.pairs[index][0]
        start = data.find(label, 0, end) + len(label)
        stop = data.find(b"\r\n", start)
        if start < len(label) or values != [data[start:stop]] or not _PLAIN_KEY.fullmatch(values[0]):
            return None
        known = KnownHead(message, head, len(data) - end, index, self._key_field)
        self._heads.store((data[:start], data[stop:end]), end, known)
        self.key_label = label
        return known


def is_whole(data: bytes, message: Any, head: RequestHead) -> bool:
    """Return whether `data` is one whole request behind which another may come on the connection."""
    if message.should_close or message.upgrade or message.chunked or head.http10:
        return False
    # Its response may have trailers, which no other has (ResponseWriter.takes_trailers).
    if b"te" in head.fields:
        return False
    # The parser skips empty lines before a request. The first of them would be taken for the end of the head.
    if not data.startswith(head.method.encode()):
        return False
    stated = head.fields.get(b"content-length")
    return data.find(b"\r\n\r\n") + 4 + (int(stated[0]) if stated else 0) == len(data)
