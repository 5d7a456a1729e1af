"""What another requester gets of a response: the address that it needs, its own grant, and no cookies of others."""

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.parts import Proxy, RawClient, RawUpstream, answering, ask, request, standing_upstream
from tests.zygote import Zygote, standing_proxy

RULES = """
[[rule]]
name = "as it comes"
path = "/off/**"
rewrite_location = false

[[rule]]
name = "cookies"
path = "/login"
scope = ["known", "cookie:visitor"]
replay_cookies = true
rewrite_cookie_path = true
cookie_domain = "drop"

[[rule]]
name = "another host"
path = "/shop/**"
set_host = "shop.internal"
"""


def api(*lines: str, status: str = "201 Created") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "Content-Length: 2", "", "ok"]).encode()


def own(proxy: Proxy) -> str:
    """Return the address of a proxy's upstream."""
    return f"127.0.0.1:{proxy.upstream_socket.getsockname()[1]}"


# With the default settings ...


@pytest.mark.parametrize("field", ["Location", "Content-Location", "Refresh"])
async def test_the_upstream_s_address_is_not_shown(standing, behind, field):
    """Executed, replayed and passed through, under heads that came before: clients come back through oncegate."""
    url, path = f"http://{own(standing)}/orders/7?a=b", b"/orders/7?a=b"
    before = "0; url=" if field == "Refresh" else ""
    behind.script = answering(api(f"{field}: {before}{url}"))
    client = await RawClient.open(standing.port)
    for key, status in (("key-1", b"executed"), ("key-1", b"replayed"), ("key-2", b"executed"), (None, None)):
        got = await client.ask(request("POST", "/orders", key))
        assert got is not None
        assert (got.header("oncegate-status"), got.header(field)) == (status, before.encode() + path)
    client.close()


async def test_another_address_is_shown_as_it_is(standing, behind):
    """Only the upstream's own is a mistake, and nobody who is not trusted puts a path before it."""
    behind.script = answering(api("Location: https://pay.example/7"))
    assert (await ask(standing.port, request())).header("location") == b"https://pay.example/7"
    behind.script = answering(api(f"Location: http://{own(standing)}//evil.test/"))
    got = await ask(standing.port, request("GET", "/", None, b"", "X-Forwarded-Prefix: /shop"))
    assert got.header("location") == b"/.//evil.test/"


async def test_a_stored_grant_is_the_same_page_s_alone(standing, behind):
    """Without `cors_origins`, too: another page gets the response without the grant."""
    page, other = "Origin: https://a.test", "Origin: https://b.test"
    grant = "Access-Control-Allow-Origin: https://a.test", "Access-Control-Allow-Credentials: true"
    behind.script = answering(api(*grant, "Vary: Origin"))
    for extra, granted in ((page, True), (page, True), (other, False)):
        got = await ask(standing.port, request("POST", "/", "key-1", b"", extra))
        assert (got.header("access-control-allow-origin") is not None) is granted
        assert (got.header("access-control-allow-credentials") is not None) is granted
        assert (got.body, got.header("vary")) == (b"ok", b"Origin")


async def test_what_belongs_to_one_exchange_is_not_replayed(standing, behind):
    """Cookies and what authenticates one exchange; the first client gets them."""
    lines = "Set-Cookie: a=b", "WWW-Authenticate: Basic", "Authentication-Info: a=b", "Proxy-Authenticate: Basic"
    behind.script = answering(api(*lines, "Proxy-Authentication-Info: a=b", "X-Other: kept"))
    first, replay = [await ask(standing.port, request()) for _ in range(2)]
    names = {name.lower() for name, _ in first.headers} - {name.lower() for name, _ in replay.headers}
    assert names == {
        *(b"set-cookie", b"www-authenticate", b"authentication-info", b"proxy-authenticate"),
        b"proxy-authentication-info",
    }


# Behind a proxy that takes a path off, in front of an API that has one ...


@pytest.fixture(scope="module")
def fronted(zygote: Zygote, shared_valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """One proxy with those rules, whose upstream has a path prefix."""
    folder = tmp_path_factory.mktemp("fronted")
    with standing_proxy(
        zygote, shared_valkey.url, folder, {"TRUSTED_PROXIES": "127.0.0.1"}, rules=RULES, path="/api"
    ) as proxy:
        yield proxy


@pytest.fixture
async def inner(fronted: Proxy, valkey) -> AsyncIterator[RawUpstream]:
    async with standing_upstream(fronted) as server:
        yield server


async def test_a_replay_has_the_address_of_the_one_who_asks(fronted, inner):
    """With the prefix that a trusted proxy took off, without one, and with another one."""
    inner.script = answering(api(f"Location: http://{own(fronted)}/api/orders/7"))
    for prefix, path in (
        ("/shop", b"/shop/orders/7"),
        (None, b"/orders/7"),
        ("/outer, /inner/", b"/outer/inner/orders/7"),
    ):
        extra = [f"X-Forwarded-Prefix: {prefix}"] if prefix else []
        assert (await ask(fronted.port, request("POST", "/", "key-1", b"", *extra))).header("location") == path
    assert len(inner.received) == 1


async def test_addresses_that_are_not_rewritten(fronted, inner):
    """Where the rule says so, outside of the upstream's prefix, and under the name that the API gets as its own."""
    away = f"http://{own(fronted)}/other"
    for target, url, shown in (
        ("/off/a", f"http://{own(fronted)}/api/a", None),
        ("/orders", away, None),
        ("/shop/a", "http://shop.internal/api/a", "/a"),
        ("/orders", "http://shop.internal/api/a", None),
    ):
        inner.script = answering(api(f"Location: {url}"))
        got = await ask(fronted.port, request("GET", target, None, b""))
        assert got.header("location") == (shown or url).encode()


def cookies(answer) -> list[bytes]:
    return [value for name, value in answer.headers if name.lower() == b"set-cookie"]


async def test_a_double_click_gets_the_cookies_again(fronted, inner):
    """The same visitor within a minute, each with the path that the browser needs; the record keeps the API's own."""
    inner.script = answering(api("Set-Cookie: session=1; Path=/api/x; Domain=up.test", "Set-Cookie: flash=2", "X-A: b"))
    visitor = "Cookie: visitor=1"
    first = await ask(fronted.port, request("POST", "/login", "key-1", b"", visitor))
    again = await ask(fronted.port, request("POST", "/login", "key-1", b"", visitor, "X-Forwarded-Prefix: /shop"))
    assert cookies(first) == [b"session=1; Path=/x", b"flash=2"]
    assert cookies(again) == [b"session=1; Path=/shop/x", b"flash=2"]
    assert again.header("x-a") == b"b"
    assert again.header("oncegate-status") == b"replayed"


async def test_whoever_says_nothing_of_himself_gets_no_cookies(fronted, inner):
    """Without a cookie and a credential all clients are one tenant: nothing is kept for the next."""
    inner.script = answering(api("Set-Cookie: session=1"))
    first, again = [await ask(fronted.port, request("POST", "/login", "key-1", b"")) for _ in range(2)]
    assert (len(cookies(first)), cookies(again), again.header("oncegate-status")) == (1, [], b"replayed")


async def test_a_streamed_response_keeps_its_cookies(fronted, inner):
    """The digest of a response that is stored in pieces covers them, too."""
    body = b"x" * 100_000
    head = b"HTTP/1.1 200 OK\r\nSet-Cookie: session=1\r\nContent-Length: %d\r\n\r\n" % len(body)
    inner.script = answering(head + body)
    for _ in range(2):
        got = await ask(fronted.port, request("POST", "/login", "key-1", b"", "Cookie: visitor=1"))
        assert (cookies(got), got.body, got.complete) == ([b"session=1"], body, True)
    assert len(inner.received) == 1
