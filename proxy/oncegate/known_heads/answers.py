"""Heads of an API's responses: those that came before, or that differ from such in values that decide nothing."""

from oncegate.known_heads.recent import MISSES_BEFORE_SAMPLING, RecentHeads
from oncegate.known_heads.shapes import PLAIN, Gap, Shape, Shapes
from oncegate.messages.response_head import ADDRESS_FIELDS, DECIDING_FIELDS, ResponseHead, names_address, plain_pairs

_HEAD_END = b"\r\n\r\n"
# No sign and no leading zero: the number that is read is the one that is passed on.
_LENGTH = Gap(rb"0|[1-9][0-9]{0,17}", at_once=True)
# What decides about a response before its fields are read, and what the parser acts on (llhttp's own list).
_FIXED = (DECIDING_FIELDS - ADDRESS_FIELDS) | {b"connection", b"proxy-connection", b"transfer-encoding", b"upgrade"}


def _gap(name: bytes) -> Gap | None:
    if name == b"content-length":
        return _LENGTH
    return None if name in _FIXED else PLAIN


def _template(head: bytes, shape: Shape, block: bytes) -> bytes:
    """Return a format with a place for each gap of a head, which makes the lines of a block that go into it."""
    names, lines = {line.partition(b":")[0] for line in block.split(b"\r\n")}, []
    for field, (name, value) in enumerate(plain_pairs(head)):
        is_gap = field in shape.fields
        if name in names:
            lines += [_literal(name), b": ", b"%b" if is_gap else _literal(value), b"\r\n"]
        elif is_gap:  # of a value, no bytes
            lines.append(b"%.0b")
    return b"".join(lines)


def _literal(text: bytes) -> bytes:
    return text.replace(b"%", b"%%")


class _KnownShape:
    """What is known of the responses whose heads have one shape; `head` is one of them, and `lines` its bytes."""

    def __init__(self, lines: bytes, shape: Shape, head: ResponseHead) -> None:
        self._head = head
        self._forwarded = self._replayed = _template(lines, shape, head.forwarded_block)
        if head.replayed_block != head.forwarded_block:
            self._replayed = _template(lines, shape, head.replayed_block)
        names = [name.lower() for name, _ in head.pairs]
        gaps = [names[field] for field in shape.fields]
        self._length_gap = gaps.index(b"content-length") if b"content-length" in gaps else -1
        self._address_gaps = [gap for gap, name in enumerate(gaps) if name in ADDRESS_FIELDS]
        fixed = [name for name in names if name in ADDRESS_FIELDS and name not in gaps]
        self._names_address = names_address(head.fields, fixed)

    def read(self, lines: bytes, values: tuple[bytes, ...]) -> ResponseHead:
        """Return the head that has these values in its gaps; `lines` is all of it."""
        length = int(values[self._length_gap]) if self._length_gap >= 0 else None
        forwarded = self._forwarded % values
        replayed = forwarded if self._replayed is self._forwarded else self._replayed % values
        is_address = self._names_address
        if self._address_gaps:
            is_address = is_address or any(b"//" in values[gap] for gap in self._address_gaps)
        return self._head.with_values(lines, length, forwarded, replayed, is_address)


class KnownAnswers:
    """The response heads that a pool of connections remembers of its upstream.

    A head counts only where it begins a response on a connection that expects one, and that response is none to HEAD.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._recent = RecentHeads[ResponseHead](enabled=enabled)
        self._shapes = Shapes[_KnownShape](_gap)
        # So many in a row had no known shape.
        self._misses = 0

    def find(self, data: bytes) -> tuple[ResponseHead, int] | None:
        """Return the head with which `data` begins and where it ends, None where it is not known."""
        end = data.find(_HEAD_END) + 4
        lines = data[:end]
        if (head := self._recent.find(lines)) is not None:
            self._recent.misses = 0
            return head, end
        if (self._misses and self._is_passed_over()) or (found := self._shapes.find(data)) is None:
            return None
        self._misses = 0
        shape, values, end = found
        head = shape.read(lines, values)
        # An API repeats its head for as long as nothing but its Date varies.
        if self._recent.wants_more():
            self._recent.store(lines, end, head)
        return head, end

    def learn(self, data: bytes, head: ResponseHead) -> None:
        """Remember the head with which `data` begins, which was not found, and of which the parser made `head`.

        It is known where it ends only if each line is `Name: value` as it was parsed, or the response is whole.
        """
        end = data.find(_HEAD_END) + 4
        lines = data[:end]
        is_plain = [*head.pairs] == plain_pairs(lines)
        if (is_plain or head.length == len(data) - end) and self._recent.wants_more():
            self._recent.store(lines, end, head)
        is_passed_over, self._misses = self._is_passed_over(), self._misses + 1
        # What another oncegate says of its own goes on or not by the request (`passed_block`).
        if self._enabled and is_plain and not is_passed_over and not head.has_own_fields:
            self._learn_shape(lines, head)

    def _is_passed_over(self) -> bool:
        """Return whether hardly any head has a known shape, and this one is not looked at."""
        return self._misses > MISSES_BEFORE_SAMPLING and self._misses % MISSES_BEFORE_SAMPLING > 0

    def _learn_shape(self, lines: bytes, head: ResponseHead) -> None:
        if (shape := self._shapes.learn(lines)) is None or (matched := shape.match(lines)) is None:
            return
        known = _KnownShape(lines, shape, head)
        # A shape that does not make its own head again, byte for byte, is not kept.
        if known.read(lines, matched[0]) == head:
            self._shapes.keep(lines, shape, known)
