"""A thousand lost answers at full size and in real time: who settled them, and whether all of it was true."""

import asyncio
import time
from collections import Counter
from pathlib import Path

import pytest

from oncegate.store.open_keys.listing import open_keys
from tests.ledger import VARIANTS, Api, judge, lose, order, settled
from tests.parts import until
from tests.stores import connected, with_index
from tests.topologies import Clustered, Sentineled

pytestmark = pytest.mark.full
KEYS, RATE_PER_S, MOST_S = 1000, 100, 240
ROWS = Path("build/ledger.md")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("variant", [variant.name for variant in VARIANTS])
async def test_a_thousand_lost_answers(proxies, store, tmp_path, variant):
    """At least 99 of 100 are settled without a person; none is executed twice, and no verdict is wrong."""
    await with_index(store.url)
    api, numbers = Api(tmp_path, 1), range(KEYS)
    await api.start()
    try:
        proxy = proxies("http://127.0.0.1:1", store.url, RULES_FILE=api.rules(variant, rate_per_s=RATE_PER_S))
        await lose(proxy.port, variant, numbers, 40)
        # Of ten clients one waits for the verdict, at most for 10 s.
        waiting = [order(proxy.port, variant, number, "Prefer: wait=10") for number in numbers[::10]]
        await asyncio.gather(*waiting)
        ends = time.monotonic() + MOST_S
        while settled(proxy).total() < KEYS and time.monotonic() < ends:
            await asyncio.sleep(1)
        by = settled(proxy)
        found = await judge(api.ledger, proxy.port, variant, numbers, 40)
        row(store, variant, by, found)
        assert found["wrong"] == found["second executions"] == 0
        assert found["reconciled"] + found["freed"] >= 0.99 * KEYS
    finally:
        await api.close()


def row(store: object, variant: str, by: Counter[str], found: Counter[str]) -> None:
    """Add a line to the table that the run leaves."""
    left = sum(count for name, count in found.items() if name.startswith("left"))
    cells = [type(store).__name__, variant, KEYS, found["reconciled"], found["freed"], by["janitor"], by["duplicate"]]
    cells += [found["second executions"], found["wrong"], left]
    ROWS.parent.mkdir(exist_ok=True)
    with ROWS.open("a") as file:
        file.write("| " + " | ".join(map(str, cells)) + " |\n")


# On several servers ...


@pytest.mark.parametrize("kind", ["cluster", "sentinel"])
async def test_on_several_servers(fork, tmp_path, kind):
    """Each server's keys are settled, by two replicas; with Sentinel also after the master has failed in the middle."""
    servers: Clustered | Sentineled = Clustered(replicas=0) if kind == "cluster" else Sentineled()
    api, numbers = Api(tmp_path, 20), range(100)
    await api.start()
    try:
        await with_index(servers.url)
        file = api.rules("late", rate_per_s=50)
        two = [await fork("http://127.0.0.1:1", servers.url, RULES_FILE=file, CONNECT_RETRIES=0) for _ in range(2)]
        await asyncio.gather(*[lose(one.port, "late", numbers[half::2], 40) for half, one in enumerate(two)])
        if isinstance(servers, Sentineled):
            await until(lambda: settled(*two).total() > 0, 30)
            await asyncio.to_thread(servers.master.kill)
        async with connected(servers.url) as store:
            ends = time.monotonic() + 90
            while (await open_keys(store.records, 1)).records:
                assert time.monotonic() < ends, settled(*two)
                await asyncio.sleep(0.5)
        found = await judge(api.ledger, two[0].port, "late", numbers)
        assert found == {"reconciled": 80, "freed": 20, "second executions": 0}
    finally:
        await api.close()
        servers.close()
