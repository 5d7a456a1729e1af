"""One question to an API: what leaves, what comes back, and what never happens to it."""

import asyncio
import ssl
from dataclasses import replace

import pytest
import trustme

from oncegate.probing.plan import Plan, Question
from oncegate.probing.table import parse_table
from oncegate.probing.verdicts import MAX_ANSWER_BYTES
from oncegate.reconcile.questions import Asking, NoAnswer
from oncegate.rules.model import Upstream
from oncegate.settings.addresses import parse_origin
from tests.parts import Raw, serving

PLAN = parse_table(
    {"url": "/x/{key}", "keep": ["key"], "reference": {}, "succeeded": [{"status": "200"}], "timeout_s": 0.5}
)


def says(*pieces: bytes, pause_s: float = 0.0):
    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await raw.request(reader)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)

    return talk


def upstream_at(url: str, ca_file: object = None) -> Upstream:
    return Upstream("", parse_origin(url), ca_file, None, None, 5, 0, 10, 1, 0, None)


@pytest.fixture
async def asking():
    async with Asking() as asking:
        yield asking


def ask(asking: Asking, raw: Raw, target: str = "/x", plan: Plan = PLAN, **options: object):
    question = Question("GET", f"{raw.url}{target}", (("Authorization", "Bearer s3"),))
    return asking.ask(plan, upstream_at(raw.url), replace(question, **options))


OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


async def test_what_leaves_is_what_was_asked_and_no_more(asking, monkeypatch):
    """No proxy, no cookie, no compression, and the target byte for byte."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    cookie = OK.replace(b"\r\n\r\n", b"\r\nSet-Cookie: a=b; Path=/\r\n\r\n")
    async with serving(says(cookie)) as raw:
        for _ in range(2):
            answer = await ask(asking, raw, "/a%2Fb/%7Ex?q=%22%7B%7D&r=a+b")
            assert (answer.status, answer.body) == (200, b"{}")
    head = raw.requests[1].partition(b"\r\n\r\n")[0].split(b"\r\n")
    assert head[0] == b"GET /a%2Fb/%7Ex?q=%22%7B%7D&r=a+b HTTP/1.1"
    names = {line.partition(b":")[0].lower() for line in head[1:]}
    assert b"Authorization: Bearer s3" in head
    assert names == {b"host", b"authorization", b"user-agent", b"accept", b"accept-encoding", b"connection"}
    assert raw.accepted == 2, "each on a connection of its own"


async def test_a_question_with_a_body(asking):
    async with serving(says(OK)) as raw:
        await ask(asking, raw, method="POST", body=b'{"a":1}', headers=(("Content-Type", "application/json"),))
    assert raw.requests[0].startswith(b"POST /x HTTP/1.1\r\n")
    assert raw.requests[0].endswith(b'\r\n\r\n{"a":1}')


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_never_followed(asking, status):
    async with serving(says(OK)) as other:
        moved = b"HTTP/1.1 %d Moved\r\nLocation: %b/\r\nContent-Length: 0\r\n\r\n" % (status, other.url.encode())
        async with serving(says(moved)) as raw:
            assert (await ask(asking, raw)).status == status
        assert other.accepted == 0


async def test_a_connection_that_breaks_is_not_asked_once_more(asking):
    async with serving(says(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")) as raw:
        assert await ask(asking, raw) == NoAnswer("the connection broke off")
    assert len(raw.requests) == 1


async def test_no_answer_takes_longer_than_the_time_of_the_plan(asking):
    """Also one that comes byte by byte."""
    async with serving(says(OK[:40], *[b"x"] * 100, pause_s=0.1)) as raw:
        assert await ask(asking, raw) == NoAnswer("no answer within 0.5 s")


async def test_of_a_long_answer_one_byte_too_much_is_read(asking):
    async def endless(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await says(b"HTTP/1.1 200 OK\r\n\r\n", *[b"x" * 65_536] * 1000)(raw, reader, writer)
        finally:
            # Nobody reads what waits to be written.
            writer.transport.abort()

    async with serving(endless) as raw:
        answer = await ask(asking, raw, plan=replace(PLAN, timeout_s=20))
    assert len(answer.body) == MAX_ANSWER_BYTES + 1


@pytest.mark.parametrize(
    "answer",
    [b"no http\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"x: %b\r\n\r\n" % (b"y" * 100_000), b"HTTP/1.1 abc OK\r\n\r\n", b""],
)
async def test_what_is_no_http_is_no_answer(asking, answer):
    async with serving(says(answer)) as raw:
        said = await ask(asking, raw)
    assert isinstance(said, NoAnswer)
    assert "127.0.0.1" not in said.why
    assert str(raw.port) not in said.why


async def test_nobody_listens(asking):
    async with serving(says(OK)) as raw:
        pass
    assert await ask(asking, raw) == NoAnswer("no connection: connection refused")


async def test_a_certificate_counts_for_its_own_upstream_alone(asking, tmp_path):
    """The CA of a rule's upstream is not trusted for any other host."""
    ca = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    ca.cert_pem.write_to_path(file := tmp_path / "ca.pem")
    async with serving(says(OK), tls=context) as raw:
        url = f"https://127.0.0.1:{raw.port}"
        asked = Question("GET", f"{url}/x", ())
        answer = await asking.ask(replace(PLAN, is_upstream=True), upstream_at(url, file), asked)
        assert answer.status == 200
        refused = await asking.ask(replace(PLAN, is_upstream=False), upstream_at(url, file), asked)
        assert refused == NoAnswer("the certificate was not accepted")
