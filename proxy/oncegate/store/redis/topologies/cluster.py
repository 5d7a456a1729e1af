"""A Redis Cluster: which master has which slot, and how a call reaches it while that changes.

A call goes to the master of its key's slot. The redirection MOVED corrects the map of slots, and ASK sends one call
elsewhere; both cost time of the call's own deadline. The map is fetched again whenever a reply shows
that it may be stale, and at least every REFRESH_S seconds.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from oncegate.settings.addresses import bracketed
from oncegate.settings.store_url import ServerGroup
from oncegate.store.health.breaker import Breaker
from oncegate.store.membership import HEALTH_S
from oncegate.store.record_name import store_key
from oncegate.store.redis.node import MAX_PROBE_PAUSE_S, Node, NodeConfig, random_key
from oncegate.store.redis.topologies.cluster_map import Address, ClusterViews, View, slot_of, tag_within
from oncegate.store.redis.wire import ErrorReply, ScriptCall
from oncegate.store.results import NotAttempted, Unconfirmed

# How many redirections one call follows. After that it fails, and is repeated like any other.
HOPS = 5
# How old the map may get, and the pauses between fetches while replies show that it may be stale.
REFRESH_S = 10.0
MIN_REFRESH_PAUSE_S, MAX_REFRESH_PAUSE_S = 0.05, 0.5
# How long a call waits for one master before it looks at the map again.
REROUTE_S = 0.1
# How many masters are asked for the map.
ASKED = 5
# How long a server without slots stays connected after a call was redirected to it.
IDLE_S = 60.0

# Errors after which the map may be about to change.
MAP_MAY_CHANGE_ERRORS = ("CLUSTERDOWN", "TRYAGAIN", "MASTERDOWN", "READONLY", "LOADING")

# Issues a call at one node.
Issue = Callable[[Node, ScriptCall], Awaitable[Any]]


class Cluster:
    """The masters of a cluster. They are known once one of the servers in the URL has replied."""

    def __init__(self, group: ServerGroup, config: NodeConfig) -> None:
        self._group, self._config = group, config
        self._loop = asyncio.get_running_loop()
        self._slots: list[Node | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        self._masters: dict[Address, Node] = {}
        # Other servers that calls were redirected to, and when last (the loop's time).
        self._visited: dict[Address, Node] = {}
        self._visits: dict[Address, float] = {}
        # Every address of the cluster, in the order in which they are asked for the map.
        self._known: dict[Address, None] = dict.fromkeys(group.places)
        # The breaker of slots whose master is not known.
        self._unmapped = Breaker(self._loop.time, config.breaker_opened)
        self._views = ClusterViews(group, config, self._note_failure)
        # Set when the map may be wrong, and once it is known.
        self._map_may_be_stale = asyncio.Event()
        self._mapped = asyncio.Event()
        self._closing: set[asyncio.Task[None]] = set()
        self._refresh_task: asyncio.Task[None] | None = None
        self._calls_ended = False
        self._down_reason = "not connected yet"

    # Its life ...

    @property
    def nodes(self) -> list[Node]:
        return list(self._masters.values())

    def start(self) -> None:
        self._refresh_task = self._loop.create_task(self._refresh_loop())

    async def close(self) -> None:
        if self._refresh_task is not None:
            self._refresh_task.cancel()
            await asyncio.gather(self._refresh_task, return_exceptions=True)
        nodes = [*self._masters.values(), *self._visited.values()]
        await asyncio.gather(*[node.close() for node in nodes], *self._closing)

    async def wait_up(self, deadline: float) -> bool:
        """Return whether every master is connected, waiting for them until `deadline`."""
        try:
            async with asyncio.timeout_at(deadline):
                await self._mapped.wait()
        except TimeoutError:
            return False
        return all(await asyncio.gather(*[node.wait_up(deadline) for node in self.nodes]))

    def end_calls(self) -> None:
        self._calls_ended = True
        for node in (*self._masters.values(), *self._visited.values()):
            node.end_calls()

    def not_ready_reason(self) -> str | None:
        """Return why nothing can be claimed, or what makes one of the masters unfit; None otherwise.

        A master that is not reachable is no problem while others are: it would take the proxy out for every key.
        """
        reachable = [node for node in self.nodes if node.link.up]
        if not reachable:
            reason = next((node.not_ready_reason() for node in self.nodes), self._down_reason)
            return f"the cluster is not reachable: {reason}"
        return next((f"{node.name}: {reason}" for node in reachable if (reason := node.not_ready_reason())), None)

    @property
    def memory_ratio(self) -> float:
        """The memory ratio of the fullest master."""
        return max((node.memory_ratio for node in self.nodes), default=0.0)

    async def watch(self) -> None:
        """Inspect every master every HEALTH_S seconds, until cancelled."""
        while True:
            nodes = [node for node in self.nodes if node.link.up]
            await asyncio.gather(*[node.inspect() for node in nodes])
            # A master that became a replica: a failover has happened.
            if any(node.info.get("role") == "slave" for node in nodes):
                self._map_may_be_stale.set()
            await asyncio.sleep(HEALTH_S)

    async def probe(self) -> None:
        """Close open breakers once their masters take claims again, until cancelled."""
        while True:
            await asyncio.sleep(MAX_PROBE_PAUSE_S)
            if self._unmapped.open and None not in self._slots:
                self._unmapped.succeeded()
            opened = [node for node in self.nodes if node.breaker.open]
            taken = await asyncio.gather(*[node.takes_claims(self._key_on(node)) for node in opened])
            for node, takes in zip(opened, taken, strict=True):
                if takes:
                    node.breaker.succeeded()

    def _key_on(self, node: Node) -> bytes:
        """Return a random digest whose record would lie on this server."""
        # Random digests fall on every master, unless it has lost its slots meanwhile.
        while self.node_of(store_key(key := random_key())) is not node:
            if node not in self._slots:
                break
        return key

    def node_of(self, name: bytes) -> Node | None:
        return self._slots[key_slot(name)]

    def breaker_of(self, key: bytes) -> Breaker:
        node = self._slots[slot_of(key)]
        return node.breaker if node else self._unmapped

    def note_time(self, now_ms: int) -> None:
        """Do nothing: `claim` has noted the time at the master that replied."""

    def now_ms(self, key: bytes) -> int:
        node = self._slots[slot_of(key)] or next(iter(self._masters.values()))
        return node.now_ms()

    # Scripts ...

    async def claim(self, call: ScriptCall, head: bytes, tail: bytes, _left_s: float) -> Any:
        def issue(node: Node, call: ScriptCall) -> Awaitable[Any]:
            return node.claim(call, head, tail, call.deadline - self._loop.time())

        first = self._slots[key_slot(call.key)]
        # Without this the claim would wait for the master until its deadline.
        if (first.breaker if first else self._unmapped).open:
            return (first and first.health.suspended()) or NotAttempted(self._down_reason)
        node, reply = await self._call(call, issue, claims=True)
        if node is not None and isinstance(reply, list):
            node.note_time(int(reply[1]))
        return reply

    async def run(self, call: ScriptCall, args: bytes) -> Any:
        def issue(node: Node, call: ScriptCall) -> Awaitable[Any]:
            return node.run(call, args)

        return (await self._call(call, issue))[1]

    async def _call(self, call: ScriptCall, issue: Issue, claims: bool = False) -> tuple[Node | None, Any]:
        """Call the master of the key's slot, and follow its redirections.

        Return the server that replied and its reply, or None and an Unconfirmed if no server was reached.
        """
        slot = key_slot(call.key)
        node, asking, reply = self._slots[slot], False, None
        for _ in range(HOPS):
            if node is None or not (node.up if claims else node.link.up):
                node = await self._reach(slot, node if asking else None, call.deadline)
                if node is None:
                    return None, Unconfirmed(self._down_reason, maybe_executed=False)
            reply = await issue(node, replace(call, asking=True) if asking else call)
            # A list is a script's reply, whatever it says.
            if isinstance(reply, list):
                break
            redirection = self._redirection(slot, node, reply)
            if redirection is None:
                break
            node, asking = redirection
        return node, reply

    async def _reach(self, slot: int, node: Node | None, deadline: float) -> Node | None:
        """Wait until `node`, or without one the master of the slot, is connected. Return it, or None."""
        while (now := self._loop.time()) < deadline and not self._calls_ended:
            self._map_may_be_stale.set()
            target = node or self._slots[slot]
            if target is None:
                await asyncio.sleep(REROUTE_S)
            elif await target.wait_up(min(deadline, now + REROUTE_S)):
                return target
            else:
                self._down_reason = f"{target.name} is not reachable: {target.link.down_reason}"
        return None

    def _redirection(self, slot: int, node: Node, reply: object) -> tuple[Node, bool] | None:
        """Return the server to call next, and whether with ASKING; None if there is none to call."""
        words = str(reply).split(" ") if isinstance(reply, ErrorReply) else [""]
        if words[0] == "ASK":
            return self._visit(words[2], node), True
        if words[0] == "MOVED":
            named = self._slots[slot] = self._visit(words[2], node)
            self._map_may_be_stale.set()
            return named, False
        # These may pass without a redirection. The call is repeated by its verb.
        if words[0] in MAP_MAY_CHANGE_ERRORS or isinstance(reply, Unconfirmed):
            self._map_may_be_stale.set()
        return None

    def _visit(self, target: str, by: Node) -> Node:
        """Return the server that `by` redirects to. Without a host it is on the host of `by`."""
        host, _, port = target.rpartition(":")
        address = f"{bracketed(host)}:{port}" if host else f"{by.name.rpartition(':')[0]}:{port}"
        if address in self._masters:
            return self._masters[address]
        if address not in self._visited:
            self._visited[address] = self._make(address)
        self._visits[address] = self._loop.time()
        return self._visited[address]

    def _make(self, address: Address) -> Node:
        node = Node(self._config.openers.to(self._group.server_url(address)), self._config, address)
        node.key_for_probe = partial(self._key_on, node)
        node.start()
        if self._calls_ended:
            node.end_calls()
        return node

    # The map ...

    async def _refresh_loop(self) -> None:
        """Fetch the map whenever it may be stale, with pauses that grow while that lasts."""
        pause_s = MIN_REFRESH_PAUSE_S
        while True:
            self._map_may_be_stale.clear()
            complete = await self._refresh()
            asked_at = self._loop.time()
            await asyncio.sleep(pause_s)
            # An incomplete map is fetched again without waiting for a reason.
            if complete:
                await asyncio.wait({asyncio.ensure_future(self._map_may_be_stale.wait())}, timeout=REFRESH_S)
            quiet = self._loop.time() - asked_at > 2 * MAX_REFRESH_PAUSE_S
            pause_s = MIN_REFRESH_PAUSE_S if quiet else min(pause_s * 2, MAX_REFRESH_PAUSE_S)

    async def _refresh(self) -> bool:
        """Fetch the map. Return whether every slot has a master that is connected."""
        # Masters are asked over their shared connections, other addresses only if none of them replies.
        up = [node for node in self.nodes if node.link.up]
        views = await self._views.of_nodes(random.sample(up, min(len(up), ASKED)))
        if not views:
            views = await self._views.of_addresses(list(self._known))
        if not views:
            return False
        # A server that was cut off reports that the cluster does not work, or knows of fewer elections.
        self._apply(max(views, key=lambda view: (view.works, view.epoch)))
        return None not in self._slots and all(node.up for node in self.nodes)

    def _note_failure(self, reason: str) -> None:
        self._down_reason = reason

    def _apply(self, view: View) -> None:
        """Take a view over: connect to new masters, and close the connections to former ones."""
        if not view.masters:
            self._down_reason = "no server of the cluster has any slots"
            return
        former = self._masters
        self._masters = {
            address: former.get(address) or self._visited.pop(address, None) or self._make(address)
            for address in view.masters
        }
        self._slots = self._assign(view)
        self._known = dict.fromkeys((*self._group.places, *view.masters, *view.replicas))
        for address in former.keys() - self._masters.keys():
            self._log_failover(address, former[address], view)
            self._leave(former[address])
        now = self._loop.time()
        for address in [address for address in self._visited if self._visits[address] < now - IDLE_S]:
            self._leave(self._visited.pop(address))
        self._mapped.set()

    def _assign(self, view: View) -> list[Node | None]:
        """Return the master of each slot, and give every master a hash tag of its own."""
        slots: list[Node | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        for address, ranges in view.masters.items():
            node = self._masters[address]
            node.tag = tag_within(ranges, node.tag)
            for first, last in ranges:
                slots[first : last + 1] = [node] * (last - first + 1)
        return slots

    def _leave(self, node: Node) -> None:
        """Close a server's connections. Calls that wait there are repeated at the master that has the slot now."""
        task = self._loop.create_task(node.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _log_failover(self, address: Address, node: Node, view: View) -> None:
        now = next((other for other, ranges in view.masters.items() if node.tag == tag_within(ranges, node.tag)), "")
        self._config.log("store failed over", was=address, now=now)
