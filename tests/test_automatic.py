"""A key that a browser made by itself is told apart from an application's, and counts only where nothing else does."""

import pytest

from oncegate.keys.automatic import is_automatic
from oncegate.keys.documents import Missing
from oncegate.keys.extraction import ExtractedKey, SourceInput, extract_key
from oncegate.messages.fields import by_name
from oncegate.messages.request_head import RequestHead
from tests.test_sources import joined, sources

NUMBER = b'"18219755392632761061"'
NAVIGATES, INSECURE = (b"Sec-Fetch-Mode", b"navigate"), (b"Upgrade-Insecure-Requests", b"1")
FORM = (b"Content-Type", b"application/x-www-form-urlencoded")

CASES = {
    "Firefox's form": (NUMBER, [NAVIGATES, INSECURE], True),
    "without TLS": (NUMBER, [INSECURE], True),
    "a short number": (b'"7"', [NAVIGATES], True),
    "a script's fetch": (NUMBER, [(b"Sec-Fetch-Mode", b"cors")], False),
    "a script's fetch, upgraded": (NUMBER, [(b"Sec-Fetch-Mode", b"cors"), INSECURE], False),
    "a program": (NUMBER, [], False),
    "no quotes": (NUMBER.strip(b'"'), [NAVIGATES], False),
    "too long": (b'"182197553926327610611"', [NAVIGATES], False),
    "no number": (b'"order-42"', [NAVIGATES], False),
    "no key": (None, [NAVIGATES], False),
}


def head_of(key: bytes | None, pairs: list[tuple[bytes, bytes]]) -> RequestHead:
    pairs = [*pairs, *([(b"Idempotency-Key", key)] if key is not None else [])]
    return RequestHead("POST", b"/orders", False, b"shop.test", pairs, by_name(pairs))


@pytest.mark.parametrize("case", CASES)
def test_which_keys_a_browser_made(case):
    """A quoted number where a browser navigates: a page cannot give a header to a form."""
    key, pairs, expected = CASES[case]
    assert is_automatic(head_of(key, pairs).fields) is expected


def test_a_key_that_came_twice_is_no_browsers():
    """It is refused as any such key."""
    pairs = [NAVIGATES, (b"Idempotency-Key", b'"1"'), (b"Idempotency-Key", b'"2"')]
    assert not is_automatic(by_name(pairs))


AUTOMATIC = joined(("header:idempotency-key", NUMBER[1:-1]))
TOKEN = joined(("form:token", b"t"))
DERIVED = joined(("derived:10", b"D"))
ORDERS = {
    "a token behind it": (("header:Idempotency-Key", "form:token"), b"token=t", TOKEN),
    "no token behind it": (("header:Idempotency-Key", "form:token"), b"a=1", b"18219755392632761061"),
    "a token before it": (("form:token", "header:Idempotency-Key"), b"token=t", TOKEN),
    "none before it": (("form:token", "header:Idempotency-Key"), b"a=1", AUTOMATIC),
    "a window behind it": (("header:Idempotency-Key", "derived:10"), b"a=1", DERIVED),
    "as a part": (("header:Idempotency-Key + path:1", "derived:10"), b"a=1", DERIVED),
    "alone": (("header:Idempotency-Key",), b"token=t", NUMBER[1:-1]),
    "of another name": (("header:X-Key", "header:Idempotency-Key"), b"", AUTOMATIC),
}


@pytest.mark.parametrize("case", ORDERS)
def test_it_is_the_last_alternative_wherever_it_is_written(case):
    """Two clicks have two such keys: whatever else names the request says more."""
    alternatives, body, expected = ORDERS[case]
    given = SourceInput(head_of(NUMBER, [NAVIGATES, FORM]), body, derived=b"D")
    key = extract_key(sources(*alternatives), given)
    assert isinstance(key, ExtractedKey)
    assert key.key == expected


def test_the_body_is_waited_for_before_it_counts():
    """With the head alone nobody knows yet whether there is a token."""
    given = SourceInput(head_of(NUMBER, [NAVIGATES, FORM]))
    assert extract_key(sources("header:Idempotency-Key", "form:token"), given) is None
    assert isinstance(extract_key(sources("form:token"), given._replace(body=b"a=1")), Missing)


def test_an_applications_key_keeps_its_place():
    """A script may send a number in quotes as well."""
    given = SourceInput(head_of(NUMBER, [(b"Sec-Fetch-Mode", b"cors"), FORM]), b"token=t", derived=b"D")
    key = extract_key(sources("header:Idempotency-Key", "form:token"), given)
    assert isinstance(key, ExtractedKey)
    assert key.key == NUMBER[1:-1]
