"""The note of a request: where it is read, what is refused, and that it reaches the record under every kind of head."""

from typing import NamedTuple

import pytest

from oncegate.keys.notes import escaped, parse_note, read_note
from tests.e2e.test_operate import Desk
from tests.parts import OK, RawClient, answering, ask, request


class Sent(NamedTuple):
    data: bytes = b""
    spooled: bool = False


def note(source: str, body: bytes = b"", *, spooled: bool = False, **fields: bytes) -> str:
    headers = {name.replace("_", "-").encode(): value for name, value in fields.items()}
    return read_note(parse_note(source), lambda name: headers.get(name, b""), Sent(body, spooled))


@pytest.mark.parametrize(
    ("source", "given", "found"),
    [
        ("header:X-Order-Id", {"x_order_id": b" 4711 "}, "4711"),
        ("header:X-Order-Id", {"x_order_id": "bestellung-ä".encode()}, "bestellung-ä"),
        ("header:X-Order-Id", {"x_order_id": b"\xff\xfe"}, "\ufffd\ufffd"),
        ("header:X-Order-Id", {"x_order_id": b"x" * 5000}, "x" * 128),
        ("header:X-Order-Id", {}, ""),
        ("/order_id", {"body": b'{"order_id": "a 1"}'}, "a 1"),
        ("body:/order_id", {"body": b'{"order_id": 12.50}'}, "12.50"),
        ("/a/1/b", {"body": b'{"a": [0, {"b": true}]}'}, "true"),
        ("/a", {"body": b'{"a": "x\\u0000\\u202ey"}'}, "x\x00\u202ey"),
        ("/a", {"body": b'{"a": "' + b"y" * 3000 + b'"}'}, "y" * 128),
        ("/a", {"body": b'{"a": {"b": 1}}'}, ""),
        ("/a", {"body": b'{"a": null}'}, ""),
        ("/a", {"body": b'{"a": 1, "a": 2}'}, ""),
        ("/a", {"body": b"{"}, ""),
        ("/a", {"body": b'{"a": 1}', "content_encoding": b"gzip"}, ""),
        ("/a", {"body": b'{"a": 1}', "content_encoding": b"identity"}, "1"),
        ("/a", {"body": b"", "spooled": True}, ""),
        ("/a", {"body": b'{"b": 1}'}, ""),
    ],
)
def test_what_a_note_reads(source, given, found):
    """A header that came once, or a single value of a document; of anything else there is no note."""
    assert note(source, **given) == found


@pytest.mark.parametrize(
    "text",
    ["", "order_id", "header:Authorization", "header:Cookie", "header:", "header:X Y", "body:order", "/a~2", "form:a",
     "query:a", "path:1", "derived:10", "receiver", "id=header:X-Id", "cloudevent:id"],
)  # fmt: skip
def test_what_cannot_be_a_note(text):
    """Credentials are never stored, and neither is what names no single place. Nobody is told of sources of keys."""
    with pytest.raises(ValueError, match=r"must|has a ~"):
        parse_note(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [("4711 ä", "4711 ä"), ("a\r\nforged", "a\\r\\nforged"), ("\x1b[2J", "\\x1b[2J"), ("\u202etxt", "\\u202etxt"),
     ("\ud800", "\\ud800"), ("\U000e0041", "\\U000e0041")],
)  # fmt: skip
def test_what_is_shown_of_a_note(text, shown):
    """Nothing in it can forge a line, turn one around, or speak to a terminal."""
    assert escaped(text) == shown


RULES = """
[[rule]]
name = "by header"
path = "/orders/*"
note = "header:X-Order-Id"

[[rule]]
name = "by body"
path = "/carts"
note = "/cart/id"
fingerprint = ["method", "target"]

[[rule]]
name = "in its key"
path = "/keyed"
key = "body:/id"
note = "/id"
"""


async def test_a_note_reaches_the_record(fork, upstream, stored, tmp_path):
    """The first head of its kind, and those that are known by then; in flight or complete; with a duplicate's none."""
    (tmp_path / "rules.toml").write_text(RULES)
    upstream.script = answering(OK)
    proxy = await fork(upstream, stored.url, RULES_FILE=str(tmp_path / "rules.toml"))
    client = await RawClient.open(proxy.port)
    for number in range(8):
        for path, body, more in (
            (f"/orders/{number}", b"{}", [f"X-Order-Id: order-{number}", f"X-Request-Id: {number}"]),
            ("/carts", b'{"cart": {"id": %d}}' % number, []),
            ("/keyed", b'{"id": "evt-%d"}' % number, []),
        ):
            key = None if path == "/keyed" else f"{path}-{number}"
            answer = await client.ask(request("POST", path, key, body, *more))
            assert answer is not None
            assert answer.status == 200
    # The note is the original's, and the fingerprint does not have it.
    again = request("POST", "/carts", "/carts-3", b'{"cart": {"id": 99}}')
    assert (await ask(proxy.port, again)).header("oncegate-status") == b"replayed"
    client.close()
    listed = await Desk(stored.url, tmp_path).listed("--state", "complete")
    expected = [("by header", f"order-{number}") for number in range(8)]
    expected += [("by body", str(number)) for number in range(8)]
    expected += [("in its key", f"evt-{number}") for number in range(8)]
    assert sorted((one["rule"], one["note"]) for one in listed) == sorted(expected)
    assert "order-3" not in proxy.log()
