"""The log of a real proxy: which request it was, what the client was sent, and why; and when nothing works."""

import json
from collections.abc import Iterator

import pytest

from tests.conftest import Valkey
from tests.parts import Proxy, RawUpstream, Script, answering, ask, request, standing_upstream, until
from tests.zygote import Zygote, standing_proxy

RULES = """
[[rule]]
name = "pay"
path = "/pay/**"

[[rule]]
name = "in the path"
path = "/events/*"
key = "path:2"

[[rule]]
name = "gone"
path = "/gone"
upstream = "http://127.0.0.1:1"
"""
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CLASSES = ("Error", "Exception", "0x", "Errno", "127.0.0.1")


@pytest.fixture(scope="module")
def gate(zygote: Zygote, shared_valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """One proxy with those rules, behind a trusted one."""
    settings = {"TRUSTED_PROXIES": "127.0.0.1,10.0.0.0/8", "CONNECT_RETRIES": 0}
    folder = tmp_path_factory.mktemp("logs")
    with standing_proxy(zygote, shared_valkey.url, folder, settings, rules=RULES) as proxy:
        yield proxy


async def line_of(proxy: Proxy, name: str, event: str = "request") -> dict[str, object]:
    """Return the line of the request with this id."""

    def found() -> list[dict[str, object]]:
        return [line for line in proxy.events(event) if line.get("request_id") == name]

    await until(lambda: found() != [])
    return found()[0]


async def test_the_access_line_says_which_request_it_was(gate, valkey):
    """Rule, upstream, path without its query, client, request, trace and key: as the answer has them."""
    async with standing_upstream(gate) as upstream:
        fields = ("X-Request-Id: one", f"traceparent: 00-{TRACE}-00f067aa0ba902b7-01", "X-Forwarded-For: 203.0.113.9")
        answer = await ask(gate.port, request("POST", "/pay/7?card=canary-7", "k1", b"{}", *fields))
        line = await line_of(gate, "one")
    assert line | {"status": 200, "outcome": "executed"} == line
    assert (line["rule"], line["upstream"], line["path"]) == ("pay", upstream.url.removeprefix("http://"), "/pay/7")
    assert (line["client"], line["trace_id"]) == ("203.0.113.9", TRACE)
    assert line["key_id"] == answer.header("oncegate-key-id").decode()
    assert "canary-7" not in gate.log()


async def test_what_was_sent_and_why(gate, valkey):
    """A problem by its name, with the words of its detail."""
    async with standing_upstream(gate):
        for body, name in ((b"1", "first"), (b"2", "reused")):
            answer = await ask(gate.port, request("POST", "/pay/1", "k2", body, f"X-Request-Id: {name}"))
        line = await line_of(gate, "reused")
    assert (line["problem"], line["status"], line["outcome"]) == ("key-reused", 422, "key_reused")
    assert line["reason"] == answer.problem["detail"]


@pytest.mark.parametrize(
    "path",
    ['/pay/"x', "/pay/\\x", "/pay/\xe9\xff", "/pay/%0d%0aSet-Cookie", '/pay/","outcome":"executed', "/" + "a" * 3000],
)
async def test_no_byte_of_a_request_forges_a_line(gate, valkey, path):
    """A path, an id or an address is one text of its line, whatever is in it, and of bounded length."""
    name = f'"}},{{"x":"\\{path.encode().hex()[:60]}'
    fields = (f"X-Request-Id: {name}", 'X-Forwarded-For: 203.0.113.9", "outcome": "x', f"Client: {path}")
    async with standing_upstream(gate):
        await ask(gate.port, request("POST", path, f"k{name[11:]}", b"{}", *fields))
        line = await line_of(gate, name)
    expected = path.encode("latin-1").decode("utf-8", "backslashreplace")
    assert line["path"] == (expected if len(path) < 1024 else expected[:1024] + "...")
    assert (line["client"], line["outcome"]) == ("127.0.0.1", "executed")
    assert all(json.loads(text) for text in gate.log().splitlines())


async def test_a_malformed_request_has_a_line(gate, valkey):
    """What it is refused for, and to whom; nothing of it."""
    async with standing_upstream(gate):
        answer = await ask(gate.port, b"GET /secret HTTP/1.1\r\nno field\r\n\r\n")
        line = await line_of(gate, answer.header("x-request-id").decode())
    assert (line["outcome"], line["status"], line["client"]) == ("request_refused", 400, "127.0.0.1")
    assert line["reason"] == answer.problem["detail"]
    assert "path" not in line


async def test_a_key_in_the_path_is_in_no_line(gate, valkey):
    """The rule says that a segment of it is the key."""
    async with standing_upstream(gate):
        await ask(gate.port, request("POST", "/events/evt_canary", None, b"{}", "X-Request-Id: in-path"))
        line = await line_of(gate, "in-path")
    assert (line["rule"], "path" in line) == ("in the path", False)
    assert "evt_canary" not in gate.log()


async def test_an_upstream_that_is_not_there_is_a_warning_in_words(gate, valkey):
    """Which one, why, and what was sent; neither the client nor the log is told a class of ours."""
    answers = [
        await ask(gate.port, request(method, "/gone", key, b"", f"X-Request-Id: gone-{key}"))
        for method, key in (("POST", "g1"), ("GET", None))
    ]
    assert [answer.status for answer in answers] == [502, 502]
    assert all("connection refused" in answer.problem["detail"] for answer in answers)
    line = await line_of(gate, "gone-g1", "upstream failed")
    assert (line["level"], line["upstream"], line["rule"]) == ("warning", "127.0.0.1:1", "gone")
    assert (line["status"], line["problem"]) == (502, "upstream-unreachable")
    assert line["reason"] == answers[0].problem["detail"]
    for text in (str(line["reason"]), *(answer.body.decode() for answer in answers)):
        assert not any(name in text for name in CLASSES), text


def breaking(data: bytes) -> Script:
    """Return a script that ends the connection after these bytes."""

    async def script(server: RawUpstream, reader: object, writer: object, received: object) -> None:
        await answering(data)(server, reader, writer, received)  # type: ignore[arg-type]
        raise ConnectionError

    return script


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n12"])
async def test_a_key_that_becomes_unknown_is_a_warning(gate, valkey, sent):
    """With its id, whole, the status that was sent, and why."""
    async with standing_upstream(gate) as upstream:
        upstream.script = breaking(sent)
        name = f"lost-{len(sent)}"
        answer = await ask(gate.port, request("POST", "/pay/9", name, b"{}", f"X-Request-Id: {name}"))
        line = await line_of(gate, name, "outcome unknown")
    assert (line["level"], line["status"]) == ("warning", answer.status)
    assert line["key_id"] == answer.header("oncegate-key-id").decode()
    assert "closed" in str(line["reason"])


async def test_nothing_is_said_after_the_end(fork, valkey):
    """What waits for the end of its second is written before `stopped`, which is the last line."""
    proxy = await fork("http://127.0.0.1:1", valkey.url, CONNECT_RETRIES=0)
    answers = [
        await ask(proxy.port, request("POST", "/", f"end-{number}", b"", "Connection: close")) for number in range(3)
    ]
    assert [answer.status for answer in answers] == [502] * 3
    assert proxy.stop() == 0
    assert '"stopped"' in proxy.log().splitlines()[-1]


async def test_a_store_that_is_not_there_is_said_at_the_start(fork, upstream, own_valkey):
    """At warning, with the reason; and at warning that it is there again, with how long it was not."""
    own_valkey.kill()
    proxy = await fork(upstream, own_valkey.url, STORE_TIMEOUT_MS=200)
    await until(lambda: proxy.events("not ready") != [])
    [line] = proxy.events("not ready")
    assert line["level"] == "warning"
    assert "store" in line["reasons"][0]
    assert "Error(" not in line["reasons"][0]
    refused = await ask(proxy.port, request())
    assert refused.slug == "store-unavailable"
    await until(lambda: proxy.events("store failed") != [])
    # Why, which the client is not told.
    assert "refused" in proxy.events("store failed")[0]["reason"]
    assert "refused" not in refused.problem["detail"]
    own_valkey.start()
    await until(lambda: proxy.events("ready again") != [])
    [again] = proxy.events("ready again")
    assert (again["level"], again["reasons_before"]) == ("warning", proxy.events("not ready")[-1]["reasons"])
