"""Takes the pictures of the operator's pages that the documentation shows: python -m tests.real.page_pictures FOLDER.

The keys, the requests and their numbers are made up; the pages are the real ones, on a real store.
"""

import asyncio
import io
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from oncegate.admin.pages import frame
from oncegate.admin.parts import at_once
from oncegate.admin.serving import serve_admin
from oncegate.admin.watching import history
from oncegate.observe.metrics import GAUGES, Metrics
from oncegate.observe.outcome import Outcome, RequestReport
from oncegate.store.kept import Kept, pack_kept
from oncegate.store.record import ClaimRequest
from oncegate.store.record_name import record_id
from oncegate.store.store import Store
from tests.admin_parts import OPERATE, admin_parts, tokens_file
from tests.conftest import Valkey
from tests.operator_pages import unknown_key
from tests.probes import RedisProbe
from tests.real.browsers import Chromium, free_port
from tests.stores import SAME, SCOPE, connected, key

WIDTH = 1180
COLOURS = 64
RULES = """
[[rule]]
name = "charges"
path = "/v1/charges"

[[rule]]
name = "stripe-events"
path = "/webhooks/stripe"
preset = "stripe-webhook"
"""
REASONS = (
    ("status 502 came", 502),
    ("no answer came: the upstream closed the connection", 0),
    ("no answer came for 30 s", 0),
    ("the response broke off", 200),
)
OUTCOMES = (Outcome.EXECUTED, Outcome.REPLAYED, Outcome.PASSTHROUGH, Outcome.IN_FLIGHT, Outcome.UPSTREAM_LOST)
GAUGE_VALUES = {"in_flight": 14.0, "workers": 4.0, "store_memory_ratio": 0.21, "waiting": 3.0}


def gauge(name: str) -> Callable[[], float]:
    return lambda: GAUGE_VALUES.get(name, 0.0) * (1 if name in ("workers", "store_memory_ratio") else random.random())


async def seed(store: Store, probe: RedisProbe) -> None:
    """Write keys that are unknown, one whose owner is silent, and some in flight."""
    for number in range(9):
        note = f"evt_1Qz{number * 7919 + 1000}Xb" if number % 2 else f"order-{4200 + number * 7}"
        kept = Kept(note, rule=("charges", "stripe-events")[number % 2])
        reason, status = REASONS[number % len(REASONS)]
        await unknown_key(store, number, kept, reason, status)
        probe.change(key(number), created=probe.now_ms() - int(9.4e6 * 0.6**number))
    for number in range(1000, 1012):
        lease_ms = 50 if number == 1000 else 60_000
        kept = Kept("order-4277", rule="charges")
        await store.claim(ClaimRequest(key(number), SCOPE, SAME, b"hold", lease_ms, 10**8, 10**9, kept=pack_kept(kept)))
    for server in store.records.servers:
        await server.index.begin()
        await server.index.note_complete()
        # Their times were changed above.
        await server.index.sweep()


async def requests(metrics: Metrics) -> None:
    """Let requests come, more and fewer of them, until cancelled."""
    number = 0
    while True:
        number += 1
        for _ in range(int(30 + 25 * random.random() + 20 * (number % 40 < 12))):
            outcome = random.choices(OUTCOMES, (60, 20, 10, 3, 0.3))[0]
            is_replay = outcome is Outcome.REPLAYED
            report = RequestReport(outcome, 200, "POST", key=b"k", rule="charges", replayed_bytes=310 * is_replay)
            report.saved_s, report.upstream_s = 0.05 * is_replay, 0.08 * random.random() * (not is_replay)
            metrics.observe(report, report.upstream_s + 0.0004)
            metrics.store_observers["claim"](0.0003 + 0.0006 * random.random())
        await asyncio.sleep(0.05)


def take(url: str, folder: Path) -> None:
    """Take the pictures."""
    browser = Chromium()
    browser.go(f"{url}/login")
    browser.write("#token", OPERATE)
    browser.click("main button")
    browser.await_text("h1", "Now")
    places = {"now": ("/", False), "now-dark": ("/", True), "unknown": ("/unknown", False)}
    places["key"] = (f"/key/{record_id(key(0))}", False)
    for name, (path, is_dark) in places.items():
        browser.set_dark(dark=is_dark)
        browser.set_size(WIDTH, 600)
        browser.go(url + path)
        browser.await_text("#live-state", "live")
        browser.set_size(WIDTH, int(browser.evaluate("return document.documentElement.scrollHeight")))
        picture = Image.open(io.BytesIO(browser.screenshot())).convert("RGB").quantize(COLOURS)
        picture.save(folder / f"page-{name}.png", optimize=True)
    browser.close()


async def main(folder: Path) -> None:
    random.seed(1)
    # Ten minutes in a few seconds.
    history.PERIOD_S = 1.1
    frame.HOST = "gateway-1"
    port = free_port()
    valkey, place = Valkey("--port", str(port)), Path(tempfile.mkdtemp())
    (place / "rules.toml").write_text(RULES)
    metrics = Metrics("0", {name: gauge(name) for name in GAUGES})
    settings = {
        "store_url": f"redis://localhost:{port}/0",
        "rules_file": place / "rules.toml",
        "admin_tokens_file": tokens_file(place),
    }
    async with connected(valkey.url) as store:
        with valkey.client() as client:
            await seed(store, RedisProbe(client, valkey.url))
        coming = asyncio.create_task(requests(metrics))
        listener = await serve_admin(admin_parts(settings, metrics=at_once(lambda: metrics)))
        await asyncio.sleep(40)
        await asyncio.to_thread(take, f"http://localhost:{listener.address.port}", folder)
        coming.cancel()
        await listener.close()
    valkey.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
