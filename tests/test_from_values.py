"""Keys of values that a person gives are those that the same values made in a request, whatever the source."""

import json
from typing import NamedTuple

import pytest

from oncegate.keys.extraction import ExtractedKey, SourceInput, extract_key
from oncegate.keys.from_values import keys_of_values
from oncegate.keys.sources import KeySources
from oncegate.messages.fields import by_name
from oncegate.messages.request_head import RequestHead
from oncegate.rules.fields import RULE

DESTINATION, FORM = b"payments", "application/x-www-form-urlencoded"


class Sent(NamedTuple):
    """A request, and the values that a person has of it."""

    key: object
    values: list[str]
    target: str = "/hooks/a"
    body: bytes = b""
    headers: tuple[str, ...] = ()


REQUESTS = {
    "one header": Sent("header:X-Id", ["k-1"], headers=("X-Id: k-1",)),
    "one header in quotes": Sent("header:X-Id", ["k-1"], headers=('X-Id: "k-1"',)),
    "a text in a body": Sent("body:/id", ["evt_9"], body=b'{"id": "evt_9"}'),
    "a number in a body": Sent("body:/id", ["17"], body=b'{"id": 17}'),
    "digits as a text": Sent("body:/id", ["17"], body=b'{"id": "17"}'),
    "true in a body": Sent("body:/id", ["true"], body=b'{"id": true}'),
    "a fraction": Sent("body:/id", ["1.50"], body=b'{"id": 1.50}'),
    "two parts": Sent(["header:X-User", "body:/a/b"], ["a", "7"], body=b'{"a": {"b": 7}}', headers=("X-User: a",)),
    "two numbers": Sent(["body:/a", "body:/b"], ["1", "2"], body=b'{"a": 1, "b": "2"}'),
    "a receiver": Sent(["receiver", "body:/id"], ["evt_9"], body=b'{"id": "evt_9"}'),
    "a receiver at the end": Sent(["header:X-Id", "receiver"], ["9"], headers=("X-Id: 9",)),
    "a query": Sent("query:id", ["a b"], target="/hooks/a?id=a%20b"),
    "a segment": Sent("path:2", ["a"]),
    "a form": Sent("form:id", ["ä"], body="id=ä".encode(), headers=(f"Content-Type: {FORM}",)),
    "an event": Sent(["cloudevent:id", "cloudevent:source"], ["1", "/s"], headers=("ce-id: 1", "ce-source: %2Fs")),
    "identities": Sent(["id=header:X-Id", "who=body:/who"], ["1", "2"], body=b'{"who": 2}', headers=("X-Id: 1",)),
    "identities of texts": Sent(["b=query:x", "a=body:/a"], ["1", "t"], target="/?x=1", body=b'{"a": "t"}'),
    "the second way": Sent([["header:X-Id"], ["body:/id"]], ["z"], body=b'{"id": "z"}'),
    "the second header": Sent([["header:A"], ["header:X-Id"]], ["z"], headers=("X-Id: z",)),
}  # fmt: skip


def given(sent: Sent) -> tuple[KeySources, RequestHead]:
    pairs = [(name.encode(), value.encode()) for name, _, value in (line.partition(": ") for line in sent.headers)]
    head = RequestHead("POST", sent.target.encode(), False, b"up", pairs, by_name(pairs))
    return KeySources(RULE["key"](sent.key)), head


@pytest.mark.parametrize("sent", REQUESTS.values(), ids=REQUESTS)
def test_values_make_the_key_of_their_request(sent):
    """It is among the candidates, and those are few."""
    sources, head = given(sent)
    extracted = extract_key(sources, SourceInput(head, sent.body, destination=DESTINATION))
    assert isinstance(extracted, ExtractedKey), extracted
    found = keys_of_values(sources, [value.encode() for value in sent.values], head, DESTINATION)
    assert extracted.key in found
    assert len(found) == len(set(found)) <= 4


def test_other_values_make_other_keys():
    """No candidate of one value is one of another, and a request's own is not among those of others."""
    seen: dict[bytes, str] = {}
    for value in ("1", "2", "true", "1.0", "x"):
        sources, head = given(Sent("body:/id", [value]))
        for key in keys_of_values(sources, [value.encode()], head, b""):
            assert seen.setdefault(key, value) == value
        body = json.dumps({"id": value}).encode()
        extracted = extract_key(sources, SourceInput(head, body))
        assert isinstance(extracted, ExtractedKey)
        assert seen[extracted.key] == value


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("derived:10", ["a"]),
        (["header:A", "derived:10"], ["a", "b"]),
        (["header:A", "body:/b"], ["a"]),
        (["header:A", "body:/b"], ["a", "b", "c"]),
        ("header:X-Id", ["two words\n"]),
        ("header:X-Id", []),
    ],
)
def test_what_values_cannot_make(key, values):
    """Too few, too many, a key of the whole request, and what no client can send."""
    sources, head = given(Sent(key, values))
    assert keys_of_values(sources, [value.encode() for value in values], head, b"") == []
