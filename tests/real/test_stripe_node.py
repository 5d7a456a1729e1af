"""Stripe's SDK for Node, which sends again after a lost connection even where it is told not to retry."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.parts import OK, RawUpstream, holding, until
from tests.real.parts import ACCOUNT, CHARGES, CUSTOMERS, INSTALLED, NODE_MODULES, Slow, listed

HERE = Path(__file__).parent
pytestmark = INSTALLED


async def buy(port: int, retries: int, seconds: int) -> dict[str, Any]:
    """Run the shop, and return what it made."""
    return await run("shop.cjs", str(port), ACCOUNT, str(retries), str(seconds))


async def run(program: str, *arguments: str) -> dict[str, Any]:
    """Run a program of `node/`, and return what it says."""
    command = ["node", HERE / "node" / program, *arguments]
    environment = {"PATH": os.environ["PATH"], "NODE_PATH": str(NODE_MODULES)}
    process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=asyncio.subprocess.PIPE)
    try:
        output, _ = await asyncio.wait_for(process.communicate(), 60)
    finally:
        if process.returncode is None:
            process.kill()
    return json.loads(output)  # type: ignore[no-any-return]


async def test_a_retry_after_a_timeout_charges_once(shop_gate, api, slow):
    """The first try of each step times out while the API works; the retry waits for its answer and gets it."""
    for target in (CUSTOMERS, CHARGES):
        slow.held[target] = lambda: shop_gate.metric("waiting") == 1
    made = await buy(shop_gate.port, 2, 1)
    assert [one["id"] for one in await listed(api, "customers")] == [made["customer"]]
    assert [one["id"] for one in await listed(api, "charges")] == [made["charge"]]
    assert shop_gate.metric('requests_total{outcome="replayed"}') >= 2


@pytest.mark.parametrize(("guarded", "charges"), [(True, 1), (False, 2)])
async def test_a_connection_that_breaks_before_the_answer(shop_gate, api, slow, upstream, guarded, charges):
    """With no retries allowed it sends again all the same; only behind the proxy that is one charge."""
    way = RawUpstream()
    await way.start()
    between = Slow(f"http://127.0.0.1:{shop_gate.port if guarded else upstream.port}")
    between.lost = {CUSTOMERS, CHARGES}
    way.script = between.script
    made = await buy(way.port, 0, 20)
    await way.close()
    assert made.get("charge"), made
    assert (len(await listed(api, "customers")), len(await listed(api, "charges"))) == (charges, charges)


async def test_what_the_sdk_says_while_the_first_request_runs(fork, upstream, valkey):
    """It finds `code`, `type` and `message` where it looks for those of Stripe."""
    done = asyncio.Event()
    upstream.script = holding(done, OK)
    proxy = await fork(upstream, valkey.url)
    original = asyncio.ensure_future(run("customer.cjs", str(proxy.port), ACCOUNT, "order-18"))
    await until(lambda: upstream.received)
    assert await run("customer.cjs", str(proxy.port), ACCOUNT, "order-18") == {
        "statusCode": 409,
        "code": "in_flight",
        "rawType": "idempotency_error",
        "message": "the first request with this key is still running",
    }
    done.set()
    await original
