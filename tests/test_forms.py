"""Multipart bodies known by their parts: the boundary does not count, and everything else does."""

import time
from itertools import permutations

import aiohttp
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from oncegate.keys.documents import MAX_FIELDS
from oncegate.keys.forms import Form, form_of, is_multipart
from tests.conftest import searched

many = searched(120)

BROWSERS = (b"----WebKitFormBoundary7MA4YWxkTrZu0gW1", b"---------------------------735323031399963166993862150")
NAME = b'Content-Disposition: form-data; name="%b"\r\n\r\n%b'
FILE = b'Content-Disposition: form-data; name="f"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n%b'


def kind(boundary: bytes, before: bytes = b"multipart/form-data; boundary=") -> dict[bytes, list[bytes]]:
    return {b"content-type": [before + boundary]}


def written(boundary: bytes, parts: list[bytes]) -> bytes:
    return b"".join(b"--%b\r\n%b\r\n" % (boundary, part) for part in parts) + b"--%b--\r\n" % boundary


def form(boundary: bytes, *parts: bytes) -> Form | None:
    return form_of(kind(boundary), [written(boundary, list(parts))])


ORDER = (NAME % (b"sku", b"1"), NAME % (b"note", b"a\r\n--b\r\n"), FILE % b"\x89\r\n\x00--")


def test_the_boundary_does_not_count():
    """A form that is sent again has another boundary and is the same form."""
    forms = {form(boundary, *ORDER) for boundary in (*BROWSERS, b"a1", b"x" * 70)}
    assert len(forms) == 1
    assert None not in forms
    again = written(b"a1", list(ORDER))
    for types in (b'Multipart/Form-Data ; boundary="a1"', b"multipart/form-data;BOUNDARY=a1;"):
        assert form_of({b"content-type": [types]}, [again]) in forms


OTHERS = {
    "a value": (NAME % (b"sku", b"2"), *ORDER[1:]),
    "a name": (NAME % (b"sky", b"1"), *ORDER[1:]),
    "a file": (*ORDER[:2], FILE % b"\x89\r\n\x00---"),
    "a file's name": (*ORDER[:2], ORDER[2].replace(b"a.png", b"b.png")),
    "a part less": ORDER[:2],
    "a part twice": (*ORDER, ORDER[2]),
    "a part in two": (ORDER[0] + b"\r\n", *ORDER[1:]),
    "no part": (),
}


def test_everything_else_counts():
    """Another value, name, file or order of the parts is another form, and so is another type."""
    forms = [form(BROWSERS[0], *parts) for parts in (*permutations(ORDER), *OTHERS.values())]
    body = [written(b"a1", list(ORDER))]
    types = (
        b"multipart/mixed; boundary=",
        b"multipart/form-data; charset=utf-8; boundary=",
        b"multipart/x; a=b; boundary=",
    )
    forms += [form_of(kind(b"a1", before), body) for before in types]
    forms += [form_of(kind(b"a1"), [b"x\r\n" + body[0]]), form_of(kind(b"a1"), [body[0] + b"x"])]
    assert None not in forms
    assert len(set(forms)) == len(forms)


text = st.binary(max_size=12) | st.sampled_from([b"\r\n", b"\n", b"--", b"\r\n--", b"-", b"a", b"ab", b""])
parts = st.lists(st.lists(text, max_size=3).map(b"".join), max_size=3)


@many
@given(parts, parts, st.integers(1, 9), st.integers(1, 60))
def test_two_bodies_are_one_only_with_the_same_parts(one, other, first, second):
    """However they are cut into blocks, and whatever their parts hold: two forms are one exactly if their parts are."""

    def cut(boundary: bytes, some: list[bytes], size: int) -> Form | None:
        body = written(boundary, some)
        return form_of(kind(boundary), [body[at : at + size] for at in range(0, len(body), size)])

    found, again = cut(b"aZ1", one, first), cut(b"-bZ", other, second)
    assert found is not None
    assert again is not None
    assert (found == again) is (one == other)


def test_forms_as_clients_write_them():
    """Each submission by a well-known client has a boundary of its own, and they are one form."""
    bodies = []
    for _ in range(2):
        files = {"photo": ('a"b;\n.png', b"\x00\r\n--", "image/png")}
        made = requests.Request("POST", "http://a.test", data={"token": "ä"}, files=files).prepare()
        bodies.append((made.headers["Content-Type"].encode(), made.body))
    assert bodies[0] != bodies[1]
    first, second = (form_of({b"content-type": [types]}, [body]) for types, body in bodies)
    assert first == second is not None


async def test_forms_as_aiohttp_writes_them():
    forms = []
    for _ in range(2):
        made = aiohttp.FormData()
        made.add_field("photo", b"\x00", filename="ä.png", content_type="image/png")
        writer = made()
        forms.append(form_of({b"content-type": [writer.headers["Content-Type"].encode()]}, [await writer.as_bytes()]))
    assert forms[0] == forms[1] is not None


WHOLE = written(b"XyZ", [NAME % (b"a", b"1")])
NOT_PLAIN = {
    "nothing": b"",
    "no form": b"a=1",
    "no end": WHOLE[:-4],
    "half an end": WHOLE[:-3],
    "a line that goes on": WHOLE.replace(b"XyZ\r\n", b"XyZ \r\n"),
    "a longer boundary": WHOLE.replace(b"XyZ\r\n", b"XyZa\r\n"),
    "half a line end": WHOLE.replace(b"\r\n\r\n1", b"\r\n\r\n1\n--XyZ\r\n"),
    "the other half": WHOLE.replace(b"\r\n\r\n1", b"\r\n\r\n1\r--XyZ\r\n"),
    "within a line": WHOLE.replace(b"1", b"1--XyZ"),
    "before the first": b"--XyZ" + WHOLE,
    "after the end": WHOLE + b"--XyZ",
    "text behind the end": WHOLE[:-2] + b"x",
    "a space behind the end": WHOLE[:-2] + b" \r\n",
    "half a line end behind the end": WHOLE[:-1],
    "a second form": WHOLE + WHOLE,
    "lines of LF": WHOLE.replace(b"\r\n", b"\n"),
    "too many parts": written(b"XyZ", [b"a"] * (MAX_FIELDS + 1)),
}


@pytest.mark.parametrize("case", NOT_PLAIN)
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_a_body_that_counts_as_it_came(case, size):
    """A body is no form where two parsers could cut it differently, in whatever blocks it comes."""
    body = NOT_PLAIN[case]
    assert form_of(kind(b"XyZ"), [body[at : at + size] for at in range(0, len(body), size)]) is None


@pytest.mark.parametrize(
    "fields",
    [
        {},
        kind(b"XyZ", b"application/x; boundary="),
        kind(b"", b"multipart/form-data"),
        kind(b"XyZ", b"multipart/form-data; x-boundary=a; boundary="),
        {b"content-type": [b"multipart/form-data; boundary=XyZ"] * 2},
        {**kind(b"XyZ"), b"content-encoding": [b"gzip"]},
    ],
)
def test_a_head_that_names_no_form(fields):
    """Without one plain boundary, or with an encoding, a body counts as it came."""
    assert form_of(fields, [WHOLE]) is None
    assert form_of(kind(b"XyZ"), [WHOLE]) is not None
    assert not is_multipart({})


def test_a_hostile_form_costs_bounded_time():
    """A body of boundaries, and one that almost is one, take little more time than any other."""
    begun = time.process_time()
    for block in (b"\r\n--X" * 52_428, b"\r\n--" * 65_536, b"\r" * 262_144, b"-" * 262_144):
        form_of(kind(b"X"), [block] * 4)
        form_of(kind(b"-" * 69 + b"X"), [block] * 4)
    assert time.process_time() - begun < 0.5
