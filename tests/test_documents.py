"""Keys in JSON documents and forms: which values are read, which are refused, and what a hostile body costs."""

import json
import time

import pytest

from oncegate.keys.documents import MAX_BYTES, MAX_DEPTH, MAX_FIELDS, Missing, form_value, json_value, parse_pointer
from oncegate.keys.syntax import BadKey

DOCUMENT = json.dumps(
    {
        "id": "evt_1",
        "n": 1,
        "yes": True,
        "no": False,
        "null": None,
        "empty": "",
        "data": {"object": {"id": "ch_1"}, "list": [{"id": "a"}, "b", 3]},
        "a/b": "slash",
        "m~n": "tilde",
        "": "nameless",
        " ": {"": "below"},
        "ü": "ü€",
        "0": "zero",
    }
).encode()

FOUND = {
    "/id": b"sevt_1",
    "/n": b"n1",
    "/yes": b"true",
    "/no": b"false",
    "/data/object/id": b"sch_1",
    "/data/list/0/id": b"sa",
    "/data/list/1": b"sb",
    "/data/list/2": b"n3",
    "/a~1b": b"sslash",
    "/m~0n": b"stilde",
    "/": b"snameless",
    "/ /": b"sbelow",
    "/ü": b"s" + "ü€".encode(),
    "/0": b"szero",
}
MISSING = ["/x", "/id/x", "/data/list/3", "/data/list/-", "/data/list/01", "/data/list/-1", "/data/list/x", "/null",
           "/empty", "/n/0", "/data/list/1/0", "/data/list/99999999999"]  # fmt: skip


@pytest.mark.parametrize("pointer", FOUND)
def test_a_pointer_names_a_value(pointer):
    """A pointer follows RFC 6901, with its escapes and indices. The value is tagged with its type."""
    assert json_value(DOCUMENT, parse_pointer(pointer)) == FOUND[pointer]


@pytest.mark.parametrize("pointer", MISSING)
def test_where_nothing_stands(pointer):
    """An absent member or index, null and the empty string count as missing."""
    assert isinstance(json_value(DOCUMENT, parse_pointer(pointer)), Missing)


@pytest.mark.parametrize("pointer", ["/data", "/data/list", "/data/object"])
def test_an_object_or_array_is_no_key(pointer):
    assert isinstance(json_value(DOCUMENT, parse_pointer(pointer)), BadKey)


@pytest.mark.parametrize("text", ["", "id", "#/id", "/a~", "/a~2b", "/~/x"])
def test_what_is_no_pointer(text):
    with pytest.raises(ValueError, match="pointer"):
        parse_pointer(text)


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b'{"id": 1}', b"n1"),
        (b'{"id": 1.0}', b"n1.0"),
        (b'{"id": 1e400}', b"n1e400"),
        (b'{"id": -0}', b"n-0"),
        (b'{"id": 123456789012345678901234567890}', b"n123456789012345678901234567890"),
        (b'{"id": "1"}', b"s1"),
        (b'{"id": "\\u00e9"}', b"s\xc3\xa9"),
        (b'{"id": "\xc3\xa9"}', b"s\xc3\xa9"),
        (b'{"id": "\\ud83d\\ude00"}', b"s\xf0\x9f\x98\x80"),
        (b'{"i\\u0064": "a"}', b"sa"),
        (b' \r\n\t{"id"\n:\t"a"} ', b"sa"),
        (b'{"other": [1, 1], "other": 2, "id": "a"}', b"sa"),
        (b'{"id": "' + b"a" * 1024 + b'"}', b"s" + b"a" * 1024),
    ],
)
def test_how_values_are_read(body, value):
    """A number is read as written, a string by its value. The rest of the document does not matter."""
    assert json_value(body, ("id",)) == value


BAD = {
    "nothing": b"",
    "no JSON": b"id=1",
    "half": b'{"id": "a"',
    "more behind": b'{"id": "a"} x',
    "two documents": b'{"id": "a"}{"id": "a"}',
    "invalid UTF-8": b'{"id": "\xff"}',
    "invalid UTF-8 elsewhere": b'{"id": "a", "x": "\xc3"}',
    "UTF-16": '{"id": "a"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"id": "a"}',
    "a surrogate": b'{"id": "\\ud800"}',
    "the member twice": b'{"id": "a", "id": "b"}',
    "the member twice, equal": b'{"id": "a", "id": "a"}',
    "the member twice, escaped": b'{"id": "a", "\\u0069d": "b"}',
    "NaN": b'{"id": NaN}',
    "Infinity elsewhere": b'{"id": "a", "x": -Infinity}',
    "a control character": b'{"id": "a\nb"}',
    "a comment": b'{"id": "a" /* x */}',
    "a trailing comma": b'{"id": "a",}',
    "single quotes": b"{'id': 'a'}",
    "too long a key": b'{"id": "' + b"a" * 1025 + b'"}',
    "too many digits": b'{"id": ' + b"1" * 1025 + b"}",
    "too many brackets": b'{"id": "a", "x": [' + b"[]," * 50_000 + b"{}]}",
    "too deep behind a backslash": b'{"id": "a", "x": "\\\\", "y": ' + b"[" * 70 + b"]" * 70 + b', "z": "]\\\\"}',
    "over the limit": b'{"id": "a", "x": "' + b"x" * MAX_BYTES + b'"}',
    "too deep": b'{"id": "a", "x": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}",
    "too deep by objects": b'{"x":' * 70 + b"1" + b"}" * 70,
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_document_with_a_key(name):
    """A document that is ambiguous, malformed or over a limit yields a bad key."""
    assert isinstance(json_value(BAD[name], ("id",)), BadKey)


def test_the_member_twice_on_the_way():
    """Where an object on the way has two members of that name, neither is followed."""
    assert isinstance(json_value(b'{"a": {"id": 1}, "a": {"id": 1}}', ("a", "id")), BadKey)


@pytest.mark.parametrize(
    "body",
    [
        b'{"id": "a", "x": ' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}",
        b'{"id": "a", "x": "' + b"[" * 1000 + b'"}',
        b'{"id": "a", "x": "' + b'\\"[{' * 1000 + b'"}',
        b'{"id": "a", "x": "\\\\", "y": "' + b"[" * 1000 + b'"}',
        b'{"id": "a", "x": "\\\\\\"' + b"[" * 1000 + b'"}',
        b'{"id": "a", "x": [' + b"[]," * 1000 + b"{}]}",
    ],
    ids=[
        "as deep as may be",
        "brackets in a text",
        "brackets in an escaped text",
        "behind a backslash",
        "behind a backslash and a quote",
        "wide",
    ],
)
def test_what_is_not_too_deep(body):
    """The depth limit counts nesting, not brackets."""
    assert json_value(body, ("id",)) == b"sa"


SIZE = MAX_BYTES - 100
HOSTILE = {
    "arrays": b"[" * SIZE,
    "objects": b'{"a":' * (SIZE // 5),
    "closed arrays": b"[" * (SIZE // 2) + b"]" * (SIZE // 2),
    "flat objects": b"[" + b"{}," * (SIZE // 3) + b"{}]",
    "flat arrays": b"[" + b"[]," * (SIZE // 3) + b"[]]",
    "duplicates": b"{" + b'"id":1,' * (SIZE // 7) + b'"id":1}',
    "digits": b'{"id":' + b"1" * SIZE + b"}",
    "digits with a fraction": b'{"id":' + b"1" * (SIZE // 2) + b"." + b"1" * (SIZE // 2) + b"e99}",
    "10 MB of digits": b"1" * 10_000_000,
    "quotes": b'"' * SIZE,
    "escaped quotes": b'"' + b'\\"' * (SIZE // 2),
    "backslashes": b'"' + b"\\" * SIZE,
    "unterminated with brackets": b'[{"' + b'\\"[{' * (SIZE // 4),
    "numbers": b"[" + b"1," * (SIZE // 2) + b"1]",
    "as many brackets as may be": b"[" + b"[]," * 49_000 + b"{}]" + b" " * 1_000_000,
    "texts": b"[" + b'"",' * (SIZE // 3) + b"1]",
    "texts beside brackets": b"[" * 65 + b'"",' * (SIZE // 3) + b"1",
    "names": b"{" + b",".join(b'"%d":1' % n for n in range(90_000)) + b"}",
    "invalid UTF-8": b"\xff" * SIZE,
    "spaces": b" " * SIZE,
    "escapes": b'{"id": "' + b"\\u0061" * (SIZE // 6) + b'"}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_body_costs_bounded_time(name):
    """Reading a key from any body takes a fraction of a second (about 40 ms at most on an idle machine)."""
    began = time.process_time()
    found = json_value(HOSTILE[name], ("id",))
    assert time.process_time() - began < 0.5
    assert isinstance(found, BadKey | Missing)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"token=a&b=c", b"a"),
        (b"b=c&token=a", b"a"),
        (b"token=a%20b+c%2B", b"a b c+"),
        (b"%74oken=a", b"a"),
        (b"token=\xff%ff", b"\xff\xff"),
        (b"token=a=b", b"a=b"),
        (b"&&token=a&", b"a"),
        (b"token=%zz%", b"%zz%"),
        (b"token;x=1&token=a", b"a"),
    ],
)
def test_a_field_of_a_form(text, value):
    """A field has its one value, decoded."""
    assert form_value(text, b"token", "form") == value


@pytest.mark.parametrize("text", [b"", b"x=1", b"token=", b"token", b"Token=a", b"token%00=a", b"xtoken=a"])
def test_a_field_that_is_not_there(text):
    assert isinstance(form_value(text, b"token", "form"), Missing)


@pytest.mark.parametrize(
    "text",
    [
        b"token=a&token=b",
        b"token=a&t%6Fken=a",
        b"token=a&token=",
        b"token=a" + b"&x=1" * MAX_FIELDS,
        b"token=" + b"a" * 1025,
        b"token=a&x=" + b"x" * MAX_BYTES,
    ],
    ids=["twice", "twice in disguise", "twice, once empty", "too many", "too long", "over the limit"],
)
def test_a_form_without_a_usable_field(text):
    found = form_value(text, b"token", "form")
    assert isinstance(found, BadKey)
    assert "form" in found.detail


@pytest.mark.parametrize("text", [b"&" * SIZE, b"%41" * (SIZE // 3), b"=" * SIZE, b"token%" * (SIZE // 6)])
def test_a_hostile_form_costs_bounded_time(text):
    began = time.process_time()
    form_value(text, b"token", "form")
    assert time.process_time() - began < 0.5
