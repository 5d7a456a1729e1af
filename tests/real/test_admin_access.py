"""T27 in real browsers: a login to the admin pages, and what pages of other origins can do with it."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.admin_parts import OPERATE, tokens_file
from tests.parts import Proxy, RawUpstream
from tests.real.browsers import Browser
from tests.real.parts import INSTALLED

pytestmark = [INSTALLED, pytest.mark.timeout(180)]

# What a hostile page has: a form of each kind that a browser sends without asking.
HOSTILE = """<!DOCTYPE html><title>x</title><h1>Hostile</h1>
<a href="ADMIN/unknown">x</a>
<form id="simple" method="post" action="ADMIN/logout"><input name="form_token" value="guess"><button>x</button></form>
<form id="plain" method="post" action="ADMIN/logout" enctype="text/plain"><button>x</button></form>
"""
REFUSED = "Another page sent this request; load this page again, and use its own forms."
# What a script gets of the pages with the browser's cookies: nothing that it can read.
READ = """
const seen = [];
for (const mode of ["cors", "no-cors"]) {
  for (const path of ["/unknown", "/events", "/key"]) {
    const answer = await fetch("ADMIN" + path, {mode, credentials: "include"}).catch(() => null);
    seen.push(answer === null ? "" : await answer.text());
  }
}
const body = new URLSearchParams({form_token: "guess"});
await fetch("ADMIN/logout", {method: "POST", mode: "no-cors", credentials: "include", body}).catch(() => null);
navigator.sendBeacon("ADMIN/logout", body);
const events = new EventSource("ADMIN/events", {withCredentials: true});
const first = done => { events.onmessage = event => done(event.data); events.onerror = () => done(""); };
seen.push(await new Promise(first));
events.close();
return seen.join("");
"""


@pytest.fixture
def gate(proxies, valkey, upstream: RawUpstream, tmp_path: Path) -> Proxy:
    proxy: Proxy = proxies(upstream, valkey.url, ADMIN_TOKENS_FILE=tokens_file(tmp_path))
    return proxy


@pytest.fixture
def hostile(gate: Proxy) -> Iterator[int]:
    """The port of a page that means harm."""
    page = HOSTILE.replace("ADMIN", f"http://localhost:{gate.admin_port}").encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture
def visitor(browser: Browser, gate: Proxy) -> Callable[[], str]:
    """Return who the admin page says that the browser's user is."""

    def shown() -> str:
        browser.go(f"http://localhost:{gate.admin_port}/unknown")
        browser.await_text("h1", "Unknown")
        return browser.text(".visitor span")

    return shown


async def test_a_session_in_a_browser(browser: Browser, gate: Proxy, hostile: int, visitor: Callable[[], str]) -> None:
    """The login form works under the pages' own policy. Neither another site nor another port of the same host reads
    with the session or acts with it, but its link leads to the page. A name that leads to this machine shows the login
    alone."""
    admin = f"http://localhost:{gate.admin_port}"
    browser.set_scripts(enabled=True)
    assert visitor() == "loopback, view"
    browser.click(".visitor a")
    browser.await_text("h1", "Log in")
    browser.evaluate(f"document.querySelector('#token').value = '{OPERATE}'")
    browser.click("main button")
    browser.await_text(".visitor span", "olga, operate")
    assert visitor() == "olga, operate"
    assert browser.evaluate("return document.cookie") == ""
    for origin in (f"http://localhost:{hostile}", f"http://shop.test:{hostile}"):
        browser.go(f"{origin}/")
        browser.await_text("h1", "Hostile")
        assert browser.evaluate(READ.replace("ADMIN", admin)).strip() == ""
        for form in ("#simple", "#plain"):
            browser.go(f"{origin}/")
            browser.await_text("h1", "Hostile")
            browser.click(f"{form} button")
            browser.await_text("body", REFUSED)
        browser.go(f"{origin}/")
        browser.await_text("h1", "Hostile")
        browser.click("a")
        browser.await_text(".visitor span", "olga, operate")
    assert visitor() == "olga, operate"
    browser.call("Navigate", url=f"http://shop.test:{gate.admin_port}/unknown")
    browser.await_text("h1", "Log in")
    assert visitor() == "olga, operate"
    browser.click(".visitor button")
    browser.await_text("h1", "Log in")
    assert visitor() == "loopback, view"
