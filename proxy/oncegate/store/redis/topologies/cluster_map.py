"""The map of a Redis Cluster: which master has which slots, as its servers see it."""

import asyncio
from collections.abc import Callable, Coroutine
from itertools import count
from typing import Any, NamedTuple

from redis.cluster import parse_cluster_slots
from redis.crc import key_slot

from oncegate.settings.addresses import bracketed
from oncegate.settings.store_url import ServerGroup
from oncegate.store.record_name import store_key
from oncegate.store.redis.link import CONNECT_S
from oncegate.store.redis.node import Node, NodeConfig
from oncegate.store.redis.server import Unfit, parse_info
from oncegate.store.redis.talk import accepted, ask, first_answers
from oncegate.store.redis.wire import ErrorReply
from oncegate.store.results import Unconfirmed

# The share of the timeout that the others may take to reply, once one server has, or none is far away.
ASK_SHARE = 0.4

# host:port
Address = str


class View(NamedTuple):
    """How one server sees the cluster. `epoch` grows with every election; `masters` has ranges of slots."""

    works: bool
    epoch: int
    masters: dict[Address, list[tuple[int, int]]]
    replicas: frozenset[Address]


def view_of(info: bytes, slots: list[Any], host: str) -> View:
    """Return the view in the replies to CLUSTER INFO and CLUSTER SLOTS of a server on `host`."""
    fields = parse_info(info)
    masters: dict[Address, list[tuple[int, int]]] = {}
    replicas: set[Address] = set()
    for slot_range, servers in parse_cluster_slots(slots, current_host=host).items():
        primary, *others = (_address(server) for server in (servers["primary"], *servers["replicas"]))
        masters.setdefault(primary, []).append(slot_range)
        replicas.update(others)
    works = fields.get("cluster_state") == "ok"
    return View(works, int(fields.get("cluster_current_epoch", 0)), masters, frozenset(replicas))


def _address(server: tuple[str, int]) -> Address:
    return f"{bracketed(server[0].strip('[]'))}:{server[1]}"


def slot_of(key: bytes) -> int:
    """Return the slot that holds the record of a key digest."""
    return key_slot(store_key(key))


def tag_within(ranges: list[tuple[int, int]], current: bytes) -> bytes:
    """Return a hash tag whose keys lie within these slots: the current one, if it still does."""

    def within(tag: bytes) -> bool:
        slot = key_slot(tag)
        return any(first <= slot <= last for first, last in ranges)

    if current and within(current):
        return current
    return next(tag for tag in (b"{%d}" % number for number in count()) if within(tag))


class ClusterViews:
    """Collects the views of several servers at once. `failed(reason)` is called for each server that gave none."""

    def __init__(self, group: ServerGroup, config: NodeConfig, failed: Callable[[str], None]) -> None:
        self._group, self._config, self._failed = group, config, failed
        self._clock = asyncio.get_running_loop().time

    async def of_nodes(self, nodes: list[Node]) -> list[View]:
        """Return the views of connected servers that came in time."""
        return await self._gather([self._ask_node(node) for node in nodes])

    async def of_addresses(self, addresses: list[Address]) -> list[View]:
        """Return the views that came in time, over connections made for this alone."""
        return await self._gather([self._ask_address(address) for address in addresses])

    async def _gather(self, questions: list[Coroutine[Any, Any, View]]) -> list[View]:
        if not questions:
            return []
        asked = [asyncio.ensure_future(question) for question in questions]
        timeout_s = self._config.timeout_s
        done = await first_answers(asked, timeout_s * ASK_SHARE, max(CONNECT_S, timeout_s))
        for one in done:
            if (failure := one.exception()) is not None:
                self._failed(str(failure))
        return [one.result() for one in done if one.exception() is None]

    async def _ask_node(self, node: Node) -> View:
        deadline = self._clock() + self._config.timeout_s
        replies = [node.link.command("CLUSTER", part, deadline=deadline) for part in ("INFO", "SLOTS")]
        info, slots = await asyncio.gather(*replies)
        for reply in (info, slots):
            if isinstance(reply, ErrorReply | Unconfirmed):
                raise Unfit(f"{node.name}: {reply}")
        return view_of(info, slots, node.name.rpartition(":")[0])

    async def _ask_address(self, address: Address) -> View:
        connection = self._config.openers.to(self._group.server_url(address), greets=True)()
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
            commands = ("INFO", "server"), ("CLUSTER", "INFO"), ("CLUSTER", "SLOTS")
            server, *views = await ask(connection, *commands)
            # First, because a server of another kind does not know the other commands.
            self._config.check(parse_info(*accepted([server])))
            info, slots = accepted(views)
            return view_of(info, slots, address.rpartition(":")[0])
        finally:
            await connection.disconnect(nowait=True)
