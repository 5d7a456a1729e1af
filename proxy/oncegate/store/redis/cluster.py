"""A Redis Cluster: which master has which slot, and how a call finds its way while that changes.

A call goes to the master of its key's slot. MOVED corrects the map, and ASK sends one call elsewhere, both
within the call's budget. The map is asked for anew after each surprise, and now and then without one.
"""

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Coroutine
from itertools import count
from typing import Any, NamedTuple

from redis.cluster import parse_cluster_slots
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from oncegate.keys.digests import KEY_DIGEST_BYTES, store_key
from oncegate.settings.addresses import bracketed
from oncegate.settings.store_url import ServerGroup
from oncegate.store.breaker import Breaker
from oncegate.store.redis.health_monitor import HEALTH_S
from oncegate.store.redis.link import ErrorReply
from oncegate.store.redis.node import PROBE_MOST_S, Node, NodeConfig
from oncegate.store.redis.server import Unfit, ask, opener, parse_info
from oncegate.store.results import NotAttempted, Unconfirmed

HOPS = 5  # of a call that is sent on and on, while slots move; then it waits like any other that fails
REFRESH_S = 10.0  # how old the map may get without a surprise
REFRESH_LEAST_S, REFRESH_MOST_S = 0.05, 0.5  # from one look at the map to the next, while it surprises
REROUTE_S = 0.1  # how long a call waits for one master before it looks at the map again
ASK_SHARE = 0.4  # of the timeout that servers may take to tell the map
ASKED = 5  # of the masters, for the map
IDLE_S = 60.0  # how long a server without slots is kept that a call was sent to

ASTRAY = ("CLUSTERDOWN", "TRYAGAIN", "MASTERDOWN", "READONLY", "LOADING")  # the map may be about to change

Place = str  # host:port

Call = Callable[[Node, bool], Awaitable[Any]]  # with or without ASKING


class View(NamedTuple):
    """How one server sees the cluster. `epoch` grows with every election; `masters` has ranges of slots."""

    works: bool
    epoch: int
    masters: dict[Place, list[tuple[int, int]]]
    replicas: frozenset[Place]


def view_of(info: bytes, slots: list[Any], host: str) -> View:
    """Return the view in the replies to CLUSTER INFO and CLUSTER SLOTS of a server on `host`."""
    fields = parse_info(info)
    masters: dict[Place, list[tuple[int, int]]] = {}
    replicas: set[Place] = set()
    for ranged, servers in parse_cluster_slots(slots, current_host=host).items():
        primary, *others = (_place(server) for server in (servers["primary"], *servers["replicas"]))
        masters.setdefault(primary, []).append(ranged)
        replicas.update(others)
    works = fields.get("cluster_state") == "ok"
    return View(works, int(fields.get("cluster_current_epoch", 0)), masters, frozenset(replicas))


def _place(server: tuple[str, int]) -> Place:
    return f"{bracketed(server[0].strip('[]'))}:{server[1]}"


def slot_of(key: bytes) -> int:
    """Return the slot that holds the record of a key."""
    return key_slot(store_key(key))


def tag_within(ranges: list[tuple[int, int]], before: bytes) -> bytes:
    """Return a hash tag whose keys lie within some slots; the one before, if it still does."""

    def within(tag: bytes) -> bool:
        slot = key_slot(tag)
        return any(first <= slot <= last for first, last in ranges)

    if before and within(before):
        return before
    return next(tag for tag in (b"{%d}" % number for number in count()) if within(tag))


class Cluster:
    """The masters of a cluster. They are known once one of the named servers has answered."""

    def __init__(self, several: ServerGroup, terms: NodeConfig) -> None:
        self._several, self._terms = several, terms
        self._loop = asyncio.get_running_loop()
        self._slots: list[Node | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        self._masters: dict[Place, Node] = {}
        self._visited: dict[Place, Node] = {}  # those that calls were sent on to, beside the masters
        self._visits: dict[Place, float] = {}  # when last, the loop's time
        self._known: dict[Place, None] = dict.fromkeys(several.places)
        self._unmapped = Breaker(self._loop.time, terms.broke)  # of the slots whose master is not known
        self._surprised = asyncio.Event()
        self._mapped = asyncio.Event()
        self._closing: set[asyncio.Task[None]] = set()
        self._keeper: asyncio.Task[None] | None = None
        self._given_up = False
        self._down_because = "not connected yet"

    # Its life ...

    @property
    def nodes(self) -> list[Node]:
        return list(self._masters.values())

    def start(self) -> None:
        self._keeper = self._loop.create_task(self._keep())

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
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

    def give_up(self) -> None:
        self._given_up = True
        for node in (*self._masters.values(), *self._visited.values()):
            node.give_up()

    def problem(self) -> str | None:
        """Return why nothing can be claimed, or what makes one of the masters unfit. A master that is not
        reachable is no reason while others are: that would take the proxy out for every key."""
        reachable = [node for node in self.nodes if node.link.up]
        if not reachable:
            because = next((node.problem() for node in self.nodes), self._down_because)
            return f"the cluster is not reachable: {because}"
        return next((f"{node.name}: {problem}" for node in reachable if (problem := node.problem())), None)

    @property
    def memory_ratio(self) -> float:
        """Return how full the fullest is."""
        return max((node.memory_ratio for node in self.nodes), default=0.0)

    async def watch(self) -> None:
        """Keep looking at every master, until cancelled."""
        while True:
            nodes = [node for node in self.nodes if node.link.up]
            await asyncio.gather(*[node.inspect() for node in nodes])
            if any(node.info.get("role") == "slave" for node in nodes):
                self._surprised.set()
            await asyncio.sleep(HEALTH_S)

    async def probe(self) -> None:
        while True:
            await asyncio.sleep(PROBE_MOST_S)
            if self._unmapped.open and None not in self._slots:
                self._unmapped.succeeded()
            opened = [node for node in self.nodes if node.breaker.open]
            taken = await asyncio.gather(*[node.takes_claims(self._key_on(node)) for node in opened])
            for node, takes in zip(opened, taken, strict=True):
                if takes:
                    node.breaker.succeeded()

    def _key_on(self, node: Node) -> bytes:
        """Return the digest of no key, whose record would lie on a server."""
        while self.node_of(store_key(key := os.urandom(KEY_DIGEST_BYTES))) is not node:
            if node not in self._slots:
                break
        return key

    def node_of(self, name: bytes) -> Node | None:
        return self._slots[key_slot(name)]

    def breaker_of(self, key: bytes) -> Breaker:
        node = self._slots[slot_of(key)]
        return node.breaker if node else self._unmapped

    def heard(self, now_ms: int) -> None:
        """Nothing: each master's own reply has told its clock."""

    def now_ms(self, key: bytes) -> int:
        node = self._slots[slot_of(key)] or next(iter(self._masters.values()))
        return node.now_ms()

    # Scripts ...

    async def claim(
        self, key: bytes, described: bytes, rest: bytes, deadline: float, _: float, whole: bool = False
    ) -> Any:
        def call(node: Node, asking: bool) -> Awaitable[Any]:
            return node.claim(key, described, rest, deadline, deadline - self._loop.time(), whole, asking)

        slot = slot_of(key)
        first = self._slots[slot]
        if (first.breaker if first else self._unmapped).open:  # else it would be waited for
            return (first and first.losses.withheld()) or NotAttempted(self._down_because)
        node, reply = await self._call(slot, deadline, call)
        if node is not None and isinstance(reply, list):
            node.heard(reply[1])
        return reply

    async def run(self, verb: str, key: bytes, deadline: float, args: bytes, count: int, whole: bool = False) -> Any:
        def call(node: Node, asking: bool) -> Awaitable[Any]:
            return node.run(verb, key, deadline, args, count, whole, asking)

        return (await self._call(slot_of(key), deadline, call))[1]

    async def _call(self, slot: int, deadline: float, call: Call) -> tuple[Node | None, Any]:
        """Call the master of a slot, and whom it names instead. Return who answered, and what."""
        node, asking, reply = self._slots[slot], False, None
        for _ in range(HOPS):
            if node is None or not node.up:
                node = await self._reach(slot, node if asking else None, deadline)
                if node is None:
                    return None, Unconfirmed(self._down_because, maybe_executed=False)
            reply = await call(node, asking)
            if isinstance(reply, list):
                break
            onward = self._onward(slot, node, reply)
            if onward is None:
                break
            node, asking = onward
        return node, reply

    async def _reach(self, slot: int, node: Node | None, deadline: float) -> Node | None:
        """Return `node`, or without one the master of a slot, once it is connected; None where it is not in time."""
        while (now := self._loop.time()) < deadline and not self._given_up:
            self._surprised.set()
            target = node or self._slots[slot]
            if target is None:
                await asyncio.sleep(REROUTE_S)
            elif await target.wait_up(min(deadline, now + REROUTE_S)):
                return target
            else:
                self._down_because = f"{target.name} is not reachable: {target.link.down_because}"
        return None

    def _onward(self, slot: int, node: Node, reply: object) -> tuple[Node, bool] | None:
        """Return whom to call next, and whether with ASKING; None where another call brings no more now."""
        words = str(reply).split(" ") if isinstance(reply, ErrorReply) else [""]
        if words[0] == "ASK":
            return self._visit(words[2], node), True
        if words[0] == "MOVED":
            named = self._slots[slot] = self._visit(words[2], node)
            self._surprised.set()
            return named, False
        if words[0] in ASTRAY or isinstance(reply, Unconfirmed):
            self._surprised.set()
        return None

    def _visit(self, target: str, by: Node) -> Node:
        """Return the server that `by` names; without a host it is on the same one."""
        host, _, port = target.rpartition(":")
        place = f"{bracketed(host)}:{port}" if host else f"{by.name.rpartition(':')[0]}:{port}"
        if place in self._masters:
            return self._masters[place]
        if place not in self._visited:
            self._visited[place] = self._make(place)
        self._visits[place] = self._loop.time()
        return self._visited[place]

    def _make(self, place: Place) -> Node:
        node = Node(opener(self._several.server_url(place), self._terms.timeout_s), self._terms, place)
        node.start()
        if self._given_up:
            node.give_up()
        return node

    # The map ...

    async def _keep(self) -> None:
        """Ask for the map at once after a surprise, but not all the time."""
        pause_s = REFRESH_LEAST_S
        while True:
            self._surprised.clear()
            whole = await self._refresh()
            asked_at = self._loop.time()
            await asyncio.sleep(pause_s)
            if whole:
                await asyncio.wait({asyncio.ensure_future(self._surprised.wait())}, timeout=REFRESH_S)
            quiet = self._loop.time() - asked_at > 2 * REFRESH_MOST_S
            pause_s = REFRESH_LEAST_S if quiet else min(pause_s * 2, REFRESH_MOST_S)

    async def _refresh(self) -> bool:
        """Learn the map. Return whether every slot has a master that is connected."""
        up = [node for node in self.nodes if node.link.up]
        views = await self._gather([self._ask(node) for node in random.sample(up, min(len(up), ASKED))])
        if not views:
            views = await self._gather([self._ask_place(place) for place in self._known])
        if not views:
            return False
        # A server that was cut off says so itself, or knows of fewer elections.
        self._apply(max(views, key=lambda view: (view.works, view.epoch)))
        return None not in self._slots and all(node.up for node in self.nodes)

    async def _gather(self, questions: list[Coroutine[Any, Any, View]]) -> list[View]:
        """Return the answers that came in time, and remember why another did not come."""
        if not questions:
            return []
        asked = [asyncio.ensure_future(question) for question in questions]
        done, late = await asyncio.wait(asked, timeout=self._terms.timeout_s * ASK_SHARE)
        for one in late:
            one.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        for one in done:
            if (failure := one.exception()) is not None:
                self._down_because = str(failure)
        return [one.result() for one in done if one.exception() is None]

    async def _ask(self, node: Node) -> View:
        deadline = self._loop.time() + self._terms.timeout_s
        replies = [node.link.command("CLUSTER", what, deadline=deadline) for what in ("INFO", "SLOTS")]
        info, slots = await asyncio.gather(*replies)
        for reply in (info, slots):
            if isinstance(reply, ErrorReply | Unconfirmed):
                raise Unfit(f"{node.name}: {reply}")
        return view_of(info, slots, node.name.rpartition(":")[0])

    async def _ask_place(self, place: Place) -> View:
        """Ask over a connection for this alone."""
        connection = opener(self._several.server_url(place), self._terms.timeout_s)()
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
            self._terms.check(parse_info(await ask(connection, "INFO", "server")))
            info, slots = await ask(connection, "CLUSTER", "INFO"), await ask(connection, "CLUSTER", "SLOTS")
        finally:
            await connection.disconnect(nowait=True)
        return view_of(info, slots, place.rpartition(":")[0])

    def _apply(self, view: View) -> None:
        """Take a view over: connect to new masters, leave those that are none any more."""
        if not view.masters:
            self._down_because = "no server of the cluster has any slots"
            return
        before, self._masters = (
            self._masters,
            {
                place: self._masters.get(place) or self._visited.pop(place, None) or self._make(place)
                for place in view.masters
            },
        )
        slots: list[Node | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        for place, ranges in view.masters.items():
            node = self._masters[place]
            node.tag = tag_within(ranges, node.tag)
            for first, last in ranges:
                slots[first : last + 1] = [node] * (last - first + 1)
        self._slots = slots
        self._known = dict.fromkeys((*self._several.places, *view.masters, *view.replicas))
        for place in before.keys() - self._masters.keys():
            self._log_failover(place, before[place], view)
            self._leave(before[place])
        now = self._loop.time()
        for place in [place for place in self._visited if self._visits[place] < now - IDLE_S]:
            self._leave(self._visited.pop(place))
        self._mapped.set()

    def _leave(self, node: Node) -> None:
        """Close a server's connections; what is on the way there is repeated where its slot is now."""
        task = self._loop.create_task(node.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _log_failover(self, place: Place, node: Node, view: View) -> None:
        now = next((other for other, ranges in view.masters.items() if node.tag == tag_within(ranges, node.tag)), "")
        self._terms.log("store failed over", was=place, now=now)
