"""Forms and pages in real browsers: one order however often somebody clicks, and words for people."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.parts import Proxy
from tests.real.browsers import Browser, BrowserError, Firefox
from tests.real.parts import INSTALLED
from tests.real.shop import KINDS, Shop

pytestmark = [INSTALLED, pytest.mark.timeout(180)]

# As in docs/how-to/forms.md, with a window that a slow machine does not outlast.
RULES = """
[[rule]]
name = "checkout"
path = "/checkout"
preset = "double-click"
key = "form:token"
scope = []
retention_s = 3600

[[rule]]
name = "orders"
path = "/orders"
preset = "double-click"
key = "derived:120"
scope = ["known", "cookie:session"]

[[rule]]
name = "either"
path = "/either"
preset = "double-click"
key = [["header:Idempotency-Key"], ["derived:120"]]
scope = ["cookie:session"]

[[rule]]
name = "login"
path = "/login"
preset = "double-click"
key = "derived:120"
scope = ["cookie:session"]
replay_cookies = true

[[rule]]
name = "impatient"
path = "/impatient"
scope = ["cookie:session"]
key = "derived:120"
on_duplicate = "reject"

[[rule]]
name = "plain"
path = "/plain"
key = [["header:Idempotency-Key"], ["derived:120"]]
scope = ["cookie:session"]
on_duplicate = "reject"
pages = true

[[rule]]
name = "down"
path = "/down"
upstream = "http://127.0.0.1:1"

[[rule]]
name = "guarded"
path = "/guarded"
scope = []
"""


@pytest.fixture
def gate(proxies, valkey, shop: Shop, tmp_path: Path, browser: Browser) -> Proxy:
    """The proxy before the shop, and a browser that has been there never."""
    (tmp_path / "rules.toml").write_text(RULES)
    proxy: Proxy = proxies(shop.url, valkey.url, RULES_FILE="rules.toml", CONNECT_RETRIES=0)
    browser.set_scripts(enabled=True)
    browser.go(f"http://127.0.0.1:{proxy.port}/")
    browser.await_text("h1", "Form")
    browser.call("DeleteAllCookies")
    return proxy


def open_form(browser: Browser, proxy: Proxy, target: str, host: str = "127.0.0.1") -> None:
    browser.go(f"http://{host}:{proxy.port}{target}")
    browser.await_text("h1", "Form")


def reached(proxy: Proxy, outcome: str) -> float:
    """Return how many requests had this outcome."""
    with suppress(AssertionError):
        return proxy.metric(f'requests_total{{outcome="{outcome}"}}')
    return 0.0


def until(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def reload_order(browser: Browser, proxy: Proxy) -> None:
    """Reload the page that a form led to, and see the same order."""
    before = reached(proxy, "replayed")
    browser.reload()
    until(lambda: reached(proxy, "replayed") > before, "the browser sent nothing again")
    browser.await_text("h1", "Order 1")


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["/checkout", "/orders"])
def test_one_order_however_often_somebody_clicks(browser, gate, shop, path, kind, scripts):
    """Two clicks, two reloads, and back to the form for another click: one execution, and always its page.

    An analytics cookie changes at each click or page, and the answer sets a flash cookie.
    """
    browser.set_scripts(enabled=scripts)
    open_form(browser, gate, f"{path}?kind={kind}")
    shop.delay_s = 1.5
    browser.click_twice("#buy", 0.5)
    browser.await_text("h1", "Order 1")
    assert reached(gate, "replayed") == 1, "the second click was not sent while the first one was running"
    reload_order(browser, gate)
    reload_order(browser, gate)
    browser.back()
    browser.await_text("h1", "Form")
    if path == "/orders":  # with a token, a page that is made anew is another order
        browser.click("#buy")
        browser.await_text("h1", "Order 1")
    assert len(shop.orders) == 1


def test_a_new_page_is_a_new_order(browser, gate, shop):
    """Two pages, two tokens, two orders."""
    for number in (1, 2):
        open_form(browser, gate, "/checkout")
        browser.click("#buy")
        browser.await_text("h1", f"Order {number}")
    assert len(shop.orders) == 2


@pytest.mark.parametrize(("path", "is_kept"), [("/login", True), ("/orders", False)])
def test_a_cookie_of_the_answer_that_the_browser_threw_away(browser, gate, shop, path, is_kept):
    """The second click has the cookie of the first one's answer under `replay_cookies = true` alone."""
    open_form(browser, gate, path)
    shop.delay_s = 1.5
    browser.click_twice("#buy", 0.5)
    browser.await_text("h1", "Order 1")
    names = {cookie["name"] for cookie in browser.call("GetCookies")}
    assert ("flash" in names, "session" in names) == (is_kept, True)
    assert len(shop.orders) == 1


# Pages ...


def page_is_shown(browser: Browser, title: str, background: str) -> None:
    """The page is there with its style, which the browser takes only if its digest is in the policy."""
    browser.await_text("h1", title)
    assert browser.text("h1") == browser.evaluate("return document.title") == title
    colour = browser.evaluate("return getComputedStyle(document.querySelector('main')).backgroundColor")
    assert colour == background
    assert browser.evaluate("return document.documentElement.scrollWidth <= window.innerWidth") is True


LIGHT, DARK = "rgb(255, 255, 255)", "rgb(28, 33, 40)"


def test_a_page_while_the_first_request_is_running(browser, gate, shop):
    """The second click reads that the first is running, and a reload gets its answer."""
    open_form(browser, gate, "/impatient")
    shop.delay_s = 2.0
    browser.click_twice("#buy", 0.5)
    page_is_shown(browser, "Still working on it", LIGHT)
    until(lambda: reached(gate, "executed") == 1, "the first request does not end")
    reload_order(browser, gate)
    assert len(shop.orders) == 1


def test_a_page_for_what_may_have_gone_through_by_day_and_by_night(browser, gate, shop):
    """The API breaks off: the order may have gone through, and a reload orders nothing more."""
    open_form(browser, gate, "/checkout")
    shop.breaks_off = True
    browser.set_dark(dark=True)
    browser.click("#buy")
    page_is_shown(browser, "This may have gone through", DARK)
    assert "upstream_lost (502)" in browser.text(".reference")
    browser.set_dark(dark=False)
    browser.reload()
    until(lambda: reached(gate, "outcome_unknown") == 1, "the browser sent nothing again")
    browser.await_text("h1", "This may have gone through")
    until(lambda: "outcome_unknown (409)" in browser.text(".reference"), "the page is not the second one")
    page_is_shown(browser, "This may have gone through", LIGHT)
    assert "Your order may have gone through" in browser.text("main")
    assert len(shop.orders) == 1


def test_pages_for_a_form_that_cannot_be_used(browser, gate, shop):
    """Its token was used with other content, or is not there at all."""
    open_form(browser, gate, "/checkout")
    token = browser.evaluate("return document.querySelector('[name=token]').value")
    browser.click("#buy")
    browser.await_text("h1", "Order 1")
    for change, title in (
        (f"document.querySelector('[name=token]').value = '{token}'", "This form was sent before"),
        ("document.querySelector('[name=token]').remove()", "This form cannot be used"),
    ):
        open_form(browser, gate, "/checkout")
        browser.evaluate(f"{change}; document.querySelector('[name=item]').value = '8'")
        browser.click("#buy")
        page_is_shown(browser, title, LIGHT)
        assert token not in browser.text("html")
    assert len(shop.orders) == 1


def test_a_page_while_the_shop_is_down(browser, gate):
    """Nothing was sent. What a script reads of the same is the problem; the page itself can ask for nothing."""
    open_form(browser, gate, "/")
    ask = "const answer = await fetch('/down', {method: 'POST'}); return (await answer.json()).type"
    assert browser.evaluate(ask) == "urn:oncegate:upstream-unreachable"
    browser.go(f"http://127.0.0.1:{gate.port}/down")
    page_is_shown(browser, "The site cannot be reached now", LIGHT)
    assert browser.evaluate(ask).startswith("TypeError")


# The key that Firefox makes by itself ...


in_firefox = pytest.mark.parametrize("browser", [Firefox], indirect=True, ids=["firefox"])


@pytest.fixture
def numbering(browser: Browser) -> Iterator[None]:
    assert isinstance(browser, Firefox)
    browser.set_pref("network.http.idempotencyKey.enabled", True)
    yield
    browser.set_pref("network.http.idempotencyKey.enabled", False)


@in_firefox
def test_two_clicks_are_one_order_whatever_keys_the_browser_makes(browser, numbering, gate, shop):
    """Each click has a key of its own, which counts last: the form itself is the key."""
    open_form(browser, gate, "/either")
    shop.delay_s = 1.5
    browser.click_twice("#buy", 0.5)
    browser.await_text("h1", "Order 1")
    reload_order(browser, gate)
    assert len(shop.orders) == 1
    assert shop.fields[0]["Idempotency-Key"].strip('"').isdecimal()


@in_firefox
def test_a_script_has_its_own_key_also_as_a_quoted_number(browser, numbering, gate, shop):
    """What an application sends is never taken for the browser's."""
    open_form(browser, gate, "/either")
    options = """{method: "POST", body: "a=1", headers: {"Idempotency-Key": '"KEY"'}}"""
    send = f"return (await fetch('/either', {options})).text()"
    for key, order in (("1", "Order 1"), ("2", "Order 2"), ("1", "Order 1")):
        assert order in browser.evaluate(send.replace("KEY", key))
    assert len(shop.orders) == 2


@in_firefox
def test_alone_such_a_key_is_good_for_a_reload(browser, numbering, gate, shop):
    """Without any other source: a reload has the key of its click, and another click has another one."""
    open_form(browser, gate, "/guarded")
    browser.click("#buy")
    browser.await_text("h1", "Order 1")
    with suppress(BrowserError):  # the page that asked is gone
        browser.evaluate("location.reload()")
    until(lambda: reached(gate, "replayed") == 1, "the browser sent nothing again")
    browser.await_text("h1", "Order 1")
    browser.back()
    browser.await_text("h1", "Form")
    browser.click("#buy")
    browser.await_text("h1", "Order 2")
    assert len(shop.orders) == 2


@in_firefox
def test_a_site_without_tls(browser, numbering, gate, shop):
    """No browser says there that it navigates: the rule gives people pages, and another field shows a form."""
    clicks_on_a_site_without_tls(browser, gate, shop)
    assert shop.fields[0]["Idempotency-Key"].strip('"').isdecimal()


def test_a_site_without_tls_and_without_keys(browser, gate, shop):
    clicks_on_a_site_without_tls(browser, gate, shop)


def clicks_on_a_site_without_tls(browser: Browser, gate: Proxy, shop: Shop) -> None:
    open_form(browser, gate, "/plain", "shop.test")
    shop.delay_s = 2.0
    browser.click_twice("#buy", 0.5)
    page_is_shown(browser, "Still working on it", LIGHT)
    assert "Sec-Fetch-Mode" not in shop.fields[0]
    assert len(shop.orders) == 1
