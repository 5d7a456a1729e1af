"""A Stripe to be charged at, for the clients that do; browsers, and a shop for them."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parts import RawUpstream
from tests.real.browsers import Browser, Chromium, Firefox
from tests.real.parts import LOCALSTRIPE, Slow, asked, program
from tests.real.shop import Shop, serving
from tests.zygote import Forked

SHOP = """
[[rule]]
name = "stripe"
path = "/v1/**"
preset = "payments"
"""


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A stateful Stripe that executes whatever comes, under whatever key."""
    with program(LOCALSTRIPE, tmp_path_factory.mktemp("stripe") / "log") as url:
        yield url


@pytest.fixture
async def slow(api: str, upstream: RawUpstream) -> Slow:
    """What `upstream` does: it passes everything on to the API, emptied, as slowly as it is told."""
    await asyncio.to_thread(asked, f"{api}/_config/data", method="DELETE")
    slow = Slow(api)
    upstream.script = slow.script
    return slow


@pytest.fixture
async def shop_gate(fork, upstream: RawUpstream, valkey, tmp_path: Path, slow: Slow) -> Forked:
    """The proxy before the API, with a rule for payments."""
    (tmp_path / "rules.toml").write_text(SHOP)
    return await fork(upstream, valkey.url, RULES_FILE="rules.toml")


@pytest.fixture(scope="session", params=[Chromium, Firefox], ids=["chromium", "firefox"])
def browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    """A real browser without a screen."""
    browser: Browser = request.param()
    yield browser
    browser.close()


@pytest.fixture
def shop() -> Iterator[Shop]:
    """An application with forms, as a server of its own."""
    with serving() as shop:
        yield shop
