"""Whoever navigates with a browser reads oncegate's own answers as a page; every other client gets the problem."""

import asyncio

import pytest

from tests.parts import OK, ask, holding, request

NAVIGATION = "Sec-Fetch-Mode: navigate"


@pytest.mark.parametrize(
    ("field", "is_page"),
    [
        (NAVIGATION, True),
        ("sec-fetch-mode:navigate", True),
        ("Sec-Fetch-Mode: cors", False),
        ("Sec-Fetch-Mode: navigate\r\nSec-Fetch-Mode: cors", False),
        # What Java's HttpURLConnection sends by itself.
        ("Accept: text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2", False),
    ],
)
async def test_only_a_navigation_gets_a_page(standing, behind, field, is_page):
    """The browser says that it navigates; what a client accepts does not tell."""
    await ask(standing.port, request())
    answer = await ask(standing.port, request("POST", "/v1/charges", "key-1", b"other", field))
    assert answer.status == 422
    assert answer.header("content-type") == (b"text/html; charset=utf-8" if is_page else b"application/problem+json")
    assert answer.header("oncegate-status") == b"refused"
    assert answer.header("cache-control") == b"no-store"
    assert (b"<h1>" in answer.body) is is_page


async def test_a_head_that_came_before_gets_a_page_again(standing, behind):
    """The same head, thrice: it is known the second time, and still that of a navigation."""
    done = asyncio.Event()
    behind.script = holding(done, OK)
    original = asyncio.create_task(ask(standing.port, request("POST", "/", "key-1", b"", NAVIGATION)))
    while not behind.received:
        await asyncio.sleep(0.01)
    for _ in range(3):
        answer = await ask(standing.port, request("POST", "/", "key-1", b"", NAVIGATION))
        assert (answer.status, answer.header("content-type")) == (409, b"text/html; charset=utf-8")
    done.set()
    assert (await original).status == 200
