"""The master that Redis Sentinel names. It is asked for on every new connection, and watched for a change.

All sentinels are asked at once, and the reply with the highest configuration epoch wins, because a sentinel that was
cut off does not know of a failover yet. A server that says it is a replica is not used, whoever named it.
"""

import asyncio
from collections.abc import Awaitable
from typing import NamedTuple

from redis.asyncio.connection import AbstractConnection
from redis.asyncio.sentinel import MasterNotFoundError, SentinelConnectionPool
from redis.exceptions import RedisError

from oncegate.settings.store_url import ServerGroup
from oncegate.store.redis.link import CONNECT_S
from oncegate.store.redis.node import Node, NodeConfig
from oncegate.store.redis.server import (
    OPTIONS,
    Info,
    Logins,
    Opener,
    Openers,
    Unfit,
    connection_options,
    limits,
    say_nothing,
)
from oncegate.store.redis.talk import accepted, ask, first_answers

# The share of the timeout that the others may take to reply, once one sentinel has, or none is far away.
ASK_SHARE = 0.4
# How often the sentinels are asked whether the master has changed.
FOLLOW_S = 1.0

# What a server is that does not say it is a master.
ROLES = {"slave": "a replica", "sentinel": "a sentinel", "": "a server that does not say what it is"}

Address = tuple[str, int]


class MasterView(NamedTuple):
    """What one sentinel says of the master. `down`: the sentinels agree that it is, and it is not replaced yet."""

    epoch: int
    address: Address
    down: bool


class Sentinel:
    """One sentinel, over a connection that stays open."""

    def __init__(self, open_connection: Opener, service: str) -> None:
        self._open_connection, self._service = open_connection, service
        self._connection: AbstractConnection | None = None

    async def ask(self) -> MasterView:
        """Return what the sentinel says of the master. Raises RedisError and OSError.

        It takes two replies. A failover may wait for the other replicas for minutes; until then SENTINEL MASTER has
        the new epoch with the old address, and only GET-MASTER-ADDR-BY-NAME has the new address.
        """
        try:
            if self._connection is None:
                connection = self._open_connection()
                await connection.connect()  # type: ignore[no-untyped-call]
                self._connection = connection
            commands = [("SENTINEL", word, self._service) for word in ("MASTER", "GET-MASTER-ADDR-BY-NAME")]
            reply, (host, port) = accepted(await ask(self._connection, *commands))
        except BaseException:
            await self.close()
            raise
        fields = dict(zip(reply[::2], reply[1::2], strict=True))
        replaced = (fields[b"ip"], fields[b"port"]) != (host, port)
        down = b"o_down" in fields[b"flags"].split(b",") and not replaced
        return MasterView(int(fields[b"config-epoch"]), (host.decode(), int(port)), down)

    async def refusal(self, logins: Logins) -> str:
        """Return why the sentinel refuses these logins; empty if it takes them, or cannot be asked now."""
        connection = self._open_connection(logins)
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
        except (RedisError, OSError) as error:
            # One that is asked over another connection, and answers, is up.
            return f"a sentinel: {error}" if self._connection is not None else ""
        finally:
            await connection.disconnect(nowait=True)
        return ""

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)


class Sentinels:
    """The sentinels of a service. redis-py calls `discover_master` by this name."""

    def __init__(self, group: ServerGroup, openers: Openers) -> None:
        self._group, self._timeout_s = group, openers.timeout_s
        urls = [group.sentinel_url(address) for address in group.places]
        self._all = [Sentinel(openers.to(url, greets=True, at_sentinel=True), group.service) for url in urls]
        self._question: asyncio.Task[Address] | None = None

    async def discover_master(self, _service: str = "") -> Address:
        """Return where the master is. Callers that come while the sentinels are asked share the reply."""
        if self._question is None or self._question.done():
            self._question = asyncio.ensure_future(self._ask())
        return await asyncio.shield(self._question)

    async def _ask(self) -> Address:
        asked = [asyncio.ensure_future(sentinel.ask()) for sentinel in self._all]
        done = await first_answers(asked, self._timeout_s * ASK_SHARE, max(CONNECT_S, self._timeout_s))
        failures = [one.exception() for one in done]
        answers: list[MasterView] = [
            one.result() for one, failure in zip(done, failures, strict=True) if failure is None
        ]
        for failure in failures:
            if failure is not None and not isinstance(failure, RedisError | OSError):
                raise failure
        if not answers:
            reason = next((str(failure) for failure in failures if failure), "no answer in time")
            raise MasterNotFoundError(f"no sentinel names the master of {self._group.service}: {reason}")
        newest = max(answers, key=lambda view: view.epoch)
        if newest.down:
            raise MasterNotFoundError(f"the master of {self._group.service} is down, as the sentinels agree")
        return newest.address

    def refusals(self, logins: Logins) -> list[Awaitable[str]]:
        """Return what waits for the answer of each sentinel to these logins."""
        return [sentinel.refusal(logins) for sentinel in self._all]

    async def close(self) -> None:
        if self._question is not None:
            self._question.cancel()
            await asyncio.gather(self._question, return_exceptions=True)
        await asyncio.gather(*[sentinel.close() for sentinel in self._all])


def master_opener(group: ServerGroup, sentinels: Sentinels, openers: Openers) -> Opener:
    """Return a function that makes connections which ask the sentinels where to connect to."""
    options = connection_options(group.server_url("localhost:1"), openers.resolver, to_master=True)
    del options["host"], options["port"]
    options.update(OPTIONS, redis_connect_func=say_nothing, **limits(openers.timeout_s))
    pool = SentinelConnectionPool(group.service, sentinels, **options)  # type: ignore[no-untyped-call]
    return openers.with_logins(pool.make_connection)


class SentinelNode(Node):
    """The master of a service, whichever server that is."""

    def __init__(self, group: ServerGroup, config: NodeConfig) -> None:
        self.sentinels = self._sentinels = Sentinels(group, config.openers)
        self._service, self._log = group.service, config.log
        self._at: Address | None = None
        open_connection = master_opener(group, self._sentinels, config.openers)
        super().__init__(open_connection, config, f"the master of {group.service}", self._is_master)

    async def _is_master(self, at: Address | None, info: Info) -> None:
        """Note the server that a new connection leads to. Raises Unfit for a replica and for a former master.

        A master that was paused goes on as a master when it wakes up, until the sentinels reach it. A proxy that was
        connecting to it meanwhile would claim keys there that others claim at its successor, so it asks once more.
        """
        assert at is not None
        if info.get("role") != "master":
            raise Unfit(f"{at[0]}:{at[1]} is named as the master, and is {ROLES.get(info.get('role', ''), 'none')}")
        if at != await self._sentinels.discover_master():
            raise Unfit(f"{at[0]}:{at[1]} is the master of {self._service} no more")
        self._moved(at)

    def _moved(self, at: Address) -> None:
        former, self._at = self._at, at
        if former is not None and former != at:
            was, now = (f"{host}:{port}" for host, port in (former, at))
            self._log("store failed over", service=self._service, was=was, now=now)
            self._leave_others(at)

    def _leave_others(self, named: Address) -> None:
        """Close connections to every other server: a claim of one server must not be settled at another."""
        for link in self.links:
            # Also one that is being prepared: the server may have been paused in the midst of it.
            if link.connected and link.at != named:
                link.renew(f"the sentinels name another master of {self._service}")

    async def watch(self) -> None:
        await asyncio.gather(super().watch(), self._follow())

    async def _follow(self) -> None:
        """Leave a server that the sentinels no longer name. It may be cut off from them, and still reply."""
        while True:
            await asyncio.sleep(FOLLOW_S)
            try:
                named = await self._sentinels.discover_master()
            except (RedisError, OSError):
                continue
            self._leave_others(named)

    async def close(self) -> None:
        await super().close()
        await self._sentinels.close()
