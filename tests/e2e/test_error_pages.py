"""Whoever navigates with a browser reads oncegate's own answers as a page; every other client gets the problem."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.parts import (
    OK,
    Answer,
    Proxy,
    RawUpstream,
    abort,
    ask,
    holding,
    request,
    standing_upstream,
    until,
)
from tests.zygote import Zygote, standing_proxy

NAVIGATION = "Sec-Fetch-Mode: navigate"
FORM = "Content-Type: application/x-www-form-urlencoded"
RULES = """
[[rule]]
name = "checkout"
path = "/checkout"
key = "form:token"
scope = []

[[rule]]
name = "intranet"
path = "/intranet"
pages = true

[[rule]]
name = "api"
path = "/api"
pages = false

[[rule]]
name = "click"
path = "/click"
key = "derived:10"

[[rule]]
name = "slow"
path = "/slow"
upstream_timeout_s = 0.2

[[rule]]
name = "nobody"
path = "/nobody"
upstream = "http://127.0.0.1:1"
"""
PAGE, PROBLEM = b"text/html; charset=utf-8", b"application/problem+json"


@pytest.fixture(scope="module")
def shop(zygote: Zygote, shared_valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """One proxy with those rules and a template of its own for all tests of this file."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "pages").mkdir()
    (folder / "pages/body-too-large.html").write_text("<title>$title</title>first")
    settings = {"PAGES_DIR": "pages", "CONNECT_RETRIES": 0, "MAX_REQUEST_BYTES": 1000}
    with standing_proxy(zygote, shared_valkey.url, folder, settings, rules=RULES) as proxy:
        yield proxy


@pytest.fixture
async def behind(shop: Proxy, valkey) -> AsyncIterator[RawUpstream]:
    async with standing_upstream(shop) as server:
        yield server


async def post(proxy: Proxy, path: str, key: str | None = "key-1", body: bytes = b"x", *fields: str) -> Answer:
    return await ask(proxy.port, request("POST", path, key, body, *(fields or (NAVIGATION,))))


@pytest.mark.parametrize(
    ("path", "field", "kind"),
    [
        ("/", NAVIGATION, PAGE),
        ("/", "sec-fetch-mode:navigate", PAGE),
        ("/", "Sec-Fetch-Mode: cors", PROBLEM),
        ("/", "Sec-Fetch-Mode: navigate\r\nSec-Fetch-Mode: cors", PROBLEM),
        # What Java's HttpURLConnection sends by itself.
        ("/", "Accept: text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2", PROBLEM),
        ("/intranet", "Accept: */*", PAGE),
        ("/intranet", "Sec-Fetch-Mode: same-origin", PROBLEM),
        ("/api", NAVIGATION, PROBLEM),
    ],
)
async def test_only_a_navigation_gets_a_page(shop, behind, path, field, kind):
    """The browser says that it navigates, or the rule says that people come; what a client accepts does not tell."""
    before = shop.metric("pages_total")
    await post(shop, path)
    answer = await post(shop, path, "key-1", b"other", field)
    assert answer.status == 422
    assert answer.header("content-type") == kind
    assert answer.header("oncegate-status") == b"refused"
    assert answer.header("cache-control") == b"no-store"
    assert (b"<h1>" in answer.body) is (kind == PAGE)
    assert shop.metric("pages_total") - before == (kind == PAGE)


async def test_a_head_that_came_before_gets_a_page_again(shop, behind):
    """The same head, thrice: it is known the second time, and still that of a navigation."""
    done = asyncio.Event()
    behind.script = holding(done, OK)
    original = asyncio.create_task(post(shop, "/"))
    await until(lambda: behind.received)
    for _ in range(3):
        answer = await post(shop, "/")
        assert (answer.status, answer.header("content-type")) == (409, PAGE)
        assert b"The first request is still running" in answer.body
        assert b"here that is safe" in answer.body
        assert b", key key-1" in answer.body
        assert answer.header("retry-after") is not None
    done.set()
    assert (await original).status == 200


async def break_off(_: object, __: object, writer: asyncio.StreamWriter, ___: object) -> None:
    abort(writer)


async def stay_silent(*_: object) -> None:
    await asyncio.sleep(1)


@pytest.mark.parametrize(
    ("path", "script", "statuses"), [("/", break_off, [502, 409]), ("/slow", stay_silent, [504, 409])]
)
async def test_what_may_have_gone_through_says_so(shop, behind, path, script, statuses):
    """Whoever ordered reads that the order may have gone through, then and at each reload."""
    behind.script = script
    for status in statuses:
        answer = await post(shop, path)
        assert (answer.status, answer.header("oncegate-status")) == (status, b"unknown")
        assert b"Your order may have gone through" in answer.body
    assert len(behind.received) == 1
    seen = await ask(shop.port, request("GET", path, None, b"", NAVIGATION))
    assert (seen.status, b"Your order" in seen.body) == (statuses[0], False)


async def test_what_was_not_sent_can_be_sent_again(shop, behind):
    """Nothing was done, and a reload is safe."""
    answer = await post(shop, "/nobody")
    assert (answer.status, answer.header("content-type")) == (502, PAGE)
    assert b"nothing was done" in answer.body
    assert b"here that is safe" in answer.body


async def test_no_page_shows_a_token(shop, behind):
    """A key that a form brought is a secret of whoever opened the form (T25)."""
    assert (await post(shop, "/checkout", None, b"token=s3cret&item=7", NAVIGATION, FORM)).status == 200
    answer = await post(shop, "/checkout", None, b"token=s3cret&item=8", NAVIGATION, FORM)
    assert (answer.status, answer.header("content-type")) == (422, PAGE)
    assert b"This form was sent before" in answer.body
    assert b"s3cret" not in answer.body
    answer = await post(shop, "/checkout", None, b"item=7", NAVIGATION, FORM)
    assert (answer.status, b"This form cannot be used" in answer.body) == (400, True)


async def test_a_key_is_escaped(shop, behind):
    """Any visible character can be in a key (T25)."""
    key = "<script>alert('1')</script>"
    await post(shop, "/", key)
    answer = await post(shop, "/", key, b"other")
    assert b"<script" not in answer.body
    assert b", key &lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;" in answer.body


async def test_a_running_form_without_a_token_is_not_called_safe_to_reload(shop, behind):
    """Past the window of its key, a reload would be another order."""
    done = asyncio.Event()
    behind.script = holding(done, OK)
    original = asyncio.create_task(post(shop, "/click", None, b"item=7", NAVIGATION, FORM))
    await until(lambda: behind.received)
    answer = await post(shop, "/click", None, b"item=7", NAVIGATION, FORM)
    assert (answer.status, b"Still working on it" in answer.body, b"eload" in answer.body) == (409, True, False)
    done.set()
    await original


async def test_a_malformed_head_gets_the_problem(shop, behind):
    """Nothing of it can be believed, also not that a browser navigates."""
    answer = await ask(shop.port, request("POST", "/", "key-1", b"", NAVIGATION, "X-Bad : 1"))
    assert (answer.status, answer.header("content-type")) == (400, PROBLEM)


async def test_templates_are_read_again(shop, behind):
    """At SIGHUP, as rules are; a template with a mistake changes nothing."""
    template = shop.folder / "pages/body-too-large.html"
    large = b"x" * 1001
    assert (await post(shop, "/", "key-1", large)).body == b"<title>This is too large</title>first"
    template.write_text("second $status")
    shop.signal(signal.SIGHUP)
    await until(lambda: shop.events("reloaded"))
    assert (await post(shop, "/", "key-1", large)).body == b"second 413"
    template.write_text("third\n$nothing")
    shop.signal(signal.SIGHUP)
    await until(lambda: shop.events("reload refused, nothing changed"))
    (reason,) = shop.events("reload refused, nothing changed")[-1]["reasons"]
    assert reason.startswith("pages/body-too-large.html:2: $nothing is unknown; the fields are ")
    assert (await post(shop, "/", "key-1", large)).body == b"second 413"


async def test_a_head_request_gets_the_fields_of_the_page(shop, behind):
    """Without the page."""
    answer = await ask_head(shop.port, request("HEAD", "/nobody", None, b"", NAVIGATION))
    assert b"502 Bad Gateway" in answer
    assert b"Content-Type: text/html" in answer
    assert answer.endswith(b"\r\n\r\n")


async def ask_head(port: int, raw: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(raw)
    writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    return answer
