"""The pages of an operator in Chromium: what they decide, for whom they are readable, and what they are made of."""

import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from oncegate.store.kept import Kept
from oncegate.store.record import ViewState
from oncegate.store.record_name import record_id
from oncegate.store.record_view import Deciding
from oncegate.store.store import Store
from tests.admin_parts import OPERATE, tokens_file
from tests.operator_pages import unknown_key
from tests.parts import Proxy, RawUpstream
from tests.real.browsers import Browser, BrowserError, Chromium
from tests.real.parts import INSTALLED, NODE_MODULES
from tests.stores import claimed, connected, key, store_small

pytestmark = [INSTALLED, pytest.mark.timeout(300)]

REASONS = (("status 502 came", 502), ("no answer came: the upstream closed the connection", 0), ("it broke off", 200))
# Orders that were executed, and have to get their own answer; that were not; and that nobody may touch.
EXECUTED, SAME, NOT_EXECUTED, OTHERS = range(8), range(8, 13), range(13, 20), range(20, 25)
RULES = """
[[rule]]
name = "charges"
path = "/v1/charges"

[[rule]]
name = "stripe-events"
path = "/webhooks/stripe"
preset = "stripe-webhook"
"""
# Reports what a page may not do.
REPORT = """
sessionStorage.violations ??= "[]";
document.addEventListener("securitypolicyviolation", (event) => {
  const seen = JSON.parse(sessionStorage.violations);
  sessionStorage.violations = JSON.stringify([...seen, `${event.violatedDirective} ${event.blockedURI}`]);
});
"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    browser = Chromium()
    browser.set_size(1280, 900)
    browser.devtools("Page.addScriptToEvaluateOnNewDocument", source=REPORT)
    yield browser
    browser.close()


@pytest.fixture
async def keys(valkey) -> AsyncIterator[Store]:
    async with connected(valkey.url) as store:
        yield store


@pytest.fixture
async def pages(chromium, keys, proxies, upstream: RawUpstream, valkey, tmp_path: Path) -> str:
    """The URL of the pages of a proxy with two workers, whose operator is logged in; its store has unknown keys."""
    for number in range(25):
        reason, status = REASONS[number % 3]
        kind = "refund" if number in NOT_EXECUTED else "event" if number in SAME else "order"
        rule = "stripe-events" if number in SAME else "charges"
        await unknown_key(keys, number, Kept(f"{kind}-{number:02}", rule=rule), reason, status)
    await store_small(keys, await claimed(keys, key=key(100)))
    (tmp_path / "rules.toml").write_text(RULES)
    settings = {"ADMIN_TOKENS_FILE": tokens_file(tmp_path), "RULES_FILE": "rules.toml", "WORKERS": 2}
    proxy: Proxy = proxies(upstream, valkey.url, **settings)
    url = f"http://localhost:{proxy.admin_port}"
    log_in(chromium, url)
    return url


def log_in(browser: Browser, url: str) -> None:
    browser.go(f"{url}/login")
    browser.write("#token", OPERATE)
    submit(browser, "main button", "Now")


def wait_for(browser: Browser, selector: str, beginning: str = "") -> str:
    """Wait until the page has an element whose text begins so, and return the text."""
    seen = ""
    for _ in range(600):
        with suppress(BrowserError):  # between two pages
            if (seen := browser.text(selector)).startswith(beginning):
                return seen
        time.sleep(0.05)
    raise AssertionError(f"{selector} has {seen!r}, which does not begin with {beginning!r}")


def submit(browser: Browser, selector: str, title: str) -> None:
    """Click, and wait for the page that follows, by its title."""
    browser.evaluate("document.querySelector('h1').textContent = ''")
    browser.click(selector)
    wait_for(browser, "h1", title)


# What is decided ...


async def test_twenty_unknown_keys_get_their_end(chromium, keys, pages):
    """An operator gives some keys their own answer, several the same one, and frees others: none gets a wrong one."""
    for number in EXECUTED:
        chromium.go(f"{pages}/unknown?text=order-{number:02}")
        wait_for(chromium, "h1", "Unknown")
        chromium.click("#key-1")
        submit(chromium, "button[value=resolve]", "Give a key its answer")
        chromium.write("#status", "201")
        chromium.write("#headers", "Content-Type: application/json")
        chromium.write("#body", json.dumps({"order": number}))
        submit(chromium, "form.tall button", "Give a key its answer")
        assert json.dumps({"order": number}) in chromium.text("pre")
        submit(chromium, "#decide", "1 key resolved")
    chromium.go(f"{pages}/unknown?rule=stripe-events")
    wait_for(chromium, "h1", "Unknown")
    submit(chromium, "button[value=resolve-all]", f"Give {len(SAME)} keys their answer")
    submit(chromium, "form.tall button", f"Give {len(SAME)} keys their answer")
    # One of them is executed meanwhile, and not this operator's to decide any more.
    changed = await keys.records.read(key(SAME[0]))
    assert changed is not None
    await keys.release_by_operator(changed.key, Deciding(changed.token), keys.token(), changed.fence)
    submit(chromium, "#decide", f"{len(SAME) - 1} keys resolved")
    assert "1 changed meanwhile" in chromium.text("main")
    chromium.go(f"{pages}/unknown?text=refund")
    wait_for(chromium, "h1", "Unknown")
    chromium.click("#choose-all")
    submit(chromium, "button[value=release]", f"Release {len(NOT_EXECUTED)} keys")
    submit(chromium, "#decide", f"{len(NOT_EXECUTED)} keys released")
    for number in range(25):
        record = await keys.records.read(key(number))
        assert record is not None
        if number in (SAME[0], *NOT_EXECUTED):
            assert record.state is ViewState.RELEASED, number
        elif number in OTHERS:
            assert record.state is ViewState.UNKNOWN, number
        else:
            assert record.response is not None, number
            body = b"".join(await keys.read(record.key, record.token, 0)) if record.response.chunks else b""
            expected = (201, json.dumps({"order": number}).encode()) if number in EXECUTED else (200, b"")
            assert (record.response.status, body) == expected, number
    chromium.go(f"{pages}/")
    assert wait_for(chromium, ".verdict a") == f"Decide {len(OTHERS)} keys"


# For whom they are readable ...


async def test_nothing_stands_in_the_way_of_anybody(chromium, pages):
    """axe finds nothing serious on any page in either colour scheme; no page breaks its security policy."""
    record = record_id(key(100))
    found: dict[str, Any] = {}
    for dark in (False, True):
        chromium.set_dark(dark=dark)
        for place in every_page(chromium, pages, record):
            if serious := in_the_way(chromium):
                found[f"{place} {'dark' if dark else 'light'}"] = serious
    assert found == {}
    assert reported(chromium) == []
    chromium.evaluate("document.querySelector('main').append(new Image())")
    assert in_the_way(chromium) == {"image-alt": ["<img>"]}
    chromium.evaluate("const it = document.createElement('style'); it.textContent = 'p {}'; document.body.append(it)")
    assert len(reported(chromium)) == 2, "a violation is noticed"


def in_the_way(browser: Browser) -> dict[str, list[str]]:
    """Return what axe finds serious, with the elements that have it."""
    axe = (NODE_MODULES / "axe-core/axe.min.js").read_text()
    violations = browser.evaluate(f"{axe}; return (await axe.run(document)).violations")
    serious = [one for one in violations if one["impact"] in ("serious", "critical")]
    return {one["id"]: [node["html"] for node in one["nodes"]] for one in serious}


def every_page(browser: Browser, url: str, record: str) -> Iterator[str]:
    """Open each page, and yield where it is."""
    for path in ("/", "/unknown", "/unknown?text=nothing", "/key", f"/key/{record}", "/key/nothing", "/rules"):
        browser.go(url + path)
        wait_for(browser, "h1")
        yield path
    browser.write("#url", "/v1/charges")
    submit(browser, "main button", "Rules")
    yield "explained"
    browser.go(f"{url}/unknown")
    wait_for(browser, "h1", "Unknown")
    browser.click("#key-1")
    submit(browser, "button[value=resolve]", "Give a key")
    yield "answer"
    submit(browser, "form.tall button", "Give a key")
    yield "review"
    browser.go(f"{url}/unknown")
    wait_for(browser, "h1", "Unknown")
    browser.click("#key-1")
    submit(browser, "button[value=release]", "Release")
    yield "release"
    submit(browser, "#decide", "1 key released")
    yield "decided"


def reported(browser: Chromium) -> list[str]:
    """Return what the policy forbade: by the pages' own reports, and by the console."""
    said = [line for line in browser.console() if "Content Security Policy" in line]
    return [*json.loads(browser.evaluate("return sessionStorage.violations")), *said]


async def test_the_keyboard_is_enough(chromium, pages):
    """The tab key leads through a page from its head to its end, and where it is can be seen."""
    chromium.go(f"{pages}/unknown")
    wait_for(chromium, ".keys")
    seen = []
    for _ in range(14):
        chromium.devtools("Input.dispatchKeyEvent", type="keyDown", key="Tab", code="Tab", windowsVirtualKeyCode=9)
        chromium.devtools("Input.dispatchKeyEvent", type="keyUp", key="Tab", code="Tab", windowsVirtualKeyCode=9)
        it = "const it = document.activeElement"
        text, outline = chromium.evaluate(
            f"{it}; return [it.textContent.trim() || it.id, getComputedStyle(it).outlineStyle]"
        )
        seen.append(re.sub(r"\s+", " ", text))
        assert outline != "none", text
    wanted = ["Skip to the content", "Now", "Unknown 25 keys to decide", "Key", "Rules", "Log out", "text", "status"]
    places = [seen.index(one) for one in wanted]
    assert places == sorted(places)


async def test_without_scripts(chromium, keys, pages):
    """Forms and links do all of it; a script only refreshes what is shown."""
    chromium.set_scripts(enabled=False)
    try:
        chromium.go(f"{pages}/unknown?text=order-21")
        chromium.await_text("h1", "Unknown")
        chromium.click("#key-1")
        chromium.click("button[value=release]")
        chromium.await_text("h1", "Release a key")
        chromium.click("#decide")
        chromium.await_text("h1", "1 key released")
    finally:
        chromium.set_scripts(enabled=True)
    record = await keys.records.read(key(21))
    assert record is not None
    assert record.state is ViewState.RELEASED


async def test_a_page_is_live(chromium, keys, pages):
    """What changes in the store is on an open page within a moment, until somebody pauses it."""
    chromium.go(f"{pages}/")
    chromium.await_text("#live-state", "live")
    before = int(chromium.text(".badge").split()[0])
    await unknown_key(keys, 200, Kept("order-200"))
    wait_for(chromium, ".badge", f"{before + 1}")
    assert f"Decide {before + 1} keys" in chromium.text(".verdict")
    chromium.click("#pause")
    chromium.await_text("#live-state", "paused")
