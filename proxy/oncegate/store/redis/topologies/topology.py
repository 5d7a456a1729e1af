"""The servers of a store: what the verbs need of them, and which kind a URL names."""

import asyncio
from collections.abc import Awaitable
from dataclasses import replace
from typing import Any, Protocol

from oncegate.settings.store_url import GroupKind, parse_server_group
from oncegate.store.health.breaker import Breaker
from oncegate.store.redis.durable import level
from oncegate.store.redis.node import Node, NodeConfig
from oncegate.store.redis.server import Login, Logins
from oncegate.store.redis.topologies.indexed_cluster import IndexedCluster
from oncegate.store.redis.topologies.sentinel import SentinelNode
from oncegate.store.redis.wire import ScriptCall


class StoreServers(Protocol):
    """Runs the scripts: one server, or the masters of a cluster, each for its keys.

    Replies come as from `Link.script`. Deadlines are the loop's time in seconds.
    """

    @property
    def nodes(self) -> list[Node]:
        """The servers that take writes now."""

    @property
    def memory_ratio(self) -> float:
        """The used share of the memory limit, of the fullest server."""

    def start(self) -> None: ...

    async def close(self) -> None: ...

    async def wait_up(self, deadline: float) -> bool:
        """Wait until every server is connected, and return whether it is."""

    def end_calls(self) -> None:
        """Stop waiting: every call ends unconfirmed now, also those still to come."""

    def not_ready_reason(self) -> str | None:
        """Return why the servers cannot be relied on now, or None."""

    async def watch(self) -> None:
        """Inspect the servers, until cancelled."""

    async def probe(self) -> None:
        """Close open breakers once their servers take claims again, until cancelled."""

    def node_of(self, name: bytes) -> Node | None:
        """Return the server that has the Redis key `name` now, or None where that is not known."""

    def breaker_of(self, key: bytes) -> Breaker:
        """Return the breaker of the server that has the record of a key digest."""

    def claim(self, call: ScriptCall, head: bytes, tail: bytes, left_s: float) -> Awaitable[Any]:
        """Run `claim`, which takes the key only until the call's deadline, by the clock of the server.

        `head` and `tail` are the arguments before and after that deadline, as RESP bulk strings. The server that
        executes the claim writes the deadline, `left_s` from now, in its own time.
        """

    def run(self, call: ScriptCall, args: bytes) -> Awaitable[Any]:
        """Run a script. `args`: the arguments after the tag, as RESP bulk strings."""

    def command(self, name: bytes, *words: bytes | str | int, deadline: float) -> Awaitable[Any]:
        """Run a plain command about the Redis key `name`, wherever that is now."""

    def note_time(self, now_ms: int) -> None:
        """Note the server's time in a reply to `claim`."""

    def now_ms(self, key: bytes) -> int:
        """Return the time of the server that has the record of a key digest."""


def is_cluster(url: str) -> bool:
    """Return whether a URL names a cluster."""
    group = parse_server_group(url)
    return group is not None and group.kind is GroupKind.CLUSTER


async def refusals(servers: StoreServers, logins: Logins) -> list[str]:
    """Return why servers refuse these logins. A server that is down, whatever it is asked, refuses nothing."""
    asked: list[Awaitable[str]] = [_refusal(node, logins) for node in servers.nodes]
    if isinstance(servers, SentinelNode):
        asked += servers.sentinels.refusals(logins)
    return [reason for reason in await asyncio.gather(*asked) if reason]


async def _refusal(node: Node, logins: Logins) -> str:
    refused = await node.link.login_refusal(logins)
    return f"{node.name}: {refused}" if refused and node.readable else ""


def log_in(servers: StoreServers, login: Login, timeout_s: float) -> None:
    """Give the open connections another login, so that its predecessor can be removed from the servers.

    A connection that is refused keeps the login that it has.
    """
    words = (login.user, login.password) if login.user else (login.password,)
    for link in {link for node in servers.nodes for link in node.links if link.up and login.password}:
        link.command("AUTH", *words, deadline=asyncio.get_running_loop().time() + timeout_s)


def servers_of(url: str, durability: str, config: NodeConfig) -> StoreServers:
    """Return the servers that a URL names: a single one, a master behind Sentinel, or a cluster."""
    group = parse_server_group(url)
    clustered = is_cluster(url)
    config = replace(config, level=level(durability, group is not None), cluster=clustered)
    if group is None:
        return Node(config.openers.to(url), config)
    return IndexedCluster(group, config) if clustered else SentinelNode(group, config)
