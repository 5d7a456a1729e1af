"""JSON-RPC: who asks, what a response says about its request, and what another request gets of it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncegate.adaptation.event_streams import MAX_EVENT_BYTES, EventCutter, event_data, with_data
from oncegate.adaptation.json_rpc import Caller, Replayed, ResponseReader, read_caller, same_id
from oncegate.keys.documents import Missing, placed_members
from oncegate.keys.syntax import BadKey
from oncegate.messages.problems import problem

JSON_FIELDS = {b"content-type": [b"application/json"]}
SSE_FIELDS = {b"content-type": [b"text/event-stream; charset=utf-8"]}


def call(id_token: str, meta: str = "{}") -> bytes:
    return f'{{"jsonrpc":"2.0","id":{id_token},"method":"tools/call","params":{{"_meta":{meta}}}}}'.encode()


CALLERS = {
    call("1"): Caller(b"1"),
    call('"1"'): Caller(b'"1"'),
    call("1.50e1"): Caller(b"1.50e1"),
    call('"\\u00e9\u00e9"'): Caller('"\\u00e9\u00e9"'.encode()),
    call(f'"{"x" * 254}"'): Caller(b'"%b"' % (b"x" * 254)),
    call("1", '{"progressToken":1}'): Caller(b"1", b"1"),
    call("1", '{"progressToken":"p"}'): Caller(b"1", b'"p"'),
    call("1", '{"progressToken":[]}'): Caller(b"1"),
    call("1", '{"progressToken":1,"progressToken":2}'): Caller(b"1"),
    b'{"id":1,"method":"m","params":[1]}': Caller(b"1"),
    b' {"method" : "m",\r\n "id" : 2 } \n': Caller(b"2"),
}
REFUSED = {
    call(f'"{"x" * 255}"'): "over 256 bytes",
    call("null"): "is no string and no number",
    call("true"): "is no string and no number",
    call("{}"): "is no string and no number",
    b'{"id":1,"id":2,"method":"m"}': "no JSON-RPC request",
    b'{"id":1,"result":{}}': "no JSON-RPC request",  # an answer to a request of the server
    b'{"id":1,"method":2}': "no JSON-RPC request",
    b"[]": "batch",
    b"[" + call("1") + b"]": "batch",
    b'"x"': "no JSON-RPC request",
    b"{": "not JSON",
    b"": "not JSON",
    b"\xff": "not JSON",
    b'{"id":1,"method":"m"} x': "not JSON",
    b"[" * 70 + b"]" * 70: "deeper than 64",
}


@pytest.mark.parametrize("body", CALLERS)
def test_a_caller(body):
    """A request has its id and its progress token as they are written."""
    assert read_caller(body) == CALLERS[body]


@pytest.mark.parametrize("body", REFUSED)
def test_no_caller(body):
    """What is no request that can be answered has a reason."""
    found = read_caller(body)
    assert isinstance(found, BadKey)
    assert REFUSED[body] in found.detail


def test_a_notification():
    """A notification has no id: it is no request."""
    assert isinstance(read_caller(b'{"method":"notifications/cancelled"}'), Missing)


def test_the_same_id():
    """Ids are equal by their values; a text is no number."""
    assert same_id(b"1", b"1.0")
    assert same_id(b'"a"', b'"\\u0061"')
    assert not same_id(b'"1"', b"1")
    assert not same_id(b"1" * 400, b"2" * 400)  # both are too large for a number of JavaScript
    assert not same_id(b"", b"1")


def test_a_problem():
    """An answer of oncegate's own is a JSON-RPC error with the id as it is written, and the problem in data."""
    rendering = Caller(b"1.50").render(problem("in-flight", "still running", 3, key="k"), "https://docs")
    assert rendering.status == 200
    assert b"Content-Type: application/json\r\n" in rendering.fields
    assert b"Retry-After: 3\r\n" in rendering.fields
    assert rendering.body.startswith(b'{"jsonrpc": "2.0", "id": 1.50, "error": {"code": -32010, ')
    error = json.loads(rendering.body)["error"]
    assert error["message"] == "The first request with this key is still running: still running"
    assert (error["data"]["status"], error["data"]["key"], error["data"]["error"]["code"]) == (409, "k", "in_flight")


def test_a_message_says_nothing_twice():
    """A detail that repeats the title is left out."""
    title = "The first request with this key is still running"
    rendering = Caller(b"1").render(problem("in-flight", title[0].lower() + title[1:]), "")
    assert json.loads(rendering.body)["error"]["message"] == title


# What a response says ...

RESULT, ERROR = b'{"jsonrpc":"2.0","id":7,"result":{}}', b'{"id":7,"error":{"code":-32603}}'
OTHERS = b'data: {"method":"notifications/progress","params":{}}\n\ndata: {"id":1,"method":"ping"}\n\n: x\n\n'
# fields, body -> whether a final message is found: is_error, proves_nothing_ran
FINALS = {
    "result": (JSON_FIELDS, RESULT, (False, False)),
    "problem of +json": ({b"content-type": [b"application/problem+json"]}, RESULT, (False, False)),
    "error": (JSON_FIELDS, ERROR, (True, False)),
    "nothing ran": (JSON_FIELDS, ERROR.replace(b"-32603", b"-32601"), (True, True)),
    "error without id": (JSON_FIELDS, b'{"id":null,"error":{"code":-32700}}', (True, True)),
    "result without id": (JSON_FIELDS, b'{"id":null,"result":{}}', None),
    "another id": (JSON_FIELDS, RESULT.replace(b"7", b'"7"'), None),
    "number anew": (JSON_FIELDS, RESULT.replace(b"7", b"7.0"), (False, False)),
    "empty": (JSON_FIELDS, b"", None),
    "no JSON": (JSON_FIELDS, b"gone", None),
    "another type": ({b"content-type": [b"text/plain"]}, RESULT, None),
    "no type": ({}, RESULT, None),
    "coded": ({**JSON_FIELDS, b"content-encoding": [b"gzip"]}, RESULT, None),
    "over 1 MiB": (JSON_FIELDS, RESULT + b" " * MAX_EVENT_BYTES, None),
    "stream": (SSE_FIELDS, OTHERS + b"event: message\r\ndata: " + RESULT + b"\r\n\r\n", (False, False)),
    "stream of lines": (SSE_FIELDS, b'data:{"id":7,\rdata: "result":\rdata\rdata:{}}\r\r', (False, False)),
    "stream without its last blank line": (SSE_FIELDS, b"data: " + RESULT, (False, False)),
    "stream without a final message": (SSE_FIELDS, OTHERS, None),
    "stream with an event over 1 MiB": (SSE_FIELDS, b":" * MAX_EVENT_BYTES + b"\n\n\ndata: " + RESULT + b"\n\n", None),
    "stream, nothing ran": (SSE_FIELDS, b'data: {"id":7,"error":{"code":-32601}}\n\n', (True, True)),
    # Servers say it of a tool that ran, too.
    "invalid params": (JSON_FIELDS, ERROR.replace(b"-32603", b"-32602"), (True, False)),
    "a list as code": (JSON_FIELDS, ERROR.replace(b"-32603", b"[-32601]"), (True, False)),
    # A2A: every event is a response. What came before such an error was executed.
    "two": (SSE_FIELDS, b"data: " + RESULT + b'\n\ndata: {"id":7,"error":{"code":-32601}}\n\n', (True, False)),
}


@pytest.mark.parametrize("case", FINALS)
@pytest.mark.parametrize("size", [1, 7, 1 << 21])
def test_the_final_message(case, size):
    """The final message is found however the body is cut, and only where it can be read."""
    fields, body, expected = FINALS[case]
    # Byte for byte, a MiB would take a second.
    size = max(size, len(body) // 10_000)
    reader = ResponseReader(fields, b"7")
    for at in range(0, len(body), size):
        reader.add(body[at : at + size])
    final = reader.final()
    assert (final and (final.is_error, final.proves_nothing_ran)) == expected


# What another request gets ...

CALLER = Caller(b'"mine"', b"5")
ADAPTED = {
    b'{"id": 7 , "result":{"id":7}}': b'{"id": "mine" , "result":{"id":7}}',
    b'{"id":7,"error":{}}': b'{"id":"mine","error":{}}',
    b'{"error":{},"id":7,"id":7.0}': b'{"error":{},"id":"mine","id":"mine"}',
    '{"x":"é","id":7,"result":"é\\u00e9"}'.encode(): '{"x":"é","id":"mine","result":"é\\u00e9"}'.encode(),
    b'{"id":"7","result":{}}': None,
    b'{"id":null,"error":{}}': None,
    b'{"id":7,"method":"sampling/createMessage","params":{"progressToken":7}}': None,
    b'{"method":"notifications/message","params":{"progressToken":7}}': None,
    b'{"method":"notifications/progress","params":{"progressToken":7,"progress":7}}': (
        b'{"method":"notifications/progress","params":{"progressToken":5,"progress":7}}'
    ),
    b'[{"id":7,"result":{}}]': None,
    b'{"id":7,"result":{}': None,
    b"not JSON": None,
    b"\xff": None,
    b"": None,
}


@pytest.mark.parametrize("message", ADAPTED)
def test_a_message_for_another_request(message):
    """The id of the stored request gives way to that of the request at hand; all else is byte for byte."""
    expected = ADAPTED[message] if ADAPTED[message] is not None else message
    replayed = Replayed(b"Content-Type: application/json\r\n", b"7", CALLER)
    assert replayed.feed(message) + replayed.rest() == expected


STREAMS = [
    (b': ping\r\n\r\nid: 3\r\nevent: message\r\ndata: {"id":7,"result":{}}\r\n\r\n', [(b"7", b'"mine"')]),
    (b'data:{"id":\ndata:  7,\ndata:"result":1}\nid: 7\n\n', [(b"  7,", b'  "mine",')]),
    (b'data: {"id":7,\rdata\rdata: "result":1}\r\r', [(b"7", b'"mine"')]),
    (b'\xef\xbb\xbfdata: {"id":7,"result":1}\n\ndata: {"id":7,"error":1}\n\n', [(b'7,"error"', b'"mine","error"')]),
    (b'retry: 1\n\ndata: {"id":7,"result":1}', [(b"7", b'"mine"')]),
]


@pytest.mark.parametrize("case", range(len(STREAMS)))
def test_a_stream_for_another_request(case):
    """A stream is adapted message by message, with line ends, comments and other fields, however it is cut."""
    stream, changes = STREAMS[case]
    expected = stream
    for one, other in changes:
        expected = expected.replace(one, other, 1)
    for size in (1, 2, 3, 5, len(stream)):
        replayed = Replayed(b"content-type: Text/Event-Stream; a=b\r\n", b"7.0", CALLER)
        pieces = [replayed.feed(stream[at : at + size]) for at in range(0, len(stream), size)]
        assert b"".join(pieces) + replayed.rest() == expected


def test_progress_of_another_request():
    """Progress goes to the token of the request at hand, or to nobody where that has none."""
    progress = b'id: 1\ndata: {"method":"notifications/progress","params":{"progressToken":7}}\n\n'
    final = b'data: {"id":7,"result":{}}\n\n'
    for caller, expected in ((CALLER, progress.replace(b":7", b":5")), (Caller(b'"mine"'), b"")):
        replayed = Replayed(b"Content-Type: text/event-stream\r\n", b"7", caller)
        assert replayed.feed(progress + final) + replayed.rest() == expected + final.replace(b"7", b'"mine"')


def test_fields_of_another_request():
    """A replay has no field about the bytes or the session of the request that was executed."""
    block = b"Content-Type: application/json\r\nContent-Length: 3\r\nETag: a\r\nMcp-Session-Id: a\r\nX-A: b\r\n"
    assert Replayed(block, b"7", CALLER).block == b"Content-Type: application/json\r\nX-A: b\r\n"


def test_a_response_of_an_operator():
    """Where the stored id is not known, the one response has the caller's."""
    replayed = Replayed(b"Content-Type: application/json\r\n", b"", CALLER)
    assert replayed.feed(b'{"id":0,"result":1}') + replayed.rest() == b'{"id":"mine","result":1}'


@given(
    st.lists(
        st.sampled_from([b"data: ", b"data:", b'{"id":7,"result":1}', b"\r", b"\n", b"\r\n", b"id: 1", b": x", b"\xff"])
    )
)
def test_what_is_for_another_id_stays_byte_for_byte(pieces):
    """Whatever a stream is made of and however it is cut: without the stored id, nothing of it changes."""
    stream = b"".join(pieces)
    for size in (1, 3, max(1, len(stream))):
        replayed = Replayed(b"Content-Type: text/event-stream\r\n", b'"7"', CALLER)
        cut = [replayed.feed(stream[at : at + size]) for at in range(0, len(stream), size)]
        assert b"".join(cut) + replayed.rest() == stream
    # And with it, the same whatever the cut.
    adapted = set()
    for size in (1, 2, max(1, len(stream))):
        replayed = Replayed(b"Content-Type: text/event-stream\r\n", b"7", CALLER)
        cut = [replayed.feed(stream[at : at + size]) for at in range(0, len(stream), size)]
        adapted.add(b"".join(cut) + replayed.rest())
    assert len(adapted) == 1


# Events ...


def test_events_are_cut():
    """An event ends with a blank line; a CR is one only once it is certain that no LF follows."""
    cutter = EventCutter()
    assert cutter.feed(b"data: 1\r\n\r") == []
    assert cutter.feed(b"\ndata: 2\r\r") == [b"data: 1\r\n\r\n"]
    assert cutter.feed(b"data") == [b"data: 2\r\r"]
    assert cutter.feed(b"\n\n\n") == [b"data\n\n", b"\n"]
    assert cutter.rest() == b""
    assert event_data(b"data: a\ndata:b\n:data: c\nevent: data\ndatax: d\ndata\n\n") == b"a\nb\n"


def test_a_long_event_passes_in_pieces():
    """What is too long for an event is passed on as it comes, and said to be."""
    cutter = EventCutter()
    pieces = [cutter.feed(b"x" * 300_000) for _ in range(8)]
    assert sum(map(len, pieces)) == 2
    assert cutter.has_long
    assert b"".join(one for some in pieces for one in some) + cutter.rest() == b"x" * 2_400_000


def test_data_is_replaced():
    """Other data of an event has the places of the first, byte for byte."""
    event = b"id: 1\r\ndata: a\r\nx: y\r\ndata:b\r\ndata\r\n\r\n"
    assert with_data(event, b"a\nb\n") == event
    assert with_data(event, b"A\nb\n") == event.replace(b"data: a", b"data: A")


def test_members_have_places():
    """The members of an object are found with the places of their values; nothing else is an object."""
    text = ' { "a" : [1, {"b": "}"}] , "a":"x\\"y", "c": -1.0e3 }'
    members = placed_members(text)
    assert members is not None
    assert [(one.name, text[one.start : one.end]) for one in members] == [
        ("a", '[1, {"b": "}"}]'),
        ("a", '"x\\"y"'),
        ("c", "-1.0e3"),
    ]
    assert placed_members("{}") == []
    for bad in ("", "{", "[]", '{"a"}', '{"a":1,}', "{1:2}", '{"a":1}x', '{"a":NaN}', '{"a" 1}', '{"a":' * 70):
        assert placed_members(bad) is None, bad
