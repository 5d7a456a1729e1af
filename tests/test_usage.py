"""What an answer of an LLM's API says it used: where it stands, what only looks like it, and what hostile ones cost."""

import gzip
import json
import time
import zlib
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from oncegate.observe.usage import (
    HEAD_BYTES,
    MAX_INFLATED_BYTES,
    MAX_TOKENS,
    TAIL_BYTES,
    TOKEN_KINDS,
    Tokens,
    usage_reader,
)
from tests.conftest import searched

many = searched(300)

JSON = b"Content-Type: application/json\r\n"
SSE = b"Server: x\r\ncontent-type: text/event-stream; charset=utf-8\r\n"


def read(body: bytes, block: bytes = JSON, piece: int = 1 << 30) -> Tokens:
    """Return what is read of a body that comes in pieces."""
    one = usage_reader(200, block, len(body))
    assert one is not None
    for first in range(0, len(body), piece):
        one.add(body[first : first + piece])
    return one.tokens()


def told(fresh: int = 0, cached: int = 0, written: int = 0, said: int = 0) -> Tokens:
    return dict(zip(TOKEN_KINDS, (fresh, cached, written, said), strict=True))


def events(*documents: Any, end: bytes = b"\n", last: bytes = b"") -> bytes:
    """Return a stream of events; a document with a type is an event of that name."""
    lines = []
    for document in documents:
        if "type" in document:
            lines.append(b"event: " + document["type"].encode())
        lines += [b"data: " + json.dumps(document, separators=(",", ":")).encode(), b""]
    return end.join([*lines, last])


CHAT = {
    "id": "chatcmpl-1",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": 'He said ,"usage":{"prompt_tokens":9}} ]'}}],
    "usage": {
        "prompt_tokens": 100,
        "completion_tokens": 7,
        "total_tokens": 107,
        "prompt_tokens_details": {"cached_tokens": 60, "cache_write_tokens": 10, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 5},
    },
    "service_tier": "default",
    "system_fingerprint": None,
}
RESPONSE = {
    "id": "resp_1",
    "output": [{"type": "message", "content": [{"type": "output_text", "text": "hi"}]}],
    "usage": {
        "input_tokens": 20,
        "input_tokens_details": {"cached_tokens": 4},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 23,
    },
    "metadata": {"usage": "billed", "note": '"usage":{'},
}
MESSAGE = {
    "id": "msg_1",
    "content": [{"type": "tool_use", "name": "bill", "input": {"usage": {"input_tokens": 5, "output_tokens": 5}}}],
    "stop_reason": "end_turn",
    "usage": {
        "input_tokens": 11,
        "cache_creation_input_tokens": 3,
        "cache_read_input_tokens": 40,
        "cache_creation": {"ephemeral_5m_input_tokens": 3},
        "output_tokens": 8,
        "service_tier": "standard",
    },
}
EMBEDDINGS = {
    "data": [{"embedding": [0.25] * 4096} for _ in range(20)],
    "usage": {"prompt_tokens": 6, "total_tokens": 6},
}


def chunk(text: str, usage: Any = None) -> Any:
    return {"id": "c", "choices": [{"delta": {"content": text}}] if text else [], "usage": usage}


CHUNKS = [*[chunk(f"word {n}") for n in range(500)], chunk("", CHAT["usage"])]
STEPS = [
    {"type": "response.created", "response": {**RESPONSE, "usage": None}},
    *[{"type": "response.output_text.delta", "delta": "x" * 90} for _ in range(500)],
    {"type": "response.completed", "response": {"instructions": "y" * 50_000, **RESPONSE}},
]
BEGIN = {
    "type": "message_start",
    "message": {"content": [], "usage": {"input_tokens": 11, "cache_read_input_tokens": 40, "output_tokens": 1}},
}
DELTAS = [
    {"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": '{"usage":{"a":1}}'}}
] * 900
END = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 321}}
STOP = {"type": "message_stop"}

TOLD = {
    "chat": (json.dumps(CHAT).encode(), JSON, told(30, 60, 10, 7)),
    "chat, over lines": (json.dumps(CHAT, indent=2).encode(), JSON, told(30, 60, 10, 7)),
    "chat, streamed": (events(*CHUNKS, last=b"data: [DONE]\n\n"), SSE, told(30, 60, 10, 7)),
    "response": (json.dumps(RESPONSE).encode(), JSON, told(16, 4, 0, 3)),
    "response, streamed": (events(*STEPS), SSE, told(16, 4, 0, 3)),
    "message": (json.dumps(MESSAGE).encode(), JSON, told(11, 40, 3, 8)),
    "message, streamed": (events(BEGIN, *DELTAS, END, STOP), SSE, told(11, 40, 0, 321)),
    "message, streamed in brief": (events(BEGIN, END, STOP), SSE, told(11, 40, 0, 321)),
    "message, streamed with other line ends": (events(BEGIN, END, STOP, end=b"\r\n"), SSE, told(11, 40, 0, 321)),
    "message, with the last word on what was asked": (
        events(BEGIN, {**END, "usage": {"input_tokens": 12, "cache_read_input_tokens": None, "output_tokens": 2}}),
        SSE,
        told(12, 40, 0, 2),
    ),
    "message, cut behind its beginning": (events(BEGIN), SSE, told(11, 40, 0, 1)),
    "embeddings": (json.dumps(EMBEDDINGS).encode(), JSON, told(6)),
    "audio, timed": (b'{"text":"a","usage":{"type":"duration","seconds":3}}', JSON, {}),
    "no usage": (b'{"id":"x"}', JSON, {}),
    "chat, streamed without usage": (events(*CHUNKS[:-1], last=b"data: [DONE]\n\n"), SSE, {}),
    "usage of a tool alone": (json.dumps({**MESSAGE, "usage": None}).encode(), JSON, {}),
    "a name that ends so": (rb'{"your \"usage":{"input_tokens":1}}', JSON, {}),
    "usage of an array": (b'[{"usage":{"input_tokens":1}}]', JSON, {}),
    "too long behind": (json.dumps({**CHAT, "z": "z" * TAIL_BYTES}).encode(), JSON, {}),
    "nothing": (b"", JSON, {}),
    "of an unknown type": (json.dumps(CHAT).encode(), b"", told(30, 60, 10, 7)),
}


@pytest.mark.parametrize("case", TOLD)
@pytest.mark.parametrize("piece", [1 << 30, 4096, 97])
def test_what_an_answer_says(case, piece):
    """Both vendors' shapes, plain and streamed, however they are cut into pieces; never what a model wrote."""
    body, block, expected = TOLD[case]
    assert read(body, block, piece) == expected


@pytest.mark.parametrize("coding", ["gzip", "x-GZIP", "deflate"])
@pytest.mark.parametrize("piece", [1 << 30, 7])
@pytest.mark.parametrize("case", ["chat", "response, streamed", "message, streamed"])
def test_a_compressed_answer_is_read(coding, piece, case):
    """What vendors send to Python's SDKs."""
    body, block, expected = TOLD[case]
    packed = zlib.compress(body) if coding == "deflate" else gzip.compress(body)
    assert read(packed, block + f"Content-Encoding: {coding}\r\n".encode(), piece) == expected


def test_the_end_of_what_was_inflated_is_not_left_behind():
    """The last bytes come, too, where one piece of room was just full."""
    for more in range(300):
        body = json.dumps({"z": "z" * (65_200 + more), **CHAT}).encode()
        assert read(gzip.compress(body), JSON + b"Content-Encoding: gzip\r\n") == told(30, 60, 10, 7), more


@pytest.mark.parametrize(
    "lines",
    [b"Content-Encoding: br\r\n", b"Content-Encoding: gzip, br\r\n", b"Content-Encoding: gzip\r\n" * 2,
     b"Content-Encoding: gzip\r\n", b"content-encoding:\r\n"],
)  # fmt: skip
def test_a_coding_that_is_not_read(lines):
    """What is packed in another way, in two, or not at all as it says, tells nothing."""
    assert read(json.dumps(CHAT).encode(), JSON + lines) == {}


def test_identity_is_no_coding():
    """Some servers say so."""
    assert read(json.dumps(CHAT).encode(), JSON + b"Content-Encoding: Identity\r\n") == told(30, 60, 10, 7)


@pytest.mark.parametrize("status", [400, 429, 500, 302])
def test_an_error_used_nothing(status):
    """So it is not missed that it does not say."""
    assert usage_reader(status, JSON, 0) is None


def test_half_an_answer_says_nothing():
    """The client left; whatever the bytes so far look like."""
    body = json.dumps(CHAT).encode()
    one = usage_reader(200, JSON, len(body) + 1)
    assert one is not None
    one.add(body)
    assert one.tokens() == {}


@pytest.mark.parametrize("value", [-1, MAX_TOKENS + 1, 1.5, True, "7", None, [], {}, 10**400])
def test_a_number_that_is_none(value):
    """It is not counted, and the others are."""
    body = json.dumps({"usage": {"input_tokens": value, "output_tokens": 4}}).encode()
    assert read(body) == told(said=4)


def test_the_parts_of_what_was_asked_are_never_more_than_it():
    """The sum of the kinds is what the vendor counted in all."""
    details = {"cached_tokens": 9, "cache_write_tokens": 9}
    body = json.dumps({"usage": {"prompt_tokens": 10, "prompt_tokens_details": details}}).encode()
    assert read(body) == told(0, 9, 1)


# Hostile bodies ...

HOSTILE = {
    "places": b'{"usage":{' * 2_000_000,
    "places, half": b'{"usage" ' * 2_000_000,
    "places in their texts": b'"usage":{"' * 2_000_000,
    "objects": b'{"usage":{' + b"{}" * 15_000,
    "nested": b'{"usage":' + b"[" * 10_000_000 + b"]" * 10_000_000,
    "nested objects": b'{"usage":{"a":' + b'{"a":' * 2000 + b"1" + b"}" * 2002,
    "nested arrays": b'{"usage":{"a":' + b"[" * 2000 + b"]" * 2000 + b"}}",
    "quotes": b'{"usage":{}' + b'"' * 30_000,
    "escaped quotes": b'{"usage":{},"a":"' + b'\\"' * 16_000,
    "backslashes": b'{"usage":{},"' + b"\\" * 30_000,
    "texts": b'{"usage":{}' + b',""' * 10_000,
    "digits": b'{"usage":{"input_tokens":' + b"9" * 30_000 + b"}}",
    "long digits": b'{"usage":{"input_tokens":' + b"9" * 4000 + b"}}",
    "not UTF-8": b'{"usage":{"\xff\xfe":1}}',
    "spaces": b'{"usage"' + b" " * 30_000,
    "events": b'data: {"usage":{}}\n' * 1_000_000,
    "one line": b"data: " + b" " * 10_000_000,
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("block", [JSON, SSE])
def test_a_hostile_answer_costs_little(case, block):
    """Beyond being copied, a body costs what its end can, however long it is, and never an exception."""
    body = HOSTILE[case]
    one = usage_reader(200, block, len(body))
    assert one is not None
    for first in range(0, len(body), 262_144):
        one.add(body[first : first + 262_144])
    began = time.thread_time()
    assert not any(one.tokens().values())
    assert time.thread_time() - began < 0.05  # 0.001 where nothing else runs


def test_a_bomb_is_not_inflated():
    """A body that inflates beyond the limit is given up, and what comes after is not even looked at."""
    packed = gzip.compress(b" " * (10 * MAX_INFLATED_BYTES) + json.dumps(CHAT).encode(), 1)
    block = JSON + b"Content-Encoding: gzip\r\n"
    began = time.thread_time()
    assert read(packed, block, 262_144) == {}
    assert time.thread_time() - began < 0.5


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["usage", '"usage":{', ',"usage":{}']),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.just("usage"), inner, max_size=4)
    ),
    max_leaves=20,
)
USAGES = st.builds(
    lambda asked, said: {"input_tokens": asked, "output_tokens": said},
    st.integers(0, MAX_TOKENS),
    st.integers(0, MAX_TOKENS),
)


@many
@given(before=st.dictionaries(st.text(), JSONS, max_size=3), usage=USAGES, after=st.lists(JSONS, max_size=2))
@example(before={}, usage={"input_tokens": 1, "output_tokens": 2}, after=['\\"', {"usage": {}}])
def test_whatever_stands_around_it(before, usage, after):
    """A document's own usage is found among up to two others of that name behind it, and no other is taken for it."""
    before.pop("usage", None)
    document = {**before, "usage": usage, **{f"after {n}": value for n, value in enumerate(after)}}
    body = json.dumps(document, separators=(",", ":")).encode()
    found = read(body)
    expected = told(usage["input_tokens"], said=usage["output_tokens"])
    assert found == expected or (found == {} and json.dumps(after).count('"usage": {') > 2)
    del document["usage"]
    assert read(json.dumps(document).encode()) == {}


@many
@given(body=st.binary(max_size=400), block=st.binary(max_size=60), piece=st.integers(1, 60))
def test_any_bytes_are_read(body, block, piece):
    """Whatever the store holds, reading it raises nothing and yields counts."""
    one = usage_reader(200, block, len(body))
    assert one is not None
    for first in range(0, len(body), piece):
        one.add(body[first : first + piece])
    assert all(kind in TOKEN_KINDS and 0 <= count <= MAX_TOKENS for kind, count in one.tokens().items())


def test_what_is_kept_is_little():
    """Of however long a stream."""
    one = usage_reader(200, SSE, 1 << 30)
    assert one is not None
    for _ in range(64):
        one.add(bytes(1 << 18))
    assert len(one._head) == HEAD_BYTES
    assert len(one._tail) == TAIL_BYTES
