"""Parts of a fingerprint that a rule names: headers, and values of a JSON body in whatever order and spacing."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncegate.keys.fingerprint_parts import BODY_JSON, MAX_COMMAS, NamedParts, fingerprint_source, named_parts
from tests.conftest import searched

many = searched(120)


def read(body: bytes | None, *parts: str, **fields: list[bytes]) -> NamedParts:
    sources = [source for part in parts if (source := fingerprint_source(part))]
    assert len(sources) == len(parts)
    return named_parts(sources, {name.encode(): lines for name, lines in fields.items()}, body)


SAME = {
    "order": [b'{"a": 1, "b": {"c": [], "d": {}}}', b'{"b": {"d": {}, "c": []}, "a": 1}'],
    "space": [b'{"a":[1,2]}', b' {"a" : [ 1,\n2 ] } '],
    "escapes": ['{"ä": "€😀/"}'.encode(), rb'{"\u00e4": "\u20ac\ud83d\ude00\/"}'],
}


@pytest.mark.parametrize("case", SAME)
def test_one_document_in_two_spellings(case):
    """The order of members, white space and escapes do not count."""
    one, other = SAME[case]
    assert read(one, BODY_JSON) == read(other, BODY_JSON)
    assert not read(one, BODY_JSON).with_body


DIFFERENT = [
    b"1", b"1.0", b"1e0", b"-1", b"10", b'"1"', b"true", b"false", b"null", b'""', b"[]", b"{}", b"[[]]", b"[{}]",
    b'{"a": 1}', b'{"a": [1]}', b'{"a": {"b": 1}}', b'{"a": {}, "b": 1}', b'{"b": 1}', b"[1, 2]", b"[2, 1]", b"[12]",
    b'["a", "b"]', b'["ab"]', b'{"ab": "c"}', b'{"a": "bc"}', rb'"\ud800"', rb'"\udc00"', b'"s1:a"', b'["n1:1"]',
    b"[1]", b"[true]",
]  # fmt: skip


def test_documents_that_differ():
    """Types, spelled numbers, the order of a list and the limits of texts count."""
    found = {read(body, BODY_JSON).joined for body in DIFFERENT}
    assert len(found) == len(DIFFERENT)
    assert len({read(b'{"x": %b}' % body, "body:/x") for body in DIFFERENT}) == len(DIFFERENT)
    assert not any(read(body, BODY_JSON).with_body for body in DIFFERENT)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text("ab\u00e4{:1", max_size=3),
    lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text("abc", max_size=2), some, max_size=3),
    max_leaves=6,
)


def typed(value: object) -> object:
    """Return a value in which True is not 1."""
    if isinstance(value, dict):
        return {name: typed(member) for name, member in value.items()}
    return [typed(member) for member in value] if isinstance(value, list) else (type(value), value)


@many
@given(values, values)
def test_two_documents_are_one_only_if_they_are_equal(one, other):
    first, second = read(json.dumps(one).encode(), BODY_JSON), read(json.dumps(other, indent=1).encode(), BODY_JSON)
    assert (first == second) is (typed(one) == typed(other))


def test_only_the_named_values_count():
    """What no part names can differ. A value that is missing is none of those that are there."""
    parts = ("body:/amount", "body:/to/0/id")
    usual = read(b'{"amount": 1, "to": [{"id": 2, "at": 3}], "sent": 4}', *parts)
    assert usual == read(b'{"sent": 5, "to": [{"at": 6, "id": 2}, {"id": 7}], "amount": 1}', *parts)
    others = [b'{"amount": 2, "to": [{"id": 1}]}', b'{"amount": 1}', b'{"to": [{"id": 2}]}', b"{}", b'{"amount": null}',
              b'{"amount": "", "to": [{"id": null}]}']  # fmt: skip
    assert len({usual, *(read(body, *parts) for body in others)}) == len(others) + 1
    assert read(b"[]", *parts) == read(b"{}", *parts) == read(b"1", *parts)


UNREADABLE = {
    "no JSON": b"{",
    "empty": b"",
    "no UTF-8": b'"\xff"',
    "a doubled member": b'{"x": {"a": 1, "a": 1}}',
    "a doubled member in a list": b'{"x": [{"a": 1, "b": 2, "a": 1}]}',
    "deep": b'{"x": ' + b"[" * 65 + b"]" * 65 + b"}",
    "many values": b'{"x": [' + b"1," * MAX_COMMAS + b"1, 1]}",
    "long": b'{"x": "' + b"a" * 1_048_576 + b'"}',
    "NaN": b'{"x": NaN}',
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_body_that_cannot_be_read_counts_as_it_came(case):
    """Such a body enters the fingerprint as it is, beside the parts that can be read."""
    for part in (BODY_JSON, "body:/x"):
        found = read(UNREADABLE[case], part, "header:a", a=[b"1"])
        assert found.with_body
        assert found == read(None, part, "header:a", a=[b"1"])
        assert found != read(UNREADABLE[case], part, "header:a")
        assert found.joined != read(b"{}", part, "header:a", a=[b"1"]).joined
    assert not read(UNREADABLE[case], "header:a").with_body


def test_headers():
    """A header counts by its value. Two lines are their list, and an absent header is not an empty one."""
    values = [{}, {"a": [b""]}, {"a": [b"1"]}, {"a": [b"1, 2"]}, {"b": [b"1"]}, {"a": [b"1"], "b": [b"1"]}]
    assert len({read(None, "header:a", "header:b", **one) for one in values}) == len(values)
    assert read(None, "header:a", a=[b"1", b"2"]) == read(None, "header:a", a=[b"1,2"])
    assert read(None, "header:a", a=[b"1"], c=[b"2"]) == read(None, "header:a", a=[b"1"])


def test_a_hostile_document_costs_bounded_time():
    """The most expensive documents of a MiB take a few times as long as reading a key from them."""
    begun = time.process_time()
    for body in (
        b"[" + b"1," * (MAX_COMMAS - 1) + b"1]",
        b"[" + b"{}," * (MAX_COMMAS - 1) + b"{}]",
        b"{" + b",".join(b'"%d":1' % n for n in range(MAX_COMMAS)) + b"}",
        b"[" + b"1," * 500_000 + b"1]",
    ):
        read(body, BODY_JSON)
    assert time.process_time() - begun < 1
