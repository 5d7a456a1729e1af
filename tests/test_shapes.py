"""Shapes of heads: whatever one matches differs from the heads it was learned from in its gaps alone."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oncegate.known_heads import shapes
from oncegate.known_heads.shapes import (
    COMPILED_AT_ONCE,
    HEADS_FOR_ONE,
    MAX_GAPS,
    MAX_SHAPED_BYTES,
    MAX_SHAPES,
    MAX_TRIED,
    PLAIN,
    Gap,
    Shapes,
    joined,
)

FIXED = {b"host", b"authorization"}
LENGTH = Gap(rb"(?:0|[1-9][0-9]{0,8}+)", at_once=True)


def gap_of(name: bytes) -> Gap | None:
    if name in FIXED:
        return None
    return LENGTH if name == b"content-length" else PLAIN


class Table:
    """A table whose owner keeps the number of the head by which a shape was learned."""

    def __init__(self) -> None:
        self.shapes, self.learned = Shapes[int](gap_of), 0

    def take(self, head: bytes) -> tuple[int, tuple[bytes, ...], int] | None:
        """Look a head up, and learn from it if it is not known."""
        if (found := self.shapes.find(head)) is None and (shape := self.shapes.learn(head)) is not None:
            self.learned += 1
            self.shapes.keep(head, shape, self.learned)
        return found


def head(*fields: bytes, line: bytes = b"POST /a HTTP/1.1") -> bytes:
    return b"\r\n".join((line, *fields, b"", b""))


def one(trace: bytes, *, agent: bytes = b"a", token: bytes = b"t", line: bytes = b"POST /a HTTP/1.1") -> bytes:
    return head(b"Host: a", b"Authorization: " + token, b"User-Agent: " + agent, b"Trace: " + trace, line=line)


def taught(*heads: bytes) -> Table:
    table = Table()
    for each in heads:
        table.take(each)
    return table


def test_a_value_that_differed_may_differ_again():
    """Two heads teach what varies, and the third is known, with its own value; a body may follow."""
    table = taught(one(b"1"), one(b"2"))
    assert table.take(one(b"33") + b"body") == (1, (b"33",), len(one(b"33")))


def test_a_value_that_did_not_differ_is_fixed_until_it_does():
    """The shape of heads grows by the fields that turn out to differ."""
    table = taught(one(b"1"), one(b"2"))
    assert table.take(one(b"3", agent=b"b")) is None
    assert table.take(one(b"4", agent=b"c")) == (2, (b"c", b"4"), len(one(b"4", agent=b"c")))
    assert table.take(one(b"5")) == (2, (b"a", b"5"), len(one(b"5")))


def test_what_may_not_vary_makes_another_shape():
    """A fixed value is part of what is compared, so that nobody is taken for somebody else."""
    table = taught(one(b"1"), one(b"2"))
    assert table.take(one(b"3", token=b"u")) is None
    assert table.take(one(b"4", token=b"u")) is None
    assert table.take(one(b"5", token=b"u")) == (2, (b"5",), len(one(b"5")))
    assert table.take(one(b"6")) == (1, (b"6",), len(one(b"6")))
    assert table.take(one(b"7", token=b"v")) is None


@pytest.mark.parametrize(
    "value",
    [b"", b" 1", b"1 ", b"1\t2", b"\xe9", b"1\0", b"1\x7f", b"1\n", b"1\r", b"1\r\nX: 1", b"1" * 2049],
)
def test_an_unusual_value_goes_through_the_parser(value):
    """A gap takes what every parser takes as it is."""
    table = taught(one(b"1"), one(b"2"))
    assert table.take(one(value)) is None
    assert table.take(one(b"3")) == (1, (b"3",), len(one(b"3")))


@pytest.mark.parametrize(
    "other",
    [
        head(b"Host: a", b"Authorization: t", b"User-Agent: a", b"trace: 3"),
        head(b"Host: a", b"Authorization: t", b"User-Agent: a", b"Trace:3"),
        head(b"Host: a", b"Authorization: t", b"User-Agent: a", b"Trace : 3"),
        head(b"Host: a", b"Authorization: t", b"User-Agent: a", b"Trace: 3", b"X: 1"),
        head(b"Host: a", b"Authorization: t", b"Trace: 3", b"User-Agent: a"),
        head(b"Host: a", b"Authorization: t", b"User-Agent: a"),
        head(b"Host: a", b"User-Agent: a", b"Trace: 3"),
        one(b"3", line=b"POST /b HTTP/1.1"),
        one(b"3")[:-2],
    ],
)
def test_other_lines_are_another_shape(other):
    """Names, their spelling and their order, and the first line are fixed."""
    assert taught(one(b"1"), one(b"2")).take(other) is None


def test_what_comes_twice_does_not_vary():
    """Which of two lines counts is for the parser to say."""
    twice = [head(b"Host: a", b"X: 1", b"x: " + value) for value in (b"1", b"2", b"3", b"4")]
    table = taught(*twice)
    assert table.learned == 0


def test_a_length_is_a_gap_at_once():
    """Where two heads differ in another field alone, the length may differ, too; in digits without a sign or zeros."""
    lengths = [head(b"Host: a", b"Trace: " + value, b"Content-Length: 5") for value in (b"1", b"2")]
    table = taught(*lengths)
    for text, known in ((b"7", True), (b"0", True), (b"07", False), (b"+7", False), (b"7,7", False), (b"7 ", False)):
        found = table.shapes.find(head(b"Host: a", b"Trace: 3", b"Content-Length: " + text))
        assert (found is not None) is known, text


def test_long_heads_are_not_known():
    """Neither is one learned, nor does one match that is too long with all its values."""
    table = taught(one(b"1", agent=b"a"), one(b"2", agent=b"b"))
    sizes = [len(one(b"3" * count, agent=b"c" * count)) for count in (2000, 2048)]
    assert sizes[0] <= MAX_SHAPED_BYTES < sizes[1]
    assert table.take(one(b"3" * 2000, agent=b"c" * 2000)) is not None
    assert table.take(one(b"3" * 2048, agent=b"c" * 2048)) is None
    many = [head(b"Host: a", *(b"X%d: %d" % (at, at + more) for at in range(MAX_GAPS + 1))) for more in range(4)]
    assert taught(*many).learned == 0


def test_the_table_is_bounded():
    """So many kinds of heads are remembered, and so many shapes with one first line, the newest."""
    table = Table()
    for number in range(2 * MAX_SHAPES):
        for trace in (b"1", b"2"):
            table.take(one(trace, token=b"%d" % number))
    assert len(table.shapes._skeletons) == MAX_SHAPES
    assert sum(map(len, table.shapes._by_line.values())) == MAX_TRIED
    table.shapes.clear()
    assert table.shapes._skeletons == {}
    assert table.shapes._by_line == {}


def test_a_shape_that_lost_its_place_gets_it_back():
    """Others with its first line took it. Nothing is compiled anew."""
    table = taught(*(one(trace, token=b"%d" % number) for number in range(MAX_TRIED + 1) for trace in (b"1", b"2")))
    compiled = table.shapes._compiled
    assert table.take(one(b"3", token=b"0")) is None
    assert table.take(one(b"4", token=b"0")) is not None
    assert table.shapes._compiled == compiled


def test_compiling_is_rationed(monkeypatch):
    """Whoever varies everything makes the proxy compile a few expressions, and then one in so many heads."""
    compiled = []
    monkeypatch.setattr(shapes.re, "compile", lambda pattern: compiled.append(pattern) or re._compiler.compile(pattern))
    table, heads = Table(), 100 * HEADS_FOR_ONE
    for number in range(heads):
        table.take(one(b"%d" % (number % 2), token=b"%d" % (number // 2)))
    assert len(compiled) <= COMPILED_AT_ONCE + heads // HEADS_FOR_ONE + 1
    assert not any(b"Authorization" in pattern for pattern in compiled)


def test_a_head_is_not_taken_for_one_of_a_shape_that_could_not_be_compiled(monkeypatch):
    """While nothing may be compiled, a shape is not given to a head with another value where it has a fixed one."""
    monkeypatch.setattr(shapes, "COMPILED_AT_ONCE", 1)
    table = taught(one(b"1"), one(b"2"))
    assert table.learned == 1
    for number in range(3):
        assert table.take(one(b"%d" % number, agent=b"b")) is None
    assert table.learned == 1
    assert table.take(one(b"3"))[:2] == (1, (b"3",))


VALUES = st.sampled_from(
    [b"1", b"2", b"a b", b"x" * 70, b"", b" 1", b"\xc3\xa9", b"1\t2", b"1: 2", b'{"a":1}', b"0", b"17"]
)
NAMES = st.sampled_from(
    [b"Trace", b"trace", b"Baggage", b"Authorization", b"Content-Length", b"X_Trace", b"User-Agent"]
)
LINES = st.sampled_from([b"POST /a HTTP/1.1", b"POST /b HTTP/1.1"])


@st.composite
def traffic(draw: st.DrawFn) -> list[bytes]:
    """Return heads of a few kinds, whose values differ."""
    kinds = draw(st.lists(st.tuples(LINES, st.lists(NAMES, max_size=5)), min_size=1, max_size=3))
    heads = []
    for _ in range(draw(st.integers(10, 30))):
        line, names = draw(st.sampled_from(kinds))
        heads.append(head(*(name + b": " + draw(VALUES) for name in names), line=line))
    return heads


def test_a_known_head_differs_in_its_gaps_alone():
    """The head that is put together from the pieces and the values is the head; what is fixed equals the teacher's."""
    hits = 0

    @settings(max_examples=400, deadline=None, database=None, derandomize=True)
    @given(traffic())
    def check(heads: list[bytes]) -> None:
        nonlocal hits
        table, made = Shapes[tuple[bytes, shapes.Shape]](gap_of), 0
        for each in heads:
            if (found := table.find(each + b"\r\n\r\nbody")) is None:
                if (shape := table.learn(each)) is not None:
                    assert shape.match(each) is not None
                    table.keep(each, shape, (each, shape))
                    made += 1
                continue
            hits += 1
            (teacher, shape), values, end = found
            assert each + b"\r\n\r\nbody"[: end - len(each)] == joined(shape.pieces, values)
            assert end == len(each)
            ours, theirs = each.split(b"\r\n"), teacher.split(b"\r\n")
            assert len(ours) == len(theirs)
            assert ours[0] == theirs[0]
            for at, (our, their) in enumerate(zip(ours[1:], theirs[1:], strict=True)):
                assert our == their or (at in shape.fields and our.partition(b": ")[0] == their.partition(b": ")[0])
                name = our.partition(b": ")[0].lower()
                assert at not in shape.fields or name not in FIXED

    check()
    assert hits > 400, "the table was hardly used"
