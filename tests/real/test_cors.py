"""Scripts of other origins in real browsers: what they may read of executions, replays and oncegate's own answers."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.parts import Proxy
from tests.real.browsers import Browser
from tests.real.parts import INSTALLED
from tests.real.shop import Shop, serving

pytestmark = [INSTALLED, pytest.mark.timeout(180)]

RULES = """
[[rule]]
name = "down"
path = "/down"
upstream = "http://127.0.0.1:1"
"""
# What a script sees of an answer, or its error.
FETCH = """
const headers = {"Content-Type": "text/plain", ...HEADERS};
const answer = await fetch("URL", {method: "POST", body: "BODY", credentials: "CREDENTIALS", headers});
const names = ["Oncegate-Status", "Idempotent-Replayed", "Retry-After", "Preference-Applied"];
const marks = Object.fromEntries(names.map(name => [name, answer.headers.get(name)]));
return {status: answer.status, body: await answer.text(), ...marks};
"""


@pytest.fixture
def origins() -> Iterator[list[str]]:
    """Three pages of three origins. oncegate grants the first two."""
    with ExitStack() as stack:
        yield [stack.enter_context(serving()).url for _ in range(3)]


@pytest.fixture
def gate(proxies, valkey, shop: Shop, origins: list[str], tmp_path: Path) -> Proxy:
    """The proxy before an API, which is what the pages call."""
    (tmp_path / "rules.toml").write_text(RULES)
    proxy: Proxy = proxies(
        shop.url,
        valkey.url,
        RULES_FILE="rules.toml",
        CONNECT_RETRIES=0,
        CORS_ORIGINS=",".join(origins[:2]),
        CORS_CREDENTIALS="true",
    )
    return proxy


@pytest.fixture
def call(browser: Browser, gate: Proxy) -> Callable[..., Any]:
    """Call the API from the page of an origin."""
    browser.set_scripts(enabled=True)

    def send(
        origin: str,
        key: str | None,
        path: str = "/api",
        *,
        body: str = "a=1",
        credentials: str = "omit",
        prefer: str = "",
        twice: bool = False,
    ) -> Any:
        browser.go(f"{origin}/")
        browser.await_text("h1", "Form")
        fields = {"Idempotency-Key": key, "Prefer": prefer}
        headers = ", ".join(f'"{name}": "{value}"' for name, value in fields.items() if value)
        script = FETCH.replace("HEADERS", f"{{{headers}}}").replace("CREDENTIALS", credentials).replace("BODY", body)
        script = script.replace("URL", f"http://127.0.0.1:{gate.port}{path}")
        # Without waiting for the first one.
        first = f"(async () => {{ {script} }})(); await new Promise(go => setTimeout(go, 500)); " if twice else ""
        return browser.evaluate(first + script)

    return send


def is_hidden(answer: object) -> bool:
    """Return whether a browser hid an answer from the script."""
    return isinstance(answer, str) and answer.startswith("TypeError")


def test_a_page_of_another_origin_reads_every_answer(call, shop, origins):
    """An API without CORS code: the execution, a replay for either page, and oncegate's own answers with marks."""
    first, second, _ = origins
    executed = call(first, "k1", prefer="wait=5")
    assert (executed["status"], executed["Oncegate-Status"]) == (200, "executed")
    for origin in (first, second, first):
        replayed = call(origin, "k1", prefer="wait=5")
        assert (replayed["status"], replayed["Oncegate-Status"]) == (200, "replayed")
        assert (replayed["Idempotent-Replayed"], replayed["Preference-Applied"]) == ("true", "wait=5")
        assert replayed["body"] == executed["body"]
    reused = call(second, "k1", body="b=2")
    assert (reused["status"], "urn:oncegate:key-reused" in reused["body"]) == (422, True)
    down = call(first, "k2", "/down")
    assert (down["status"], "urn:oncegate:upstream-unreachable" in down["body"]) == (502, True)
    shop.breaks_off = True
    lost, unknown = call(first, "k3"), call(second, "k3")
    assert (lost["status"], lost["Oncegate-Status"]) == (502, "unknown")
    assert (unknown["status"], unknown["Oncegate-Status"]) == (409, "unknown")
    assert len(shop.orders) == 2


def test_a_page_of_another_origin_reads_that_the_first_request_is_running(call, shop, origins):
    """And when to come again."""
    shop.delay_s = 2.0
    running = call(origins[0], "k1", twice=True)
    assert (running["status"], running["Oncegate-Status"]) == (409, "refused")
    assert int(running["Retry-After"]) >= 1
    assert len(shop.orders) == 1


def test_a_page_that_is_not_listed_reads_nothing(call, shop, origins):
    """It cannot send a key, so nothing is executed; what it can send, it cannot read. Other pages still can."""
    first, _, third = origins
    assert is_hidden(call(third, "k1"))
    assert len(shop.orders) == 0
    assert call(first, "k1")["Oncegate-Status"] == "executed"
    assert is_hidden(call(third, "k1"))
    assert is_hidden(call(third, None, "/down"))
    assert call(first, "k1")["Oncegate-Status"] == "replayed"
    assert len(shop.orders) == 1


def test_what_the_api_itself_refuses_stays_refused(call, shop, origins):
    """An API with CORS code: it grants one of the two listed origins."""
    first, second, third = origins
    shop.grants = {first, third}
    assert call(first, "k1")["Oncegate-Status"] == "executed"
    assert is_hidden(call(second, "k1"))
    assert is_hidden(call(third, "k1")), "the API alone grants no key"
    assert call(first, "k1")["Oncegate-Status"] == "replayed"
    assert len(shop.orders) == 1


def test_cookies_go_along_where_the_page_says_so(call, shop, origins):
    """The session's cookie reaches the API, and its replay has another page's grant with credentials."""
    first, second, _ = origins
    assert call(first, "k1", credentials="include")["Oncegate-Status"] == "executed"
    assert "session=4711" in shop.fields[0]["Cookie"]
    assert call(second, "k2", credentials="include")["status"] == 200
    assert call(second, "k1", credentials="omit")["Oncegate-Status"] == "executed", "without cookies: another tenant"
    assert len(shop.orders) == 3
