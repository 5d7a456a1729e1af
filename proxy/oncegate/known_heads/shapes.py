"""Shapes of heads: the bytes that heads of one kind have in common, with gaps where their values differ.

Which values differ is learned from two heads that are equal but for fields that may vary, and no field may vary unless
the owner of the table says so by its name. A shape is a fixed text but for its gaps: a head that matches has the same
lines and the same field names in the same order, and nothing else than a value of its form in each gap.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Generic, NamedTuple, TypeVar

MAX_SHAPES = 64
# With the same first line.
MAX_TRIED = 8
MAX_GAPS = 24
MAX_SHAPED_BYTES = 4096
# An expression takes as long to compile as two requests take. So many may be compiled at once, and then one more for
# each so many heads that are looked up.
COMPILED_AT_ONCE = 64
HEADS_FOR_ONE = 32

# In the skeleton of a head, in the place of a value that may differ. No head has this byte.
_OPEN = b"\0"

Known = TypeVar("Known")


class Gap(NamedTuple):
    """What may stand in the place of a field's value. `form` is an expression without groups.

    `at_once`: it is a gap from the beginning, not only once two heads differed in it.
    """

    form: bytes
    at_once: bool = False


# Visible ASCII and single-byte spaces, none at the ends: what every parser takes for a value as it is.
PLAIN = Gap(rb"(?! )[ -~]{1,2048}+(?<! )")

# A part of a path that may be an id: it has a digit. Nothing in it is escaped, and no dot has a meaning there.
_ID = Gap(rb"(?=[A-Za-z_-]*+[0-9])[A-Za-z0-9_-]{1,128}+")
_IDS = re.compile(rb"(?<=/)%b(?=[/? ])" % _ID.form)

GapOf = Callable[[bytes], Gap | None]


class Shape:
    """The shape of heads. `fields`: which fields have the gaps, counted from 0; -1 for the first line. `pieces`: what
    is around them.

    The expression knows only how long the pieces are. They are compared afterwards, which is faster than to match them
    byte for byte, and leaves nothing of a head in the cache of `re`.
    """

    __slots__ = ("_match", "fields", "pieces")

    def __init__(self, pieces: Sequence[bytes], forms: Iterable[bytes], fields: Sequence[int]) -> None:
        self.pieces, self.fields = tuple(pieces), tuple(fields)
        lengths = [b"(.{%d})" % len(piece) for piece in pieces]
        self._match = re.compile(b"(?s)" + joined(lengths, [b"(%b)" % form for form in forms])).match

    def match(self, data: bytes) -> tuple[tuple[bytes, ...], int] | None:
        """Return the values in the gaps and where the head ends, if `data` begins with a head of this shape."""
        found = self._match(data)
        if found is None or found.end() > MAX_SHAPED_BYTES:
            return None
        parts = found.groups()
        return (parts[1::2], found.end()) if parts[::2] == self.pieces else None


def joined(pieces: Sequence[bytes], values: Sequence[bytes]) -> bytes:
    """Return the pieces with the values between them; there is one piece more."""
    parts = [b""] * (2 * len(pieces) - 1)
    parts[::2], parts[1::2] = pieces, values
    return b"".join(parts)


class _Span(NamedTuple):
    """Where in a head a value is that may differ, and of which field: -1 for the first line."""

    start: int
    end: int
    gap: Gap
    field: int


@dataclass(slots=True)
class _Skeleton:
    """What was seen of heads that differ at most in values that may differ: such values, in order.

    `varied`: the places of those that differed. At all others, `shape` has these values. `line`: where it is found.
    """

    values: list[bytes]
    varied: set[int] = field(default_factory=set)
    shape: Shape | None = None
    line: bytes = b""


class Shapes(Generic[Known]):
    """The shapes that were learned, with what their owner knows about each. Bounded; thread-bound.

    `gap_of` says by a field's lower-case name what its value may be instead, None for a value that never differs.
    `ids_vary`: so may ids in the path of a request.
    """

    def __init__(self, gap_of: GapOf, *, ids_vary: bool = False) -> None:
        self._gap_of, self._ids_vary = gap_of, ids_vary
        # Under a digest, so that the values that never differ are not kept for this.
        self._skeletons: dict[bytes, _Skeleton] = {}
        # By the first line; where ids in it differ, without them.
        self._by_line: dict[bytes, list[tuple[Shape, Known]]] = {}
        self._last_with_ids: tuple[Shape, Known] | None = None
        self._looked_up = self._compiled = 0

    def clear(self) -> None:
        """Forget everything."""
        self._skeletons.clear()
        self._by_line.clear()
        self._last_with_ids = None

    def find(self, data: bytes) -> tuple[Known, tuple[bytes, ...], int] | None:
        """Return what is known of the head with which `data` begins, the values in its gaps, and where it ends."""
        self._looked_up += 1
        line = data[: data.find(b"\r\n")]
        shapes = self._by_line.get(line)
        if shapes is None:
            if (one := self._last_with_ids) is None:
                return None
            # Before the line is searched for its ids: half the time (measured).
            if (found := one[0].match(data)) is not None:
                return one[1], *found
            shapes = self._by_line.get(_IDS.sub(_OPEN, line), [])
        for one in shapes:
            if (found := one[0].match(data)) is not None:
                if one is not shapes[0] or -1 in one[0].fields:
                    self._look_here_first(one, shapes)
                return one[1], *found
        return None

    def _look_here_first(self, one: tuple[Shape, Known], shapes: list[tuple[Shape, Known]]) -> None:
        """Look for the next head among these shapes here first."""
        if one is not shapes[0]:
            shapes.remove(one)
            shapes.insert(0, one)
        if -1 in one[0].fields:
            self._last_with_ids = one

    def learn(self, head: bytes) -> Shape | None:
        """Learn from a head that the parser took, and that no shape matches.

        Return the shape that it has from now on, to be kept with `keep`; None where there is no other head like it yet.
        """
        spans = [*self._spans(head)]
        if len(head) > MAX_SHAPED_BYTES or len(spans) > MAX_GAPS:
            return None
        values = [head[start:end] for start, end, _, _ in spans]
        digest = blake2b(_OPEN.join(_around(head, spans)), digest_size=16).digest()
        seen = self._skeletons.pop(digest, None) or _Skeleton(values)
        self._remember(digest, seen)
        differing = {at for at, value in enumerate(values) if value != seen.values[at]}
        if differing <= seen.varied:
            return seen.shape  # others with its first line took its place, else it would have matched
        if not self._may_compile():
            # The values stay those of the shape, if there is one: it has them where nothing varies, and not these.
            return None
        seen.values = values
        seen.varied |= differing
        self._drop(seen)
        spans = [span for at, span in enumerate(spans) if at in seen.varied or span.gap.at_once]
        forms, fields = [span.gap.form for span in spans], [span.field for span in spans]
        seen.shape = Shape(_around(head, spans), forms, fields)
        seen.line = _line(head, seen.shape)
        return seen.shape

    def keep(self, head: bytes, shape: Shape, known: Known) -> None:
        """Keep what is known of the heads of a shape, such as `head`, which `learn` returned."""
        line = _line(head, shape)
        others = [one for one in self._by_line.get(line, ()) if one[0] is not shape]
        self._by_line[line] = [(shape, known), *others[: MAX_TRIED - 1]]
        if -1 in shape.fields:
            self._last_with_ids = self._by_line[line][0]

    def _spans(self, head: bytes) -> Iterator[_Span]:
        """Yield where the values are that may differ; of a field that comes twice none does."""
        line, *fields = head[:-4].split(b"\r\n")
        if self._ids_vary:
            yield from (_Span(*found.span(), _ID, -1) for found in _IDS.finditer(line))
        names = [text.partition(b":")[0].lower() for text in fields]
        counts, at = Counter(names), len(line) + 2
        for number, (name, text) in enumerate(zip(names, fields, strict=True)):
            _, separator, value = text.partition(b": ")
            gap = self._gap_of(name) if counts[name] == 1 and separator else None
            end = at + len(text)
            if gap is not None and re.fullmatch(gap.form, value):
                yield _Span(end - len(value), end, gap, number)
            at = end + 2

    def _may_compile(self) -> bool:
        """Return whether one more expression may be compiled, and count it."""
        self._compiled = max(self._compiled, self._looked_up // HEADS_FOR_ONE - COMPILED_AT_ONCE)
        may = self._compiled < self._looked_up // HEADS_FOR_ONE + COMPILED_AT_ONCE
        self._compiled += may
        return may

    def _remember(self, digest: bytes, skeleton: _Skeleton) -> None:
        if len(self._skeletons) >= MAX_SHAPES:
            self._drop(self._skeletons.pop(next(iter(self._skeletons))))
        self._skeletons[digest] = skeleton

    def _drop(self, skeleton: _Skeleton) -> None:
        """Find no head by the shape of this skeleton any more."""
        shapes = [one for one in self._by_line.pop(skeleton.line, ()) if one[0] is not skeleton.shape]
        if shapes:
            self._by_line[skeleton.line] = shapes


def _around(head: bytes, spans: Sequence[_Span]) -> list[bytes]:
    """Return the pieces of a head around these values."""
    starts, ends = [0, *(span.end for span in spans)], [*(span.start for span in spans), len(head)]
    return [head[start:end] for start, end in zip(starts, ends, strict=True)]


def _line(head: bytes, shape: Shape) -> bytes:
    """Return the first line of a head as its shape is found by it."""
    line = head[: head.find(b"\r\n")]
    return _IDS.sub(_OPEN, line) if -1 in shape.fields else line
