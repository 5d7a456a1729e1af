"""The store of a run on Redis: a server that keeps every acknowledged write, and a standby that may lag behind."""

import asyncio
import contextlib
import random
import signal
import time
from pathlib import Path

from redis.exceptions import RedisError

from loadtest.chaos.faults import Kind, World
from loadtest.chaos.link import Link
from loadtest.chaos.parts import START_S, Part, Replica, Store


class RedisStores:
    """The store, and a standby that replicates it over a link if the run has failovers."""

    url = "redis://{}"

    def __init__(self, folder: Path, seed: int, failover: bool, durability: str, options: tuple[str, ...]) -> None:
        self.durability = durability or "memory"
        self.primary = Store("store", folder, options)
        self.standby = Store("standby", folder) if failover else None
        self.ports = [self.primary.port]
        self.link = Link(("127.0.0.1", self.primary.port), seed * 100 + 30)

    @property
    def parts(self) -> list[Part]:
        return [self.primary, *([self.standby] if self.standby else [])]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        kinds = (
            Kind("store-kill", 6, "store", False, self.kill),
            Kind("store-pause", 5, "store", False, self.pause),
            Kind("store-full", 3, "store", False, self.fill),
            Kind("script-flush", 5, "scripts", False, self.flush_scripts),
        )
        loses = "claims" if self.durability == "memory" else "answers"
        failover = Kind("store-failover", 8, "store", False, self.fail_over, loses)
        return (*kinds, failover) if self.standby else kinds

    async def start(self) -> None:
        self.primary.start()
        await self.primary.serving()
        if self.standby is not None:
            await self.link.start()
            await self._follow(self.standby)

    async def _follow(self, standby: Store) -> None:
        """Make a server the standby, and wait until it has all the data of the primary."""
        standby.start("--replicaof", f"127.0.0.1 {self.link.port}", "--repl-timeout", "5")
        await standby.serving()
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            with contextlib.suppress(RedisError, OSError), standby.client() as client:
                if client.info("replication").get("master_link_status") == "up":
                    return
            await asyncio.sleep(0.05)
        raise RuntimeError("the standby does not follow")

    async def close(self) -> None:
        self.primary.close()
        if self.standby is not None:
            self.standby.close()
        await self.link.close()

    # Faults ...

    async def kill(self, world: World, _: Replica, rng: random.Random) -> str:
        self.primary.kill()
        away_s = rng.choice((0.0, 0.5, 1.5 * world.lease_s))
        await asyncio.sleep(away_s)
        self.primary.start()
        await self.primary.serving()
        return f"same file, after {away_s:.1f} s"

    async def pause(self, world: World, _: Replica, rng: random.Random) -> str:
        self.primary.signal(signal.SIGSTOP)
        paused_s = rng.choice((0.3, 0.9, 2 * world.lease_s))
        await asyncio.sleep(paused_s)
        self.primary.signal(signal.SIGCONT)
        return f"suspended for {paused_s:.1f} s"

    async def flush_scripts(self, _: World, __: Replica, ___: random.Random) -> str:
        flushed = 0
        for _time in range(10):
            try:
                with self.primary.client() as client:
                    client.script_flush()
                flushed += 1
            except (RedisError, OSError):
                pass  # it is being killed by another fault
            await asyncio.sleep(0.1)
        return f"{flushed} times"

    async def fill(self, _: World, __: Replica, rng: random.Random) -> str:
        full_s = rng.choice((0.3, 2.5))
        self._limit(1)
        await asyncio.sleep(full_s)
        self._limit(0)
        return f"at its memory limit for {full_s:.1f} s"

    def _limit(self, limit: int) -> None:
        with self.primary.client() as client:
            client.config_set("maxmemory", limit)

    async def fail_over(self, world: World, _: Replica, rng: random.Random) -> str:
        """The standby lags behind, the primary dies, and the standby replaces it. Writes that it lacked are lost."""
        old, new = self.primary, self.standby
        assert new is not None
        self.link.hole()
        behind_s = rng.choice((0.1, 0.5, 1.2))
        await asyncio.sleep(behind_s)
        old.kill()
        self.link.cut()
        with new.client() as client:
            client.replicaof("NO", "ONE")
        self.primary, self.standby = new, old
        self.link.target = ("127.0.0.1", new.port)
        for replica in world.replicas:
            replica.store_link.target = self.link.target
            replica.store_link.cut()
        self.link.heal()
        old.forget()
        await self._follow(old)
        return f"the standby was {behind_s:.1f} s behind"
