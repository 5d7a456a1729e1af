"""The health monitor of one server; tests/e2e/test_store_losses.py has its effects in a running service."""

import asyncio

from oncegate.hostnames.resolver import Resolver
from oncegate.store import membership
from oncegate.store.membership import Membership
from oncegate.store.record import PREFIX_BYTES
from oncegate.store.redis.health_monitor import HealthMonitor
from oncegate.store.redis.link import Link
from oncegate.store.redis.membership import WrittenLayout
from oncegate.store.redis.server import INFO, Openers, load_scripts
from oncegate.store.redis.talk import Talk
from oncegate.store.results import StoreEvent


async def nothing(_: Link, __: object) -> None:
    """Prepare a connection without doing anything."""


async def inspect(watch: HealthMonitor, talk: Talk) -> None:
    (info,) = await talk.ask(INFO)
    await watch.inspect(talk, b"", info)


async def test_two_looks_at_once_are_no_loss(own_valkey):
    """Inspections at once over several connections do not take each other's counter for a loss."""
    reported: list[StoreEvent] = []
    member = Membership(
        bytes(PREFIX_BYTES), "one", "namespace=a", False, 60_000, 0, 60.0, True, lambda event, _: reported.append(event)
    )
    link = Link(Openers(5.0, Resolver()).to(own_valkey.url), nothing, 5.0)
    link.start()
    try:
        assert await link.wait_up(asyncio.get_running_loop().time() + 20)
        watch, talk = HealthMonitor(load_scripts(), member, {}, WrittenLayout()), Talk(link)
        for _ in range(3):
            await asyncio.gather(*[inspect(watch, talk) for _ in range(5)])
    finally:
        await link.close()
    assert reported == [StoreEvent.FOUNDED]


class Replica:
    """A proxy's health monitor alone, with rules that may change."""

    def __init__(self, link: Link, number: int, rules: str, accept: bool = False) -> None:
        self.rules, self.reported = rules, []
        member = Membership(
            bytes([number]) * PREFIX_BYTES, "one", "namespace=a", accept, 60_000, 0, 60.0, True,
            lambda event, _: self.reported.append(event), lambda: self.rules,
        )  # fmt: skip
        self.watch, self._talk = HealthMonitor(load_scripts(), member, {}, WrittenLayout()), Talk(link)

    async def looks(self) -> bool:
        """Inspect once, and return whether rules differ."""
        await inspect(self.watch, self._talk)
        return self.watch.rules_differ


async def test_rules_that_differ_are_noticed(own_valkey, monkeypatch):
    """Different rules are reported after DIFFER_S, once by each proxy, until one changes; a quick reload is not."""
    monkeypatch.setattr(membership, "DIFFER_S", 0.3)
    monkeypatch.setattr(membership, "LIVE_S", 0.6)
    link = Link(Openers(5.0, Resolver()).to(own_valkey.url), nothing, 5.0)
    link.start()
    try:
        assert await link.wait_up(asyncio.get_running_loop().time() + 20)
        one, two, declared = Replica(link, 1, "R1"), Replica(link, 2, "R1"), Replica(link, 3, "R3", accept=True)
        both = (one, two)

        async def look() -> list[bool]:
            return [await replica.looks() for replica in both]

        async def looked(result: list[bool]) -> None:
            async with asyncio.timeout(10):
                while await look() != result:
                    await asyncio.sleep(0.02)

        assert await look() == [False, False]
        one.rules = "R2"
        assert await look() == [False, False]
        two.rules = "R2"
        await asyncio.sleep(0.4)
        assert await look() == [False, False]
        two.rules = "R1"
        await looked([True, True])
        assert "by other rules" in (one.watch.notice() or "")
        assert one.watch.not_ready_reason() is None
        two.rules = "R2"
        await looked([False, False])
        assert one.watch.notice() is None
        assert [replica.reported.count(StoreEvent.RULES) for replica in both] == [1, 1]
        two.rules = "R1"
        await looked([True, True])
        both = (one,)
        await looked([False])  # the other one is gone
        both = (declared, one)
        await looked([False, True])  # a declared change is no news to the one that has it
        assert declared.reported.count(StoreEvent.RULES) == 0
    finally:
        await link.close()
