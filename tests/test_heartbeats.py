"""Who gets a 102, which streams take comments, and what of an interim response is passed on."""

import asyncio

import pytest

from oncegate.adaptation.heartbeats import Heartbeats, takes_comments
from oncegate.downstream.heartbeat import EventComments
from oncegate.messages.fields import by_name
from oncegate.messages.request_head import RequestHead
from oncegate.messages.response_head import Interim, ResponseHead, read_response_head
from oncegate.rules.patterns import text_matcher
from tests.parts import until

EVENTS = (b"Content-Type", b"text/event-stream")
HEARTBEATS = Heartbeats(25.0, (text_matcher("curl/*"), text_matcher("node")))


def asked(*pairs: tuple[bytes, bytes]) -> RequestHead:
    return RequestHead("POST", b"/", False, b"api.test", list(pairs), by_name(pairs))


@pytest.mark.parametrize(
    ("name", "value", "takes"),
    [
        (b"Prefer", b"processing", True),
        (b"Prefer", b"respond-async, Processing", True),
        (b"prefer", b'wait=5, processing; x="1"', True),
        (b"Prefer", b"processing=1", False),
        (b"Prefer", b"return=minimal", False),
        (b"Accept", b"processing", False),
        (b"User-Agent", b"curl/8.4.0", True),
        (b"User-Agent", b" node ", True),
        (b"User-Agent", b"nodejs", False),
        (b"User-Agent", b"python-requests/2.34 curl/8", False),
    ],
)
def test_who_gets_a_102(name, value, takes):
    """A client that asks, and one whose whole User-Agent a pattern of the rule matches."""
    assert HEARTBEATS.takes_interim(asked((name, value))) is takes
    assert name.lower() in HEARTBEATS.acted_on or not takes


def test_without_named_agents_only_asking_counts():
    assert not Heartbeats(1.0).takes_interim(asked((b"User-Agent", b"curl/8")))
    assert Heartbeats(1.0).acted_on == {b"prefer"}


def stream(status: int = 200, *more: tuple[bytes, bytes], kind: bytes = b"text/event-stream") -> ResponseHead:
    pairs = [(b"Content-Type", kind), (b"Transfer-Encoding", b"chunked"), *more]
    head = read_response_head(status, b"", pairs, head_only=False)
    assert isinstance(head, ResponseHead)
    return head


@pytest.mark.parametrize(
    ("head", "takes"),
    [
        (stream(), True),
        (stream(kind=b"Text/Event-Stream; charset=utf-8"), True),
        (stream(200, (b"Content-Encoding", b"identity"), (b"Cache-Control", b"no-cache, no-store")), True),
        (stream(200, (b"Content-Encoding", b"gzip")), False),
        (stream(200, (b"Repr-Digest", b"sha-256=:x:")), False),
        (stream(200, (b"Trailer", b"X-Sum, Content-Digest")), False),
        (stream(200, (b"Trailer", b"X-Sum")), True),
        (stream(200, (b"Cache-Control", b"no-cache"), (b"Cache-Control", b"No-Transform")), False),
        (stream(206), False),
        (stream(kind=b"application/json"), False),
        (read_response_head(200, b"", [EVENTS, (b"Content-Length", b"5")], False), False),
        (read_response_head(200, b"", [EVENTS], False), True),
    ],
)  # fmt: skip
def test_which_streams_take_comments(head, takes):
    """Those of events whose bytes are as the API wrote them, of no stated length."""
    assert takes_comments(head) is takes


class Written:
    """What a response got beside its own bytes."""

    interim_count = 0
    client_gone = False

    def __init__(self) -> None:
        self.between: list[bytes] = []

    def send_interim(self, head: bytes) -> bool:
        raise AssertionError

    def write_between(self, data: bytes) -> None:
        self.between.append(data)


@pytest.mark.parametrize(
    ("pieces", "comment"),
    [
        ([], b":\n\n"),
        ([b"data: 1\n\n"], b":\n\n"),
        ([b"data: 1\n", b"\n"], b":\n\n"),
        ([b"data: 1\r\n", b"\r", b"\n"], b":\r\n\r\n"),
        ([b"data: 1\n\r\n"], b":\r\n\r\n"),
        ([b"data: 1\n"], b""),
        ([b"d", b"a"], b""),
        ([b"data: 1\r\n\r"], b""),
        ([b"data: 1\r\r"], b""),
        ([b"\n"], b":\n\n"),
    ],
)
async def test_where_a_comment_stands(pieces, comment):
    """Behind an empty line and nowhere else, with the ends of lines that the stream has."""
    written = Written()
    comments = EventComments(written, 0.01)
    assert b"".join(map(comments.note, pieces)) == b"".join(pieces)
    await asyncio.sleep(0.05)
    comments.stop()
    assert set(written.between) == ({comment} if comment else set())


async def test_comments_end_with_their_client():
    """Nobody ends a response that is relayed to a client that left, so its comments end by themselves."""
    written = Written()
    comments = EventComments(written, 0.01)
    await until(lambda: written.between)
    written.client_gone = True
    await asyncio.sleep(0.03)
    assert comments._timer.when() < asyncio.get_running_loop().time()


@pytest.mark.parametrize(
    ("interim", "forwarded"),
    [
        (Interim(102, b"Processing", []), b"HTTP/1.1 102 Processing\r\n\r\n"),
        (Interim(104, b"", [(b"Upload-Offset", b"5")]), b"HTTP/1.1 104 \r\nUpload-Offset: 5\r\n\r\n"),
        (
            Interim(103, b"Early Hints", [(b"Link", b"</a>"), (b"Connection", b"X-A"), (b"X-A", b"1")]),
            b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n",
        ),
        (
            Interim(103, b"", [(b"Content-Length", b"5"), (b"Trailer", b"x"), (b"Oncegate-Status", b"x")]),
            b"HTTP/1.1 103 \r\n\r\n",
        ),
        (Interim(103, b"", [(b"Link", b"a\x00b")]), b""),
        (Interim(103, b"a\x0bb", []), b""),
        (Interim(100, b"Continue", []), b""),
        (Interim(101, b"Switching Protocols", [(b"Upgrade", b"websocket")]), b""),
    ],
)  # fmt: skip
def test_what_of_an_interim_response_is_passed_on(interim, forwarded):
    """Its own fields, without those that end here or frame a body; nothing that two readers could read differently."""
    assert interim.forwarded() == forwarded
