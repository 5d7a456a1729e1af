"""Request heads that came before, whatever idempotency key they carried."""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from oncegate.known_heads.recent import RecentHeads
from oncegate.known_heads.shapes import MAX_SHAPED_BYTES, PLAIN, Gap, Shape, Shapes, joined
from oncegate.messages.bound_authentication import BINDING_FORM
from oncegate.messages.fields import HOP_BY_HOP, Fields, nominated
from oncegate.messages.request_head import ACTED_ON, LAST_EVENT_ID, RequestHead
from oncegate.messages.target import logged_path
from oncegate.settings.credentials import ACCOUNTS, CREDENTIALS

# The fields that say whose a request is. They may differ: who it is, is then decided for each request.
WHOSE = frozenset(name.lower().encode() for name in (*CREDENTIALS, *ACCOUNTS))
# The fields that some code reads, whatever the rules: in a known head their values are fixed, so that nothing that was
# decided by them is used for another value. `tests/test_known_requests.py` finds names that are missing here.
FIXED = (
    ACTED_ON
    | HOP_BY_HOP
    | {b"accept-encoding", b"max-forwards", b"mcp-session-id", b"origin", b"upgrade-insecure-requests", LAST_EVENT_ID}
) - WHOSE
# The fields of a browser's own questions, of a switch to WebSocket, and of proxies in front.
FIXED_PREFIXES = (b"access-control-", b"sec-", b"x-forwarded-", b"oncegate-")

# A key that is its field's whole value as it is on the wire, and within the limit. Others go through the parser.
_KEY = Gap(rb'(?:[!#-+\--\[\]-~]{1,255}+|"[!#-\[\]-~]{1,253}+")', at_once=True)
_PLAIN_KEY = re.compile(_KEY.form)
# What a key has that is not quoted, by the same form.
_UNQUOTED = bytes(code for code in range(256) if _PLAIN_KEY.fullmatch(bytes((code,))))
# Whatever authenticates the client's request, not its connection: see `HeadCache.store`.
_AUTHORIZATION = Gap(rb"(?!%b)%b" % (BINDING_FORM, PLAIN.form))
_binds_connection = re.compile(BINDING_FORM).match
# In its canonical form: without a sign, and without zeros in front.
_LENGTH = Gap(rb"(?:0|[1-9][0-9]{0,8}+)", at_once=True)


class WatchedFields(Fields):
    """The fields of a head that notes of which names the values were read. All fields have the same names."""

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.read: set[bytes] = set()

    def __getitem__(self, name: bytes) -> list[bytes]:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: bytes, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)

    def __iter__(self) -> Iterator[bytes]:
        # With a method of its own for this, a copy (`{**fields}`) gets each value through `__getitem__`.
        return super().__iter__()

    def items(self) -> Any:
        self.read.update(self)
        return super().items()

    def values(self) -> Any:
        self.read.update(self)
        return super().values()


class KnownHead:
    """A request's head that passed every check, with gaps where the values of some fields were, and ids in its path.

    `names`: of the fields with a gap, in lower case. `has_shape`: more than the key may differ, `has_ids`: also ids in
    the path. `key_at` and `length_at`: the gaps of the key and of Content-Length; negative for none. `plan` belongs to
    the gateway: what the head alone decides about the request, whatever is in the gaps (see
    `gateway.keyed_request.HeadPlan`), or None.
    """

    __slots__ = (
        "_fields", "_gaps", "_head", "_ids", "_once", "_path", "_target", "_watched",
        "body_bytes", "has_ids", "has_shape", "key_at", "length_at", "message", "names", "plan",
    )  # fmt: skip

    def __init__(
        self, message: Any, head: RequestHead, body_bytes: int, key_field: bytes, gaps: Shape | Sequence[int]
    ) -> None:
        """`gaps`: the head's shape, or its fields with a gap; `body_bytes`: of a body without a stated length."""
        # aiohttp's message without its fields, which would hold the first values.
        self.message = message._replace(headers=None, raw_headers=(), url=None)
        self._head, self.body_bytes = head, body_bytes
        fields, pieces = (gaps.fields, gaps.pieces) if isinstance(gaps, Shape) else (gaps, ())
        self._ids = ids = fields.count(-1)
        self.has_ids, self.has_shape = ids > 0, isinstance(gaps, Shape)
        # The target around its ids: from behind the method, up to the version.
        self._target = [pieces[0].partition(b" ")[2], *pieces[1:ids], pieces[ids].partition(b" ")[0]] if ids else []
        self._fields = fields[ids:]
        self.names = [head.pairs[at][0].lower() for at in self._fields]
        self._gaps = {name: at for at, name in enumerate(self.names, ids)}
        self._once = {name: values[0] for name, values in head.fields.items() if len(values) == 1}
        self.key_at = ids + self.names.index(key_field) if key_field in self.names else -1
        self.length_at = ids + self.names.index(b"content-length") if b"content-length" in self.names else -1
        # Known once it is asked for.
        self._path = ""
        # The key and the length of the body are looked at in every request. Without a key nothing is planned.
        self._watched = frozenset(self.names) - {key_field, b"content-length"} if self.key_at >= 0 else frozenset()
        self.plan: Any = None

    def watched(self, head: RequestHead) -> RequestHead:
        """Return the head, from which the request is treated, so that `varies_in` can tell."""
        return head._replace(fields=WatchedFields(head.fields)) if self._watched else head

    def varies_in(self, fields: Fields) -> bool:
        """Return whether what was made of a head may depend on its values in the gaps. `fields`: of `watched`."""
        if not self._watched:
            return False
        return not isinstance(fields, WatchedFields) or not self._watched.isdisjoint(fields.read)

    def with_values(self, values: Sequence[bytes]) -> RequestHead:
        """Return the head with these values in its gaps."""
        if not values:
            return self._head
        method, target, http10, host, pairs, fields = self._head
        if self.has_ids:
            target = self.target(values)
        pairs, fields = [*pairs], {**fields}
        for at, name, value in zip(self._fields, self.names, values[self._ids :], strict=True):
            pairs[at] = (pairs[at][0], value)
            fields[name] = [value]
        return RequestHead(method, target, http10, host, pairs, fields)

    def target(self, values: Sequence[bytes]) -> bytes:
        """Return the target with these values in its gaps."""
        return joined(self._target, values[: self._ids]) if self._ids else self._head.target

    def path(self, values: Sequence[bytes]) -> str:
        """Return the path of the target with these values in its gaps, for a log."""
        if self._ids:
            return logged_path(self.target(values))
        if not self._path:
            self._path = logged_path(self._head.target)
        return self._path

    def gaps_among(self, names: Collection[bytes]) -> tuple[tuple[int, bytes], ...]:
        """Return the gaps of the fields with these names, and their names."""
        return tuple((at, name) for name, at in self._gaps.items() if name in names)

    def gaps_other_than(self, names: Collection[bytes]) -> tuple[bool, ...]:
        """Return of each gap, in order, whether it is of no field with one of these names."""
        return (True,) * self._ids + tuple(name not in names for name in self.names)

    def value(self, name: bytes, values: Sequence[bytes]) -> bytes:
        """Return the value of a field (lower-case name) that comes once, with these values in the gaps; else nothing.

        It differs from request to request: what is made of it must not enter a plan.
        """
        at = self._gaps.get(name)
        return self._once.get(name, b"") if at is None else values[at]

    def filled_with(self, value: bytes) -> RequestHead:
        """Return the head with one value in all of its gaps."""
        return self.with_values([value] * (self._ids + len(self.names)))


# A whole request under a known head: the values in the gaps, and its body.
KnownRequest = tuple[KnownHead, tuple[bytes, ...], bytes]


class HeadCache:
    """The request heads that a worker remembers.

    Heads are stored in two parts, before and after the key, so that requests with other keys find them. `key_label` is
    how the line with the key began in the newest head (`\\r\\nIdempotency-Key: `), empty where there was none:
    connections that had no such head look for that. Where more than the key differs from head to head, their shape is
    learned.
    """

    def __init__(self, *, enabled: bool = True, max_line_bytes: int = MAX_SHAPED_BYTES) -> None:
        """`max_line_bytes`: the limit of a field in a head. No shape is learned that could exceed it."""
        self._heads = RecentHeads[KnownHead](enabled=enabled)
        self._shapes = Shapes[KnownHead](self._gap_of, ids_vary=True)
        self._learns_shapes = enabled and max_line_bytes >= MAX_SHAPED_BYTES
        self._key_field, self._fixed = b"", FIXED
        self.enabled = enabled
        self.key_label = b""
        # Whether the newest head that was found has a shape: the next one is looked for there first.
        self._varies = False

    def reset(self, key_field: bytes, acted_on: Iterable[bytes] = ()) -> None:
        """Forget every head; from now on keys are in the field `key_field`, and `acted_on` are read (lower case)."""
        self._heads.clear()
        self._shapes.clear()
        self._key_field, self._fixed, self.key_label = key_field, FIXED.union(set(acted_on) - WHOSE), b""

    def find(self, data: bytes, key_label: bytes) -> KnownRequest | None:
        """Return the request that `data` is, no more and no less, if its head is known.

        `key_label`: how the connection writes the line with the key; empty where that is not known yet.
        """
        key_label = key_label or self.key_label
        found = self._shapes.find(data) if self._varies else None
        if found is None:
            end = data.find(b"\r\n\r\n") + 4
            values: tuple[bytes, ...] = ()
            if key_label and (at := data.find(key_label, 0, end)) >= 0:
                start = at + len(key_label)
                stop = data.find(b"\r\n", start)
                key = data[start:stop]
                values = (key,)
                # Most are not quoted: they are looked at in a third of the time.
                is_plain = (key and not key[255:] and not key.translate(None, _UNQUOTED)) or _PLAIN_KEY.fullmatch(key)
                known = self._heads.find((data[:start], data[stop:end])) if is_plain else None
            else:
                known = self._heads.find((data[:end], b""))
            if known is not None:
                found = known, values, end
            elif self._varies or (found := self._shapes.find(data)) is None:
                return None
        known, values, end = found
        stated = known.body_bytes if known.length_at < 0 else int(values[known.length_at])
        if stated != len(data) - end:
            return None
        self._varies = known.has_shape
        self._heads.misses = 0
        return known, values, data[end:]

    def store(self, data: bytes, message: Any, head: RequestHead) -> KnownHead | None:
        """Remember the head of a request that passed every check, if it may come again; `data` is all of it.

        None: it is not remembered, because its key is not plain, because it authenticates its connection (so that no
        known head does), because it goes on behind one event, or because hardly any head repeats here.
        """
        keys = head.fields.get(self._key_field)
        is_plain = keys is None or (len(keys) == 1 and _PLAIN_KEY.fullmatch(keys[0]))
        binds = any(map(_binds_connection, head.fields.get(b"authorization", ())))
        if binds or LAST_EVENT_ID in head.fields or not (self._heads.wants_more() and is_plain):
            return None
        end = data.find(b"\r\n\r\n") + 4
        if self._learns_shapes and _is_as_sent(data[:end], head):
            shape = self._shapes.learn(data[:end])
            if shape is not None:
                known = KnownHead(message, head, len(data) - end, self._key_field, shape)
                self._shapes.keep(data[:end], shape, known)
                return known
        if keys is None:
            known = KnownHead(message, head, len(data) - end, self._key_field, ())
            self._heads.store((data[:end], b""), end, known)
            return known
        index = [name.lower() for name, _ in head.pairs].index(self._key_field)
        label = b"\r\n%s: " % head.pairs[index][0]
        start = data.find(label, 0, end) + len(label)
        stop = data.find(b"\r\n", start)
        if start < len(label) or keys != [data[start:stop]]:
            return None
        known = KnownHead(message, head, len(data) - end, self._key_field, (index,))
        self._heads.store((data[:start], data[stop:end]), end, known)
        self.key_label = label
        return known

    def _gap_of(self, name: bytes) -> Gap | None:
        """Return what the value of a field may be instead, in a head that is known; None for what is acted on."""
        if name == self._key_field:
            return _KEY
        if name == b"content-length":
            return _LENGTH
        if name == b"authorization":
            return _AUTHORIZATION
        # A name with _ may be read as another one, by whoever is behind.
        return None if name in self._fixed or b"_" in name or name.startswith(FIXED_PREFIXES) else PLAIN


def _is_as_sent(sent: bytes, head: RequestHead) -> bool:
    """Return whether a head is its lines, each field of them `Name: value`, and all of them go on."""
    line = b"%b %b HTTP/1.1" % (head.method.encode(), head.target)
    lines = [line, *(name + b": " + value for name, value in head.pairs)]
    return sent[:-4].split(b"\r\n") == lines and not nominated(head.fields)


def is_whole(data: bytes, message: Any, head: RequestHead) -> bool:
    """Return whether `data` is one whole request, and its head says how long it is and what may follow."""
    if message.upgrade or message.chunked or head.http10:
        return False
    # Its response may have trailers, which no other has (ResponseWriter.takes_trailers).
    if b"te" in head.fields:
        return False
    # The parser skips empty lines before a request. The first of them would be taken for the end of the head.
    if not data.startswith(head.method.encode()):
        return False
    stated = head.fields.get(b"content-length")
    return data.find(b"\r\n\r\n") + 4 + (int(stated[0]) if stated else 0) == len(data)
