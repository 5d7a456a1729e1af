"""Shapes of heads: the bytes that heads of one kind have in common, with gaps where their values differ.

Which values differ is learned from two heads that are equal but for fields that may vary, and no field may vary unless
the owner of the table says so by its name. A shape is a fixed text but for its gaps: a head that matches has the same
lines and the same field names in the same order, and nothing else than a value of its form in each gap.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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

GapOf = Callable[[bytes], Gap | None]


class Shape:
    """The shape of heads. `fields`: which fields of the head have the gaps, counted from 0; `pieces`: what is around.

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


@dataclass(slots=True)
class _Skeleton:
    """What was seen of heads that differ at most in values that may differ: the newest of these, by field.

    `varied`: the fields that differed.
    """

    line: bytes
    values: dict[int, bytes]
    varied: set[int] = field(default_factory=set)
    shape: Shape | None = None


class Shapes(Generic[Known]):
    """The shapes that were learned, with what their owner knows about each. Bounded; thread-bound.

    `gap_of` says by a field's lower-case name what its value may be instead, None for a value that never differs.
    """

    def __init__(self, gap_of: GapOf) -> None:
        self._gap_of = gap_of
        # Under a digest, so that the values that never differ, credentials among them, are not kept for this.
        self._skeletons: dict[bytes, _Skeleton] = {}
        self._by_line: dict[bytes, list[tuple[Shape, Known]]] = {}
        self._looked_up = self._compiled = 0

    def clear(self) -> None:
        """Forget everything."""
        self._skeletons.clear()
        self._by_line.clear()

    def find(self, data: bytes) -> tuple[Known, tuple[bytes, ...], int] | None:
        """Return what is known of the head with which `data` begins, the values in its gaps, and where it ends."""
        self._looked_up += 1
        shapes = self._by_line.get(data[: data.find(b"\r\n")])
        for at, (shape, known) in enumerate(shapes or ()):
            if (found := shape.match(data)) is not None:
                if at and shapes:  # the next head is looked for here first
                    shapes.insert(0, shapes.pop(at))
                return known, *found
        return None

    def learn(self, head: bytes) -> Shape | None:
        """Learn from a head that the parser took, and that no shape matches.

        Return the shape that it has from now on, to be kept with `keep`; None where there is no other head like it yet.
        """
        first, *fields = head[:-4].split(b"\r\n")
        gaps = self._gaps(fields)
        if len(head) > MAX_SHAPED_BYTES or len(gaps) > MAX_GAPS:
            return None
        values = {at: fields[at].partition(b": ")[2] for at in gaps}
        fixed = [_label(line) + _OPEN if at in gaps else line for at, line in enumerate(fields)]
        digest = blake2b(b"\r\n".join((first, *fixed)), digest_size=16).digest()
        before = self._skeletons.pop(digest, None)
        seen = before or _Skeleton(first, values)
        differing = {at for at in gaps if values[at] != seen.values[at]}
        seen.values = values
        self._remember(digest, seen)
        if differing <= seen.varied:
            return seen.shape  # others with its first line took its place, else it would have matched
        if not self._may_compile():
            return None
        seen.varied |= differing
        self._drop(seen)
        fields_of_gaps = [at for at, gap in gaps.items() if at in seen.varied or gap.at_once]
        seen.shape = _shape(head, fields, fields_of_gaps, [gaps[at].form for at in fields_of_gaps])
        return seen.shape

    def keep(self, head: bytes, shape: Shape, known: Known) -> None:
        """Keep what is known of the heads of a shape, such as `head`, which `learn` returned."""
        line = head[: head.find(b"\r\n")]
        others = [one for one in self._by_line.get(line, ()) if one[0] is not shape]
        self._by_line[line] = [(shape, known), *others[: MAX_TRIED - 1]]

    def _gaps(self, fields: Sequence[bytes]) -> dict[int, Gap]:
        """Return the fields whose values may differ, with what they may be; one that comes twice is none of them."""
        names = [line.partition(b":")[0].lower() for line in fields]
        counts = Counter(names)
        gaps = {at: self._gap_of(name) for at, name in enumerate(names) if counts[name] == 1}
        return {
            at: gap
            for at, gap in gaps.items()
            if gap is not None and re.fullmatch(gap.form, fields[at][len(_label(fields[at])) :])
        }

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


def _label(line: bytes) -> bytes:
    """Return the beginning of a field's line that is before its value."""
    name, separator, _ = line.partition(b": ")
    return name + separator


def _shape(head: bytes, fields: Sequence[bytes], open_fields: Sequence[int], forms: Sequence[bytes]) -> Shape:
    """Return the shape of a head with gaps in these fields."""
    pieces, at, begun = [], head.find(b"\r\n") + 2, 0
    for number, line in enumerate(fields):
        if number in open_fields:
            pieces.append(head[begun : at + len(_label(line))])
            begun = at + len(line)
        at += len(line) + 2
    return Shape([*pieces, head[begun:]], forms, open_fields)
