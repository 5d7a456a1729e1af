"""A PostgreSQL whose clock steps, by libfaketime."""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from oncegate.decision import State, effective_state
from oncegate.store.membership import Membership
from oncegate.store.record import Record
from oncegate.store.results import RenewStatus, SettleStatus, StoreEvent
from tests.postgres_database import migrated
from tests.postgres_server import Server
from tests.real.parts import INSTALLED
from tests.stores import claim, claimed, connected, key, store_small

pytestmark = INSTALLED
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


@pytest.fixture
def stepping(monkeypatch) -> Iterator[tuple[Server, Callable[[int], None]]]:
    """A server, and a function that moves its clock by so many seconds from the right time."""
    server = Server()
    file = server.folder / "offset"

    def step(seconds: int) -> None:
        file.write_text(f"{seconds:+d}")

    try:
        server.create()
        step(0)
        with monkeypatch.context() as environment:
            environment.setenv("LD_PRELOAD", str(FAKETIME))
            environment.setenv("FAKETIME_TIMESTAMP_FILE", str(file))
            environment.setenv("FAKETIME_NO_CACHE", "1")
            environment.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
            server.start()
        yield server, step
    finally:
        server.close()


async def test_a_clock_that_steps(stepping):
    """No step of the server's clock lets a key be executed twice, lets a fence fall, or is taken for a loss."""
    server, step = stepping
    await migrated(server.url, "oncegate")
    reported: list[StoreEvent] = []
    member = Membership(
        b"", "one", "namespace=a", False, 86_400_000, 0, 60.0, True, lambda event, _: reported.append(event)
    )
    async with connected(server.url, durability="fsync", member=member) as store, connected(server.url) as other:
        watch = asyncio.ensure_future(store.watch())
        done = await claimed(store, key=key(1))
        assert (await store_small(store, done)).status is SettleStatus.STORED
        fences, held = [done.fence], [await claimed(store, key=key(2))]
        for number, offset in enumerate((-7200, 60, -7200, 0), start=3):
            step(offset)
            assert abs(float(server.sql("SELECT extract(epoch FROM clock_timestamp())")) - time.time() - offset) < 30
            record = await claim(other, key(1))
            assert isinstance(record, Record)
            assert record.state is State.COMPLETE
            for one in held:
                assert await store.renew(one) is RenewStatus.RENEWED
                record = await claim(other, one.key)
                assert isinstance(record, Record)
                assert effective_state(record.state, record.lease_left_ms) is State.IN_FLIGHT
                assert record.lease_left_ms <= one.lease_ms
            held.append(await claimed(store, key=key(number)))
            fences.append(held[-1].fence)
            await asyncio.sleep(1.5)
        watch.cancel()
        assert sorted(fences) == fences
        assert reported == [StoreEvent.FOUNDED]
